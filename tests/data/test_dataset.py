"""The dataset artifact: splits, statistics, saving and loading."""

from pathlib import Path

import numpy as np
import pytest

from scop import UserError
from scop.config import DataSection
from scop.data.dataset import Dataset, load_dataset, save_dataset
from scop.data.sources import load_source
from scop.storage.manifest import MANIFEST


def test_digits_splits_are_stratified(digits: Dataset) -> None:
    assert digits.info.counts == {"train": 1295, "validation": 142, "test": 360}
    assert digits.info.shape == (1, 8, 8)
    for split in ("train", "validation", "test"):
        shares = np.bincount(digits[split].labels) / len(digits[split])
        assert shares.min() > 0.08
        assert shares.max() < 0.12


def test_validation_split_depends_on_the_seed_and_is_disjoint() -> None:
    first, again, other = (load_source(DataSection(seed=seed)) for seed in (0, 0, 1))
    assert first.info.content == again.info.content != other.info.content
    count = sum(len(first[split]) for split in ("train", "validation"))
    rows = np.concatenate([first["train"].images, first["validation"].images]).reshape(count, -1)
    whole = load_source(DataSection(validation=0))["train"].images.reshape(count, -1)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole))


def test_statistics_come_from_the_training_split(digits: Dataset) -> None:
    pixels = digits["train"].images / 255
    assert digits.info.mean == pytest.approx([pixels.mean()], abs=1e-5)
    assert digits.info.std == pytest.approx([pixels.std()], abs=1e-5)


def test_dataset_survives_saving_and_loading(digits: Dataset, tmp_path: Path) -> None:
    save_dataset(digits, tmp_path / "copy")
    copy = load_dataset(tmp_path / "copy")
    assert copy.info == digits.info
    assert np.array_equal(copy["test"].images, digits["test"].images)


def test_rejects_an_unfinished_or_damaged_dataset(digits: Dataset, tmp_path: Path) -> None:
    save_dataset(digits, tmp_path)
    labels = tmp_path / "test.labels.npy"
    content = bytearray(labels.read_bytes())
    content[-1] ^= 1
    labels.write_bytes(content)
    with pytest.raises(UserError, match="test.labels.npy does not match manifest.json"):
        load_dataset(tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match="test.labels.npy is missing"):
        load_dataset(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match="has no manifest.json, so it is unfinished"):
        load_dataset(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")
