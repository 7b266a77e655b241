"""Paths, small data and random batch norms for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def randomise_batch_norms(model: nn.Module, seed: int = 0) -> None:
    """Give all batch norms statistics and affine parameters other than those that they start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, low in {"running_mean": -0.5, "running_var": 0.5, "weight": 0.5, "bias": -0.5}.items():
                    tensor: torch.Tensor = getattr(module, name)
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def write_images(root: Path, per_class: dict[str, int], classes: list[str], size: int = 8, suffix: str = "png") -> None:
    """Write SPLIT/CLASS/NNNN.png: noise with a bright row whose place tells the class."""
    generator = np.random.default_rng(0)
    for split, count in per_class.items():
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
                image[label % size] = 255
                Image.fromarray(image).save(folder / f"{number:04}.{suffix}")
