"""Batches of small images, stored on the training device and assembled at almost no cost.

The split is stored as uint8. A batch is one gather, which crops, flips and reflects by index arithmetic, and a
normalisation; there are no worker processes. The design follows airbench (Keller Jordan, 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scop.compute.distributed import WHOLE, Shard
from scop.data.dataset import DatasetInfo, Split
from scop.errors import UserError


class Augmentation(BaseModel):
    """Random changes to training images.

    Attributes:
        crop_padding: maximum shift in each direction, in pixels; the border is reflected.
        flip: mirror half of the images left to right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_padding: int = Field(default=0, ge=0)
    flip: bool = False


class Batches:
    """Batches of a split, resident on a device.

    Iterating yields (images, labels): images float (B, C, H, W), normalised, in channels-last memory format; labels
    int64 (B,). With an augmentation each epoch is shuffled and an incomplete last batch is dropped. Order and
    augmentation depend only on seed and epoch: a resumed training run sees the same images as an uninterrupted one, and
    several processes together see the same images as one.

    Args:
        split: the images.
        info: the dataset's description, for mean and standard deviation.
        batch_size: images in a batch, over all processes.
        device: where images are stored and batches are computed.
        augmentation: for training; None yields all images in order.
        seed: seed of order and augmentation.
        shard: this process's part of each batch; without augmentation, every n-th image.

    Raises:
        UserError: fewer training images than a batch, padding as wide as the image, or shards of unequal size.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shard: Shard = WHOLE,
    ) -> None:
        if augmentation is not None and len(split) < batch_size:
            raise UserError(f"{len(split)} training images are fewer than a batch: batch_size is {batch_size}")
        rank, shards = shard
        if augmentation is not None and batch_size % shards:
            raise UserError(
                f"batch_size {batch_size} cannot be divided among {shards} processes; use a multiple of {shards}"
            )
        smallest = min(split.images.shape[2:])
        if augmentation is not None and augmentation.crop_padding >= smallest:
            raise UserError(f"crop_padding {augmentation.crop_padding} must be below the image's {smallest} pixels")
        # Training draws from all images, whatever its shard of the batch; evaluation reads its shard in order.
        images, labels = (
            (split.images, split.labels)
            if augmentation is not None
            else (split.images[rank::shards], split.labels[rank::shards])
        )
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self._own = slice(rank * batch_size // shards, (rank + 1) * batch_size // shards)
        self.batch_size, self.device, self.augmentation, self.seed = batch_size, device, augmentation, seed
        # Pixels are scaled and normalised in one operation: the division by 255 is part of mean and deviation.
        self._mean = torch.tensor(info.mean, device=device).view(1, -1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(info.std, device=device).view(1, -1, 1, 1) * 255)
        self.input_shape = tuple(split.images.shape[1:])
        self.epoch = 0

    def __len__(self) -> int:
        if self.augmentation is not None:
            return len(self.labels) // self.batch_size
        return -(-len(self.labels) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; by default each iteration is the next epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.augmentation is None:
            for start in range(0, len(self.labels), self.batch_size):
                part = slice(start, start + self.batch_size)
                yield self._normalise(self.images[part]), self.labels[part]
            return
        order, shift, flipped = self._drawn(self.augmentation)
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            own = slice(start + self._own.start, start + self._own.stop)
            images = self._gathered(self.augmentation, order[own], shift[own], flipped[own])
            yield self._normalise(images), self.labels[order[own]]

    def _drawn(self, augmentation: Augmentation) -> tuple[Tensor, Tensor, Tensor]:
        """Return an epoch's random numbers: order of the images (N,), shifts (N, 2), and flips (N,).

        They are drawn at once, so that a GPU does not wait within the epoch, and for all processes, so that they do not
        depend on the number of processes.
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        count, pad = len(self.labels), augmentation.crop_padding
        order = torch.randperm(count, generator=generator)
        shift = torch.randint(-pad, pad + 1, (count, 2), generator=generator)
        flipped = torch.rand(count, generator=generator) < (0.5 if augmentation.flip else 0.0)
        return order.to(self.device), shift.to(self.device), flipped.to(self.device)

    def _gathered(self, augmentation: Augmentation, chosen: Tensor, shift: Tensor, flipped: Tensor) -> Tensor:
        """Return images (B,) of the split, shifted by (B, 2) and flipped by (B,), in one gather: uint8 (B, C, H, W)."""
        if not augmentation.crop_padding and not augmentation.flip:
            return self.images[chosen]
        _, height, width = self.input_shape
        rows = _reflect(torch.arange(height, device=self.device) + shift[:, :1], height)
        columns = _reflect(torch.arange(width, device=self.device) + shift[:, 1:], width)
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
        # Indices around a slice put the channels last: (B, H, W, C), which is the desired memory format.
        return self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _normalise(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        return floats.sub_(self._mean).mul_(self._scale)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Map indices in (-size, 2 * size - 1) to [0, size) by reflection at the outermost pixels."""
    return (size - 1 - (size - 1 - index.abs()).abs()).abs()


def _mix(seed: int, epoch: int) -> int:
    """Combine two numbers into one seed, so that neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")
