"""`make bench-quality`: quality of each source's knockoffs, and share of channels that the knockoff filter keeps.

Uses the shared ResNet-20 and CIFAR-10; takes minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from scop import train_knockoffs
from scop.compute.device import pick_device
from scop.config import KnockoffSection
from scop.data.batches import Batches
from scop.knockoffs.quality import measure_quality
from scop.knockoffs.sources import make_source
from scop.selection.strategy import knockoff_threshold
from tests.benchmarks.inputs import AUGMENTATION, AUGMENTED, given_resnet20, images
from tests.benchmarks.measure import RESULTS, machine, settings_hash
from tests.benchmarks.scores import BATCHES, First

SOURCES: dict[str, dict[str, Any]] = {
    "shuffle": {},
    "gaussian": {"source": "gaussian"},
    "gaussian at distance 0.5": {"source": "gaussian", "gaussian": {"distance": 0.5}},
    "generator": {"source": "generator", "generator": {"epochs": 10}},
}
"""Knockoff settings by name. The generator trains as briefly as in `make bench-scores`: 400 steps, eight minutes."""
RATES = (0.1, 0.2)
"""False-discovery rates."""
SURE = 2.0
"""Threshold of W, in standard errors."""


def main(names: list[str]) -> int:
    """Measure sources by name, all by default."""
    path, device = RESULTS / "quality-resnet20.json", pick_device()
    dataset, model = images(validation=0), given_resnet20()
    batches = Batches(dataset["train"], dataset.info, 256, device, AUGMENTATION)
    results: dict[str, Any] = {"network": "resnet20", "sources": {}, "command": "make bench-quality"}
    if path.exists():
        results["sources"] = json.loads(path.read_text())["sources"]
    for name in names or SOURCES:
        section = KnockoffSection.model_validate(AUGMENTED | SOURCES[name])
        torch.manual_seed(section.seed)
        batches.set_epoch(0)
        fewer = section.source == "generator"
        source = make_source(section, First(batches) if fewer else batches, device)
        quality = measure_quality(source, model.to(device).eval(), batches, device, section.seed)
        w = torch.cat([*train_knockoffs(model.cpu(), batches, section, source=source, device=device).signed.values()])
        results["sources"][name] = {
            "settings": SOURCES[name],
            "settings_hash": settings_hash("resnet20", section.model_dump(), *([BATCHES] if fewer else [])),
            "quality": quality.as_dict(),
            "beat_their_knockoffs": float((w > SURE).double().mean()),
            "are_beaten": float((w < -SURE).double().mean()),
            "kept_at_fdr": {str(q): float((w >= knockoff_threshold(w, q)).double().mean()) for q in RATES},
            "machine": machine(),
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(name, {k: v for k, v in results["sources"][name].items() if k != "machine"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
