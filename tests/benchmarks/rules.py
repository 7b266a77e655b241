"""`make bench-rules`: residual rules compared at equal MACs and at equal latency, on ResNet-20.

At the same rate `coupled` removes most and `inner` least, so that says nothing. Here each rule gets the same MACs, and
then the same measured latency, takes what it may from where it hurts least, and is fine-tuned for two epochs. Like
`make bench-accuracy` it goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from scop import make_model
from scop.budget import Stopwatch
from scop.config import BudgetSection, DenseSection, FinetuneSection, VariantSection
from scop.device import pick_device
from scop.graph import RESIDUAL_RULES, ChannelGraph
from tests.benchmarks.accuracy import ARCHIVE, RESULTS, ROOT
from tests.benchmarks.work import LATENCY_BATCH, WORK_LEFT, Plan, images, work_through
from tests.helpers import SHARED

WORK = ROOT / "runs" / "benchmarks" / "rules"
SHAPE = (3, 32, 32)
MACS, LATENCY = 0.442, 0.75
"""Shares of the dense network's."""


def plan(latency_ms: float) -> Plan:
    """Each rule under each budget."""
    budgets = {
        "macs": {"macs": MACS},
        "latency": {"latency_ms": latency_ms, "batch_size": LATENCY_BATCH},
    }
    variants = {
        f"{rule}-{what}": VariantSection.model_validate({"selection": "global", "residual": rule, "budget": budget})
        for what, budget in budgets.items()
        for rule in RESIDUAL_RULES
    }
    return Plan(
        DenseSection(model="resnet20", weights=str(SHARED / "weights" / "resnet20-cifar10.safetensors")),
        FinetuneSection.model_validate(
            {"epochs": 2, "lr": 0.02, "schedule": "one_cycle", "crop_padding": 4, "flip": True}
        ),
        {"none": VariantSection(method="none"), **variants},
        command="make bench-rules",
    )


def target(folder: Path) -> float:
    """Milliseconds, measured once: a plan depends on it."""
    path = folder / "latency_ms"
    if not path.exists():
        model = make_model("resnet20")
        budget = BudgetSection(latency_ms=1.0, batch_size=LATENCY_BATCH)
        stopwatch = Stopwatch(model, ChannelGraph(model, SHAPE), budget, pick_device())
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{LATENCY * stopwatch.dense_ms:.3f}")
    return float(path.read_text())


def main(arguments: list[str]) -> int:
    """0 when all is done, 3 while work is left; for so many minutes, an hour by default."""
    until = time.monotonic() + 60 * float(arguments[0] if arguments else 60)
    dataset = images(ARCHIVE, WORK / "cifar10")
    chosen = {"resnet20": plan(target(WORK))}
    return work_through(chosen, dataset, WORK, RESULTS, 3, lambda: time.monotonic() > until, prefix="rules")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    print("work is left: the same command goes on" if code == WORK_LEFT else "all is done", flush=True)
    sys.exit(code)
