"""Batches: order, augmentation, limits and shards."""

import numpy as np
import pytest
import torch

from scop import UserError
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, Split, make_dataset

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat"]


def ramp(count: int = 12, channels: int = 2, size: int = 6) -> tuple[Dataset, np.ndarray]:
    images = np.arange(count * channels * size * size, dtype=np.int64).reshape(count, channels, size, size)
    images = (images % 251).astype(np.uint8)
    labels = np.arange(count, dtype=np.int64) % 3
    dataset = make_dataset("ramp", CLASSES, Split(images, labels), Split(images, labels))
    return dataset, images


def pixels(batch: torch.Tensor, dataset: Dataset) -> np.ndarray:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (dataset.info.mean, dataset.info.std))
    return ((batch * std + mean) * 255).round().to(torch.uint8).numpy()


def test_evaluation_yields_all_normalised_images_in_order() -> None:
    dataset, images = ramp()
    loaded = list(Batches(dataset["test"], dataset.info, 5, CPU))
    assert [len(labels) for _, labels in loaded] == [5, 5, 2]
    assert np.array_equal(np.concatenate([pixels(batch, dataset) for batch, _ in loaded]), images)


def test_augmentation_flips_and_crops_with_reflected_padding() -> None:
    dataset, images = ramp()
    pad = 2
    batches = Batches(dataset["train"], dataset.info, 12, CPU, Augmentation(crop_padding=pad, flip=True), seed=3)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
    views = {}
    for number in range(len(images)):
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                view = padded[number, :, top : top + 6, left : left + 6]
                views[view.tobytes()] = (number, top, left, False)
                views[np.ascontiguousarray(view[:, :, ::-1]).tobytes()] = (number, top, left, True)
    seen = []
    for _ in range(5):
        for batch, labels in batches:
            assert batch.is_contiguous(memory_format=torch.channels_last)
            for view, label in zip(pixels(batch, dataset), labels, strict=True):
                number, *change = views[np.ascontiguousarray(view).tobytes()]
                assert dataset["train"].labels[number] == label
                seen.append((number, *change))
    assert {number for number, *_ in seen} == set(range(12))
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert {top for _, top, _, _ in seen} == set(range(5))


def test_order_depends_only_on_seed_and_epoch() -> None:
    dataset, _ = ramp()

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(dataset["train"], dataset.info, 4, CPU, Augmentation(), seed=seed)
        batches.set_epoch(epoch)
        return [int(image.sum() * 1e4) for batch, _ in batches for image in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert sorted(order(0, 1)) == sorted(order(5, 7))


def test_rejects_fewer_images_than_a_batch() -> None:
    dataset, _ = ramp()
    with pytest.raises(UserError, match="12 training images are fewer than a batch: batch_size is 13"):
        Batches(dataset["train"], dataset.info, 13, CPU, Augmentation())


def test_rejects_padding_wider_than_the_image() -> None:
    dataset, _ = ramp()
    with pytest.raises(UserError, match="crop_padding 6 must be below the image's 6 pixels"):
        Batches(dataset["train"], dataset.info, 4, CPU, Augmentation(crop_padding=6))


def test_shards_partition_each_batch(digits: Dataset) -> None:
    def batches(share: tuple[int, int]) -> Batches:
        augmentation = Augmentation(crop_padding=1, flip=True)
        return Batches(digits["train"], digits.info, 60, torch.device("cpu"), augmentation, shard=share)

    for whole, *parts in zip(batches((0, 1)), *(batches((rank, 3)) for rank in range(3)), strict=True):
        assert torch.equal(torch.cat([images for images, _ in parts]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), whole[1])


def test_evaluation_shards_cover_every_image_once(digits: Dataset) -> None:
    split = digits["validation"]
    shares = [Batches(split, digits.info, 50, torch.device("cpu"), shard=(rank, 3)) for rank in range(3)]
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert len(labels) == len(split)
    assert torch.equal(labels.bincount(), torch.from_numpy(split.labels).bincount())
