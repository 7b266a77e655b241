"""Test helpers: paths, running a step, small images and random batch norms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from scop.environment import StepEnvironment
from scop.runtime import execution
from scop.runtime.result import StepResult
from scop.runtime.uris import Uris
from scop.storage.manifest import MANIFEST, TIMINGS, read_folder

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def run_step(name: str, config: Mapping[str, Any], inputs: Uris, outputs: Mapping[str, str]) -> StepResult:
    """Run a step in this process, with settings from the environment variables."""
    return execution.run_step(name, config, inputs, outputs, StepEnvironment.read())


def reproducible_files(run: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a run's steps wrote, except timings and the report, which shows them."""
    return {
        f"{manifest.parent.relative_to(run)}/{name}": entry.sha256
        for manifest in run.rglob(MANIFEST)
        for name, entry in read_folder(manifest.parent).files.items()
        if name != TIMINGS and manifest.parent.name != "report"
    }


def randomise_batch_norms(model: nn.Module, seed: int = 0) -> None:
    """Set statistics and affine parameters of all batch norms to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, low in {"running_mean": -0.5, "running_var": 0.5, "weight": 0.5, "bias": -0.5}.items():
                    tensor: torch.Tensor = getattr(module, name)
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def write_images(root: Path, per_class: dict[str, int], classes: list[str], size: int = 8, suffix: str = "png") -> None:
    """Write SPLIT/CLASS/NNNN.png: noise with a bright row whose index depends on the class."""
    generator = np.random.default_rng(0)
    for split, count in per_class.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
                image[label % size] = 255
                Image.fromarray(image).save(folder / f"{number:04}.{suffix}")
