"""The dataset artifact: small images as one uint8 array per split, memory-mapped from disk.

Batches are made of it by `scop.data.batches`; this module knows no torch, so that preparing data need not wait for it.
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
        train, validation = cut(train, validation, seed, classes)
    splits: dict[SplitName, Split] = {"train": train, "validation": validation, "test": test}
    for name, split in splits.items():
        missing = sorted(set(range(len(classes))) - set(np.unique(split.labels).tolist()))
        if missing and len(split):
            raise UserError(f"{source}: class {classes[missing[0]]!r} has no image in split {name!r}")
    channels = train.images.shape[1]
    for key, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise UserError(f"data.{key} has {len(given)} entries, but the images have {channels} channels")
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
    """Cut the given fraction of each class off: what stays, and what was cut, both in the order of the images."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(train), dtype=bool)
    for label in range(len(classes)):
        members = np.flatnonzero(train.labels == label)
        # At least one image of each class in both parts, however small the class.
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) if fraction else 0
        chosen[generator.permutation(members)[: max(count, 0)]] = True
    if not chosen.any():
        return train, Split(train.images[:0], train.labels[:0])
    return (Split(train.images[~chosen], train.labels[~chosen]), Split(train.images[chosen], train.labels[chosen]))


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1], exactly, from the histogram of the 256 values."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):  # bincount makes an int64 copy of what it counts
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
    try:
        return _read_dataset(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no dataset that this version can read: {error}") from error


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
