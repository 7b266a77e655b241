"""Test helpers: paths, small settings, running a step, small images and random batch norms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import nn

from scop.environment import StepEnvironment, TorchrunEnvironment
from scop.runtime import execution
from scop.runtime.result import StepResult
from scop.runtime.uris import Uris
from scop.storage.manifest import MANIFEST, TIMINGS, read_folder

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TINY = {"model": "tests.networks:Plain", "epochs": 1, "batch_size": 64}
"""Section `dense` of a training that takes less than a second."""

# Momentum would amplify rounding errors; without it, the weights of two runs can be compared directly.
STEADY = {"epochs": 2, "batch_size": 64, "lr": 0.02, "momentum": 0.0, "precision": "fp32", "crop_padding": 1}
STEADY_DENSE = STEADY | {"model": "tests.networks:Plain"}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""Tolerances of `torch.testing.assert_close` for weights trained with `STEADY`."""


def run_step(name: str, config: Mapping[str, Any], inputs: Uris, outputs: Mapping[str, str]) -> StepResult:
    """Run a step in this process, with settings from the environment variables."""
    return execution.run_step(name, config, inputs, outputs, StepEnvironment.read(), TorchrunEnvironment.read())


def run_in_processes(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, Path], outputs: Mapping[str, Path], processes: int
) -> StepResult:
    """Run a step on local folders in this number of processes."""
    paths: Uris = {key: str(path) for key, path in inputs.items()}
    with patch.dict(os.environ, {"SCOP_PROCESSES": str(processes), "PYTHONPATH": str(ROOT)}):
        return run_step(name, config, paths, {key: str(path) for key, path in outputs.items()})


def train_tiny(dataset: Path, output: Path, **settings: object) -> None:
    """Run step train_dense with `TINY` and changed settings."""
    run_step("train_dense", {"dense": TINY | settings}, {"dataset": str(dataset)}, {"model": str(output)})


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
