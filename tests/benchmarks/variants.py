"""`make bench-variants`: residual rules, and SCOP against its controls, each with a short fine-tuning.

Uses the shared ResNet-20. At the same rate, `coupled` removes the most and `inner` the least, so the rules cannot be
compared. Each rule therefore gets the same MACs, and then the same measured latency, with a global selection. The
controls get the same MACs, with the paper's selection, the same share of each layer, and with a global one.
Fine-tuning uses every second training image once: enough to distinguish good selections from bad ones, but not to
reach their final accuracy, which `make bench-accuracy` measures. Like that benchmark, this one can be resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scop import make_model
from scop.compute.device import pick_device
from scop.config import BudgetSection, DenseSection, FinetuneSection, VariantSection
from scop.data.dataset import Dataset, Split
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from scop.selection.latency import Stopwatch
from tests.benchmarks.accuracy import ARCHIVE, RESULTS, ROOT, WEIGHTS
from tests.benchmarks.sittings import Deadline, images, work_through
from tests.benchmarks.work import LATENCY_BATCH, Plan

WORK = ROOT / "runs" / "benchmarks" / "variants"
SHAPE = (3, 32, 32)
RATE, MACS, LATENCY = 0.45, 0.442, 0.75
"""The paper's rate, the share of the MACs that it keeps, and a share of the dense network's latency."""
CONTROLS = ("l1", "bn_gamma", "fpgm", "random")


def plan(latency_ms: float) -> Plan:
    """Return the plan: each rule with each budget, and each method with each selection."""
    latency = {"latency_ms": latency_ms, "batch_size": LATENCY_BATCH}
    variants: dict[str, dict[str, Any]] = {
        f"{rule}-{what}": {"selection": "global", "residual": rule, "budget": budget}
        for what, budget in (("macs", {"macs": MACS}), ("latency", latency))
        for rule in RESIDUAL_RULES
    }
    # SCOP with a global selection is scatter-macs.
    variants |= {f"{method}-uniform": {"method": method, "prune_rate": RATE} for method in ("scop", *CONTROLS)}
    under = {"selection": "global", "budget": {"macs": MACS}}
    variants |= {f"{method}-global": {"method": method, **under} for method in CONTROLS[:3]}
    return Plan(
        DenseSection(model="resnet20", weights=str(WEIGHTS)),
        FinetuneSection.model_validate(
            {
                "epochs": 1,
                "lr": 0.02,
                "schedule": "one_cycle",
                "crop_padding": 4,
                "flip": True,
                "distillation": {"weight": 0.9},
            }
        ),
        {"none": VariantSection(method="none")}
        | {name: VariantSection.model_validate(variant) for name, variant in variants.items()},
        command="make bench-variants",
    )


def target(folder: Path) -> float:
    """Return the latency budget in milliseconds. It is measured once and stored, since the plan depends on it."""
    path = folder / "latency_ms"
    if not path.exists():
        model = make_model("resnet20")
        budget = BudgetSection(latency_ms=1.0, batch_size=LATENCY_BATCH)
        stopwatch = Stopwatch(model, ChannelGraph(model, SHAPE), budget, pick_device())
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{LATENCY * stopwatch.dense_ms:.3f}")
    return float(path.read_text())


def every_second(dataset: Dataset) -> Dataset:
    """Return every second training image. Images are sorted by class, so each class is halved."""
    train = Split(dataset["train"].images[::2], dataset["train"].labels[::2])
    return Dataset(dataset.info, {**dataset.splits, "train": train})


def main(arguments: Sequence[str]) -> int:
    """Return 0 if all is done, 3 if work is left."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.variants", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="maximum number of minutes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, at most 3 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel variants (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="only these variants, so that two calls can share the work")
    options = parser.parse_args(arguments)
    deadline = Deadline(options.minutes)
    return work_through(
        {"resnet20": plan(target(WORK))},
        every_second(images(ARCHIVE, WORK.parent / "cifar10")),
        WORK,
        RESULTS,
        options.seeds,
        deadline,
        prefix="variants",
        only=options.only,
        jobs=options.jobs,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
