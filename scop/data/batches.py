"""Batches of small images, resident on the training device, that cost next to nothing.

The split lives on the device as uint8. A batch is one gather that crops, flips and reflects by index arithmetic, then a
normalisation; there are no worker processes. The layout follows airbench (Keller Jordan, 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scop.compute.distributed import WHOLE, Share
from scop.data.dataset import DatasetInfo, Split
from scop.errors import UserError


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
    order and the changes depend on seed and epoch alone, so training that is resumed sees what it would have seen, and
    several processes see together what one would have seen.

    Args:
        split: the images.
        info: the dataset's description, for mean and standard deviation.
        batch_size: images in a batch, all shares together.
        device: where images are kept and batches made.
        augmentation: for training; None gives the images in their order, all of them.
        seed: of order and augmentation.
        share: of each batch, that is this process's; without augmentation every so-manieth image.

    Raises:
        UserError: fewer training images than a batch, padding as wide as the image, or shares of unequal size.
    """

    def __init__(
        self,
        split: Split,
        info: DatasetInfo,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        share: Share = WHOLE,
    ) -> None:
        if augmentation is not None and len(split) < batch_size:
            raise UserError(f"{len(split)} training images are fewer than a batch: batch_size is {batch_size}")
        rank, shares = share
        if augmentation is not None and batch_size % shares:
            raise UserError(f"batch_size {batch_size} cannot be shared by {shares} processes; take a multiple of them")
        smallest = min(split.images.shape[2:])
        if augmentation is not None and augmentation.crop_padding >= smallest:
            raise UserError(f"crop_padding {augmentation.crop_padding} must be below the image's {smallest} pixels")
        # Training draws from all images, whatever its share of the batch; measuring goes through the share in order.
        images, labels = (
            (split.images, split.labels)
            if augmentation is not None
            else (split.images[rank::shares], split.labels[rank::shares])
        )
        self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self._own = slice(rank * batch_size // shares, (rank + 1) * batch_size // shares)
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
        order, shift, flipped = self._drawn(self.augmentation)
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            own = slice(start + self._own.start, start + self._own.stop)
            images = self._gathered(self.augmentation, order[own], shift[own], flipped[own])
            yield self._normalise(images), self.labels[order[own]]

    def _drawn(self, augmentation: Augmentation) -> tuple[Tensor, Tensor, Tensor]:
        """An epoch's random numbers: the order of its images (N,), their shifts (N, 2), and which are flipped (N,).

        All at once, so that a GPU waits for nothing within the epoch; and of every share, so that they are the same
        however many there are.
        """
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        count, pad = len(self.labels), augmentation.crop_padding
        order = torch.randperm(count, generator=generator)
        shift = torch.randint(-pad, pad + 1, (count, 2), generator=generator)
        flipped = torch.rand(count, generator=generator) < (0.5 if augmentation.flip else 0.0)
        return order.to(self.device), shift.to(self.device), flipped.to(self.device)

    def _gathered(self, augmentation: Augmentation, chosen: Tensor, shift: Tensor, flipped: Tensor) -> Tensor:
        """Images (B,) of the split, shifted (B, 2) and flipped (B,), by one gather: uint8 (B, C, H, W)."""
        if not augmentation.crop_padding and not augmentation.flip:
            return self.images[chosen]
        _, height, width = self.input_shape
        rows = _reflect(torch.arange(height, device=self.device) + shift[:, :1], height)
        columns = _reflect(torch.arange(width, device=self.device) + shift[:, 1:], width)
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
        # Indices around a slice put the channels last: (B, H, W, C), which is the memory format wanted anyway.
        return self.images[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _normalise(self, images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=torch.channels_last)
        return floats.sub_(self._mean).mul_(self._scale)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Bring indices in (-size, 2 * size - 1) back into [0, size) as by a mirror at the outermost pixels."""
    return (size - 1 - (size - 1 - index.abs()).abs()).abs()


def _mix(seed: int, epoch: int) -> int:
    """One generator seed of two numbers, such that neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:7], "big")
