"""Images: the dataset artifact, its sources, and batches that cost next to nothing.

Small images are kept as one uint8 array per split, memory-mapped from disk and resident on the training device. A
batch is one gather that crops, flips and reflects by index arithmetic, then a normalisation on the device; there are
no worker processes. The layout follows airbench (Keller Jordan, 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scop.errors import UserError
from scop.manifest import read_folder, write_manifest

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class DatasetInfo(BaseModel):
    """What `dataset.json` says of a dataset.

    Attributes:
        source: where the images come from, in words.
        classes: class names, by label.
        shape: (C, H, W) of every image.
        mean, std: of the training split per channel, for pixels in [0, 1].
        counts: images in each split.
        content: sha256 over all pixels and labels: the dataset's identity.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    classes: list[str]
    shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    counts: dict[str, int]
    content: str


@dataclass(frozen=True)
class Split:
    """One split: images uint8 (N, C, H, W), labels int64 (N,), on the CPU and usually memory-mapped."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A dataset of small images, split into train, validation and test; validation may be empty."""

    info: DatasetInfo
    splits: Mapping[SplitName, Split]

    def __getitem__(self, split: SplitName) -> Split:
        return self.splits[split]


def make_dataset(
    source: str,
    classes: list[str],
    train: Split,
    test: Split,
    validation: Split | float = 0.0,
    seed: int = 0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Dataset:
    """Put a dataset together, cutting a validation split from the training data where none is given.

    Args:
        validation: a split, or the fraction of each class to cut from the training data.
        seed: draws the images that are cut.
        mean, std: per channel, for pixels in [0, 1]; those of the training split by default.

    Raises:
        UserError: a class lacks images in a split.
    """
    if not isinstance(validation, Split):
        train, validation = _stratified(train, validation, seed, classes)
    splits: dict[SplitName, Split] = {"train": train, "validation": validation, "test": test}
    for name, split in splits.items():
        missing = sorted(set(range(len(classes))) - set(np.unique(split.labels).tolist()))
        if missing and len(split):
            raise UserError(f"{source}: class {classes[missing[0]]!r} has no image in split {name!r}")
    own_mean, own_std = _statistics(train.images)
    info = DatasetInfo(
        source=source,
        classes=classes,
        shape=train.images.shape[1:],
        mean=mean or own_mean,
        std=std or own_std,
        counts={name: len(split) for name, split in splits.items()},
        content=_content_hash(splits),
    )
    return Dataset(info, splits)


def _stratified(train: Split, fraction: float, seed: int, classes: list[str]) -> tuple[Split, Split]:
    """Split off the given fraction of each class; both parts keep the order of the images."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(train), dtype=bool)
    for label in range(len(classes)):
        members = np.flatnonzero(train.labels == label)
        chosen[generator.permutation(members)[: round(fraction * len(members))]] = True
    if not chosen.any():
        return train, Split(train.images[:0], train.labels[:0])
    return (Split(train.images[~chosen], train.labels[~chosen]), Split(train.images[chosen], train.labels[chosen]))


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], exactly, from the histogram of the 256 values."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(round(mean, 6))
        deviations.append(round(max(variance, 1e-12) ** 0.5, 6))
    return means, deviations


def _content_hash(splits: Mapping[SplitName, Split]) -> str:
    digest = hashlib.sha256()
    for name in SPLITS:
        for array in (splits[name].images, splits[name].labels):
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a dataset artifact: two arrays per split, `dataset.json`, and the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in dataset.splits.items():
        np.save(folder / f"{name}.images.npy", split.images)
        np.save(folder / f"{name}.labels.npy", split.labels.astype(np.int64))
    (folder / "dataset.json").write_text(dataset.info.model_dump_json(indent=1) + "\n")
    write_manifest(folder, kind="dataset")


def load_dataset(folder: Path) -> Dataset:
    """Open a dataset artifact; arrays stay on disk until they are read.

    Raises:
        UserError: the folder is not a whole dataset.
    """
    read_folder(folder, kind="dataset")
    info = DatasetInfo.model_validate_json((folder / "dataset.json").read_text())
    splits: dict[SplitName, Split] = {
        name: Split(
            np.load(folder / f"{name}.images.npy", mmap_mode="c", allow_pickle=False),
            np.load(folder / f"{name}.labels.npy", mmap_mode="c", allow_pickle=False),
        )
        for name in SPLITS
    }
    return Dataset(info, splits)


class Augmentation(BaseModel):
    """Random changes to training images.

    Attributes:
        crop_padding: shift by up to this many pixels each way; what comes in from outside is reflected.
        flip: mirror half of the images left to right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_padding: int = Field(default=0, ge=0)
    flip: bool = False


class Batches:
    """Batches of a split, resident on a device.

    Iterating yields (images, labels): images float (B, C, H, W), normalised, in channels-last memory format; labels
    int64 (B,). With an augmentation the order is shuffled anew each epoch and a last partial batch is left out; the
    order and the changes depend on seed and epoch alone, so training that is resumed sees what it would have seen.

    Args:
        split: the images.
        info: the dataset's description, for mean and standard deviation.
        batch_size: images in a batch.
        device: where images are kept and batches made.
        augmentation: for training; None gives the images in their order, all of them.
        seed: of order and augmentation.

    Raises:
        UserError: fewer training images than a batch, or padding as wide as the image.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if augmentation is not None and len(split) < batch_size:
            raise UserError(f"{len(split)} training images are fewer than a batch: batch_size is {batch_size}")
        smallest = min(split.images.shape[2:])
        if augmentation is not None and augmentation.crop_padding >= smallest:
            raise UserError(f"crop_padding {augmentation.crop_padding} must be below the image's {smallest} pixels")
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.batch_size, self.device, self.augmentation, self.seed = batch_size, device, augmentation, seed
        # Pixels are scaled and normalised in one step: x / 255 is folded into mean and deviation.
        self._mean = torch.tensor(info.mean, device=device).view(1, -1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(info.std, device=device).view(1, -1, 1, 1) * 255)
        self.input_shape = tuple(split.images.shape[1:])
        self.epoch = 0

    def __len__(self) -> int:
        if self.augmentation is not None:
            return len(self.labels) // self.batch_size
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; without it, iterations count up by themselves."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augmentation is None:
            for start in range(0, len(self.labels), self.batch_size):
                part = slice(start, start + self.batch_size)
                yield self._normalise(self.images[part]), self.labels[part]
            return
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        self.epoch += 1
        order = torch.randperm(len(self.labels), generator=generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield (
                self._normalise(self._augment(chosen, self.augmentation, generator)),
                self.labels[chosen.to(self.device)],
            )

    def _augment(self, chosen: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
        """Crop and flip the chosen images (B,) by one gather from the split: uint8 (B, C, H, W)."""
        _, height, width = self.input_shape
        pad, count = augmentation.crop_padding, len(chosen)
        rows = torch.arange(height).expand(count, height)
        columns = torch.arange(width).expand(count, width)
        if pad:
            shift = torch.randint(-pad, pad + 1, (2, count, 1), generator=generator)
            rows, columns = _reflect(rows + shift[0], height), _reflect(columns + shift[1], width)
        if augmentation.flip:
            flipped = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        if not pad and not augmentation.flip:
            return self.images[chosen.to(self.device)]
        index = [
            part.to(self.device, non_blocking=True)
            for part in (chosen[:, None, None], rows[:, :, None], columns[:, None, :])
        ]
        # Indices around a slice put the channels last: (B, H, W, C), which is the memory format wanted anyway.
        return self.images[index[0], :, index[1], index[2]].permute(0, 3, 1, 2)

    def _normalise(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        return floats.sub_(self._mean).mul_(self._scale)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Bring indices in (-size, 2 * size - 1) back into [0, size) as by a mirror at the outermost pixels."""
    return (size - 1 - (size - 1 - index.abs()).abs()).abs()


def _mix(seed: int, epoch: int) -> int:
    """One generator seed of two numbers, such that neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")
