"""The images and networks on which scores and knockoffs are measured."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from scop import make_model
from scop.compute.device import pick_device
from scop.config import DataSection, DenseSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, load_dataset, save_dataset
from scop.data.sources import load_source
from scop.models.artifacts import load_weights
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer
from tests.helpers import ROOT, SHARED

CACHE = ROOT / "runs" / "benchmarks"
AUGMENTATION = Augmentation(crop_padding=4, flip=True)
AUGMENTED = {"crop_padding": 4, "flip": True}
"""The same as settings of a section."""


@cache
def images(validation: float) -> Dataset:
    """Return the shared CIFAR-10 with this share of the training images as validation split; it is packed once."""
    folder = CACHE / f"cifar10-{validation:g}"
    if not (folder / "manifest.json").exists():
        path = str(SHARED / "data" / "cifar10-jpeg.tar.gz")
        save_dataset(load_source(DataSection(source="imagefolder", path=path, validation=validation)), folder)
    return load_dataset(folder)


def given_resnet20() -> nn.Module:
    """Return ResNet-20 with the shared weights."""
    model = make_model("resnet20")
    load_weights(model, str(SHARED / "weights" / "resnet20-cifar10.safetensors"))
    return model


def trained_vgg() -> nn.Module:
    """Return a narrow VGG, trained for ten epochs on first use."""
    path, device = CACHE / "vgg.pt", pick_device()
    torch.manual_seed(0)
    model = make_model("tests.networks:Vgg")
    if not path.exists():
        section = DenseSection.model_validate({"epochs": 10, "lr": 0.1, "schedule": "one_cycle", **AUGMENTED})
        dataset = images(0.1)
        batches = Batches(dataset["train"], dataset.info, section.batch_size, device, AUGMENTATION, 0)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective, optimizer = Supervised(model, device, section), make_optimizer(model, section)
        fit(objective, batches, optimizer, Schedule.of(section), label="vgg")
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.cpu().state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
