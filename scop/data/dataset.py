"""The dataset artifact: small images as one uint8 array per split, memory-mapped from disk.

`scop.data.batches` reads it in batches. This module does not import PyTorch, which would slow down data preparation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from scop.errors import UserError
from scop.storage.manifest import read_folder, write_manifest

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class DatasetInfo(BaseModel):
    """Description of a dataset, the content of `dataset.json`.

    Attributes:
        source: name of the source.
        classes: class names, indexed by label.
        shape: (C, H, W) of every image.
        mean, std: per channel, for pixels in [0, 1]; those of the training split unless the configuration sets them.
        counts: number of images in each split.
        content: sha256 of all pixels and labels; identifies the dataset.
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
    """One split: images uint8 (N, C, H, W) and labels int64 (N,), usually memory-mapped."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A dataset of small images in splits train, validation and test; validation may be empty."""

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
    """Build a dataset from its splits.

    Args:
        source: name of the source.
        classes: class names, indexed by label.
        train: the training split.
        test: the test split.
        validation: the validation split, or the fraction of each class to split off from the training split.
        seed: seed of this random split.
        mean, std: per channel, for pixels in [0, 1]; by default those of the training split.

    Raises:
        UserError: a class has no image in a split, or mean or std has the wrong number of entries.
    """
    if not isinstance(validation, Split):
        train, validation = cut(train, validation, seed, classes)
    splits: dict[SplitName, Split] = {"train": train, "validation": validation, "test": test}
    for name, split in splits.items():
        missing = sorted(set(range(len(classes))) - set(np.unique(split.labels).tolist()))
        if missing and len(split):
            raise UserError(f"{source}: class {classes[missing[0]]!r} has no image in split {name!r}")
    channels = train.images.shape[1]
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise UserError(f"data.{key} has length {len(given)}, not {channels}; give one number per channel")
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


def cut(train: Split, fraction: float, seed: int, classes: list[str]) -> tuple[Split, Split]:
    """Split off a random fraction of each class; return the remaining and the split-off images, both in order."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(train), dtype=bool)
    for label in range(len(classes)):
        members = np.flatnonzero(train.labels == label)
        # Both parts get at least one image of each class that has two or more.
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) if fraction else 0
        chosen[generator.permutation(members)[: max(count, 0)]] = True
    if not chosen.any():
        return train, Split(train.images[:0], train.labels[:0])
    return (Split(train.images[~chosen], train.labels[~chosen]), Split(train.images[chosen], train.labels[chosen]))


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, for pixels in [0, 1]; exact, from a histogram of 256 values."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):  # in chunks: bincount makes an int64 copy of its input
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
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
    """Write a dataset artifact: two arrays per split, `dataset.json` and, last, the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in dataset.splits.items():
        np.save(folder / f"{name}.images.npy", split.images)
        np.save(folder / f"{name}.labels.npy", split.labels.astype(np.int64))
    (folder / "dataset.json").write_text(dataset.info.model_dump_json(indent=1) + "\n")
    write_manifest(folder, kind="dataset")


def load_dataset(folder: Path) -> Dataset:
    """Open a dataset artifact; arrays are memory-mapped.

    Raises:
        UserError: the folder does not hold a complete dataset.
    """
    read_folder(folder, kind="dataset")
    try:
        return _read_dataset(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not hold a dataset that this version of scop can read: {error}") from error


def _read_dataset(folder: Path) -> Dataset:
    info = DatasetInfo.model_validate_json((folder / "dataset.json").read_text())
    splits: dict[SplitName, Split] = {
        name: Split(
            np.load(folder / f"{name}.images.npy", mmap_mode="c", allow_pickle=False),
            np.load(folder / f"{name}.labels.npy", mmap_mode="c", allow_pickle=False),
        )
        for name in SPLITS
    }
    return Dataset(info, splits)
