"""`make bench-gpu`: ResNet-56 and ResNet-50 trained, pruned and fine-tuned from the shared archive.

It works for some minutes, stops by itself, and goes on where it stopped when it is called again; exit code 3 says that
work is left. It needs torch, torchvision, numpy, safetensors, pydantic and torch-pruning, and writes
gpu-NETWORK.json after each network that is ready.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scop.config import DenseSection, FinetuneSection, VariantSection
from tests.benchmarks.work import Plan, images, work_through

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "benchmarks" / "gpu"
RESULTS = Path(__file__).parent / "results"
ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz"

_AUGMENTED: dict[str, Any] = {"crop_padding": 4, "flip": True, "schedule": "one_cycle", "label_smoothing": 0.1}
_FINE: dict[str, Any] = _AUGMENTED | {"ema": 0.998, "distillation": {"weight": 0.5}, "label_smoothing": 0.0}


def _variants(budget: dict[str, float]) -> dict[str, VariantSection]:
    under = {"selection": "global", "budget": budget}
    return {
        "none": VariantSection(method="none"),
        "scop": VariantSection.model_validate(under),
        "l1": VariantSection.model_validate(under | {"method": "l1"}),
    }


def plans(compiled: bool) -> dict[str, Plan]:
    """By name; sized for 25 minutes on one data-centre GPU with one seed."""
    more = {"compile": compiled}
    small = {"batch_size": 256, **more}
    return {
        "resnet56": Plan(
            DenseSection.model_validate(
                {"model": "resnet56", "epochs": 60, "lr": 0.4, "warmup_epochs": 12, **_AUGMENTED, **small}
            ),
            FinetuneSection.model_validate({"epochs": 30, "lr": 0.1, "warmup_epochs": 3, **_FINE, **small}),
            _variants({"macs": 0.44}),
            once=("l1",),
        ),
        "resnet50": Plan(
            DenseSection.model_validate(
                {"model": "torchvision:resnet50", "epochs": 40, "lr": 0.2, "warmup_epochs": 8, **_AUGMENTED, **small}
            ),
            FinetuneSection.model_validate({"epochs": 20, "lr": 0.05, "warmup_epochs": 2, **_FINE, **small}),
            _variants({"params": 10_587_835}),
            once=("l1",),
        ),
    }


def main(arguments: Sequence[str]) -> int:
    """0 when all is done, 3 while work is left."""
    parser = argparse.ArgumentParser(prog="bench-gpu", description=__doc__)
    parser.add_argument("networks", nargs="*", help="resnet56, resnet50; both by default")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="the images (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="what is kept between calls (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where JSON goes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop after so many (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="of each network, three at most (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    every = plans(compiled=torch.cuda.is_available() and not options.no_compile)
    unknown = [name for name in options.networks if name not in every]
    if unknown:
        parser.error(f"no network {unknown[0]!r} (known: {', '.join(every)})")
    dataset = images(options.archive, options.work / "cifar10")
    return work_through(
        {name: every[name] for name in options.networks or every},
        dataset,
        options.work,
        options.results,
        options.seeds,
        lambda: time.monotonic() > until,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
