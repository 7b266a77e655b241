"""`make bench-accuracy`, `make bench-gpu`: accuracy of pruned networks on the shared CIFAR-10.

Each network is loaded or trained, then pruned and fine-tuned in several ways and with several seeds, with the presets'
settings. A call works for some minutes and stops; the same command resumes. Exit code 3 means that work is left. Each
finished variant is written to accuracy-NETWORK.json. The command ``python -m tests.benchmarks.accuracy resnet56``
requires only torch, torchvision, numpy, safetensors, pydantic and torch-pruning.
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
"""Trained by the plan of ResNet-56 on an H200: 89.65 %, and 89.63 % with convolutions and last layer in float16."""

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
    """Return the plans by name.

    resnet56 and resnet50 are sized for 25 minutes on one data-centre GPU with one seed, the others for two CPU cores.
    resnet56-short gives a first result for ResNet-56: its fine-tuning is too short to converge.

    Args:
        weights: weights of ResNet-20, which is trained without them. Those of ResNet-56 are in this folder.
        compiled: train with torch.compile.
        changes: changes to the fine-tuning settings.
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
    """Return 0 if all is done, 3 if work is left."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.accuracy", description=__doc__)
    parser.add_argument(
        "networks",
        nargs="*",
        help=f"{', '.join(plans())}; all by default",
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="archive of images (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="weights of ResNet-20 (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="train all dense networks, even if weights exist")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for intermediate files (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for JSON files (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="maximum number of minutes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per network, at most 3 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel variants (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="only these variants; without names, only the dense network")
    parser.add_argument(
        "--steps",
        choices=("replayed", "compiled", "launched"),
        default="replayed" if torch.cuda.is_available() else "launched",
        help="how training steps run: as CUDA graphs, with torch.compile, or unchanged (default: %(default)s)",
    )
    parser.add_argument(
        "--finetune", type=json.loads, help='changes to the fine-tuning settings, such as {"epochs": 100}'
    )
    options = parser.parse_args(arguments)
    deadline = Deadline(options.minutes)
    every = plans(options.weights, options.steps == "compiled", options.finetune)
    unknown = [name for name in options.networks if name not in every]
    if unknown:
        parser.error(f"unknown network {unknown[0]!r} (known: {', '.join(every)})")
    if options.steps == "replayed" and not torch.cuda.is_available():
        parser.error("--steps replayed needs a GPU, but none was found; use --steps launched")
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
