"""`make bench-accuracy`, `make bench-gpu`: what networks lose by pruning, on the shared CIFAR-10.

Each is given or trained, then pruned and fine-tuned in several ways and by several seeds, by the presets' settings. A
call works for some minutes, stops by itself, and goes on where it stopped when it is called again; exit code 3 says
that work is left. It writes accuracy-NETWORK.json with each variant that is ready. On a machine that has no more than
torch, torchvision, numpy, safetensors, pydantic and torch-pruning: ``python -m tests.benchmarks.accuracy resnet56``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scop.config import DenseSection, FinetuneSection, VariantSection
from tests.benchmarks.graphs import check_replays
from tests.benchmarks.sittings import Deadline, images, work_through
from tests.benchmarks.work import Plan

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "benchmarks" / "accuracy"
RESULTS = Path(__file__).parent / "results"
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"
WEIGHTS = ROOT.parent / "shared" / "weights" / "resnet20-cifar10.safetensors"
RESNET56 = Path(__file__).parent / "weights" / "resnet56-cifar10.safetensors"
"""As the plan of ResNet-56 trained it on an H200, 89.65 %; convolutions and the last layer in float16, 89.63 % so."""

_AUGMENTED: dict[str, Any] = {"crop_padding": 4, "flip": True, "schedule": "one_cycle"}
_DENSE: dict[str, Any] = _AUGMENTED | {"batch_size": 512}
_FINE: dict[str, Any] = _AUGMENTED | {"ema": 0.998, "distillation": {"weight": 0.9, "attention": 50}}
_LARGE: dict[str, Any] = _FINE | {"batch_size": 512, "ema": 0.99}


def _variants(budget: dict[str, float]) -> dict[str, VariantSection]:
    under = {"selection": "global", "budget": budget}
    return {
        "none": VariantSection(method="none"),
        "scop": VariantSection.model_validate(under),
        "l1": VariantSection.model_validate(under | {"method": "l1"}),
    }


def plans(
    weights: Path | None = WEIGHTS, compiled: bool = False, changes: Mapping[str, Any] | None = None
) -> dict[str, Plan]:
    """By name; resnet56 and resnet50 are sized for 25 minutes on one data-centre GPU with one seed.

    Two cores carry the others: resnet56-short is a first look at ResNet-56, whose fine-tuning has not come to its end.

    Args:
        weights: of ResNet-20; it is trained where there are none. Those of ResNet-56 are here.
        compiled: train through torch.compile.
        changes: to the settings of fine-tuning.
    """
    more = {"compile": compiled}
    changed: dict[str, Any] = {**more, **(changes or {})}
    given = {"weights": str(weights)} if weights is not None and weights.exists() else {}
    plain: dict[str, Any] = {"epochs": 40, "lr": 0.1, "warmup_epochs": 4, "weight_decay": 1e-4, **_FINE}
    usual = plain | {"distillation": {**_FINE["distillation"], "mirror": True}}
    resnet20 = Plan(
        DenseSection.model_validate(
            {"model": "resnet20", "epochs": 30, "lr": 0.2, "warmup_epochs": 6, **_AUGMENTED, **given, **more}
        ),
        FinetuneSection.model_validate(usual | changed),
        _variants({"macs": 0.442}),
        once=("l1",),
        command="make bench-accuracy",
    )
    always = {"distillation": {**_FINE["distillation"], "attention_until": 1.0}}
    longer: dict[str, Any] = {"epochs": 75, "lr": 0.1, "warmup_epochs": 5, "weight_decay": 1e-4, **_FINE, **always}
    resnet56 = Plan(
        DenseSection.model_validate(
            {
                "model": "resnet56",
                "epochs": 60,
                "lr": 0.4,
                "warmup_epochs": 12,
                "weights": str(RESNET56),
                **_DENSE,
                **more,
            }
        ),
        FinetuneSection.model_validate({"epochs": 50, "lr": 0.2, "warmup_epochs": 5, **_LARGE, **changed}),
        _variants({"macs": 0.44}),
        once=("l1",),
    )
    shorter = usual | {"epochs": 8, "warmup_epochs": 1}
    return {
        "resnet20": resnet20,
        "resnet20-60": replace(
            resnet20,
            finetune=FinetuneSection.model_validate(plain | {"epochs": 60} | changed),
            command="python -m tests.benchmarks.accuracy resnet20-60",
        ),
        "resnet20-once": replace(
            resnet20,
            finetune=FinetuneSection.model_validate(plain | changed),
            command="python -m tests.benchmarks.accuracy resnet20-once --seeds 2",
        ),
        "resnet20-long": replace(
            resnet20,
            finetune=FinetuneSection.model_validate(longer | changed),
            command="python -m tests.benchmarks.accuracy resnet20-long --seeds 2",
        ),
        "resnet56": resnet56,
        "resnet56-short": replace(
            resnet56,
            finetune=FinetuneSection.model_validate(shorter | changed),
            command="python -m tests.benchmarks.accuracy resnet56-short",
        ),
        "resnet50": Plan(
            DenseSection.model_validate(
                {"model": "torchvision:resnet50", "epochs": 40, "lr": 0.2, "warmup_epochs": 8, **_DENSE, **more}
            ),
            FinetuneSection.model_validate({"epochs": 20, "lr": 0.1, "warmup_epochs": 2, **_LARGE, **changed}),
            _variants({"params": 10_587_835}),
            once=("l1",),
        ),
    }


def main(arguments: Sequence[str]) -> int:
    """0 when all is done, 3 while work is left."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.accuracy", description=__doc__)
    parser.add_argument(
        "networks",
        nargs="*",
        help=f"{', '.join(plans())}; all by default",
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the images (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of ResNet-20 (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="train dense networks that have weights, too")
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between calls (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON goes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="of each network, three at most (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="so many variants at a time (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="these variants; none for just the dense network")
    parser.add_argument(
        "--steps",
        choices=("replayed", "compiled", "launched"),
        default="replayed" if torch.cuda.is_available() else "launched",
        help="replayed as CUDA graphs, through torch.compile, or as they are (default: %(default)s)",
    )
    parser.add_argument(
        "--finetune", type=json.loads, help='changes to its settings, as {"epochs": 100} (default: none)'
    )
    options = parser.parse_args(arguments)
    deadline = Deadline(options.minutes)
    every = plans(options.weights, options.steps == "compiled", options.finetune)
    unknown = [name for name in options.networks if name not in every]
    if unknown:
        parser.error(f"no network {unknown[0]!r} (known: {', '.join(every)})")
    if options.steps == "replayed" and not torch.cuda.is_available():
        parser.error("--steps replayed needs a GPU, and there is none; leave it out")
    chosen = {name: every[name] for name in options.networks or every}
    if options.train:
        chosen = {
            name: replace(plan, dense=plan.dense.model_copy(update={"weights": None})) for name, plan in chosen.items()
        }
    if options.steps == "replayed":
        check_replays({name: (plan.dense.model, plan.finetune) for name, plan in chosen.items()})
    dataset = images(options.archive, options.work / "cifar10")
    return work_through(
        chosen,
        dataset,
        options.work,
        options.results,
        options.seeds,
        deadline,
        only=options.only,
        jobs=options.jobs,
        graphs=options.steps == "replayed",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
