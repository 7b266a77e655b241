"""A small generative model of images, for knockoffs: flow matching (Lipman et al., 2023, arXiv 2210.02747).

A network learns the velocity with which noise becomes an image along a straight line,

    x_t = (1 - t) noise + t image,   v(x_t, t) ~ E[image - noise | x_t],

and images are drawn by following it from t = 0 to 1. Unlike a GAN's, its loss goes down while it gets better, and two
networks need not be kept in balance. Many images are drawn once, when it is trained; making a batch of knockoffs then
costs one lookup.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.compute import distributed
from scop.compute.device import autocast, autocast_dtype, to_device
from scop.config import GeneratorSection, KnockoffSection
from scop.system.progress import progress
from scop.training.loop import CheckpointStore, TrainingBatches, fit

_LARGEST = 32
"""Pixels of height and width; larger images are generated at this size and enlarged."""
_DRAWN_AT_ONCE = 256


def train_generator(
    batches: TrainingBatches,
    section: KnockoffSection,
    device: torch.device,
    checkpoints: CheckpointStore | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Train a generator on images and draw from it.

    Args:
        batches: (images, labels), images (B, C, H, W) as the network takes them; labels are not looked at.
        section: of the knockoff phase; its subsection `generator` has the settings.
        device: where to compute.
        checkpoints, stopping: see `scop.training.loop.fit`.

    Returns:
        Images (N, C, H, W), on the device.
    """
    settings = section.generator
    shape = next(iter(batches))[0].shape[1:]
    matching = FlowMatching(shape, settings, device, autocast_dtype(device, section.precision), section.seed)
    fit(
        matching,
        batches,
        torch.optim.AdamW(matching.state.parameters(), lr=settings.lr, weight_decay=0.0),
        epochs=settings.epochs,
        label="generator",
        seed=section.seed,
        schedule="cosine",
        warmup_epochs=min(0.5, settings.epochs / 2),
        checkpoints=checkpoints,
        stopping=stopping,
    )
    return matching.draw(settings.images, settings.steps, section.seed)


class FlowMatching:
    """The objective: the squared error of the velocity, at times uniform in [0, 1].

    Args:
        shape: (C, H, W) of an image.
        settings: of the generator.
        device: where to compute.
        dtype: of convolutions.
        seed: of the initial weights.
    """

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        settings: GeneratorSection,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        channels, height, width = shape
        shrink = min(1.0, _LARGEST / max(height, width))
        self._shape = (channels, height, width)
        self._size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        self.device, self.dtype = device, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._velocity = Velocity(channels, settings.width, *_levels_and_patch(self._size))
        self._velocity.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = distributed.parallel(self._velocity, device)

    @property
    def state(self) -> nn.Module:
        return self._velocity

    def start_epoch(self, epoch: int) -> None:
        self._velocity.train()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        images, labels = to_device(images, labels, self.device)
        if images.shape[2:] != self._size:
            images = F.interpolate(images, self._size, mode="bilinear", antialias=True)
        noise = torch.randn_like(images)
        time = torch.rand(len(images), device=self.device)
        place = torch.lerp(noise, images, time[:, None, None, None])
        with autocast(self.device, self.dtype):
            velocity = self._network(place, time)
        return F.mse_loss(velocity.float(), images - noise), None

    def after_step(self) -> None:
        pass

    @torch.no_grad()
    def draw(self, count: int, steps: int, seed: int = 0) -> Tensor:
        """Follow the velocity by Heun's method: images (count, C, H, W), on the device."""
        self._velocity.eval()
        generator = torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        with progress(-(-count // _DRAWN_AT_ONCE), "drawing knockoffs") as bar:
            for start in range(0, count, _DRAWN_AT_ONCE):
                size = min(_DRAWN_AT_ONCE, count - start)
                x = torch.randn(size, self._shape[0], *self._size, generator=generator).to(
                    self.device, memory_format=torch.channels_last
                )
                for step in range(steps):
                    now, then = step / steps, (step + 1) / steps
                    first = self._at(x, now)
                    second = self._at(x + first / steps, then) if step + 1 < steps else first
                    x = x + (first + second) / (2 * steps)
                if x.shape[2:] != self._shape[1:]:
                    x = F.interpolate(x, self._shape[1:], mode="bilinear")
                found.append(x)
                bar.update(1)
        return torch.cat(found)

    def _at(self, x: Tensor, time: float) -> Tensor:
        with autocast(self.device, self.dtype):
            velocity: Tensor = self._velocity(x, x.new_full((len(x),), time))
        return velocity.float()


def _levels_and_patch(size: tuple[int, int]) -> tuple[int, int]:
    """How often the network may halve its first level, at most twice and down to 4 pixels; and the patch."""
    patch = 2 if min(size) >= 16 and not any(side % 2 for side in size) else 1
    return max(0, min(2, int(math.log2(max(1, min(size) / patch / 4))))), patch


class Velocity(nn.Module):
    """A small U-Net (Ronneberger et al., 2015) that knows the time.

    Args:
        channels: of an image.
        width: channels of the first level; each level doubles them.
        levels: how often the first level is halved.
        patch: the first level has a pixel for each square of so many of the image's, which costs a quarter at 2.

    Shape:
        images (B, C, H, W), times (B,) in [0, 1] -> velocities (B, C, H, W).
    """

    def __init__(self, channels: int, width: int, levels: int, patch: int = 1) -> None:
        super().__init__()
        self.patch = patch
        widths = [width * 2**level for level in range(levels + 1)]
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.first = nn.Conv2d(channels * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList(_Block(w, w, 4 * width) for w in widths)
        self.halve = nn.ModuleList(nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:-1])
        self.up = nn.ModuleList(_Block(3 * w, w, 4 * width) for w in reversed(widths[:-1]))
        self.last = nn.Sequential(nn.GroupNorm(_groups(width), width), nn.SiLU())
        self.out = nn.Conv2d(width, channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        time = self.time(_waves(times, self.first.out_channels))
        x, kept = self.first(F.pixel_unshuffle(images, self.patch)), []
        for level, block in enumerate(self.down):
            x = block(x, time)
            if level < len(self.halve):
                kept.append(x)
                x = self.halve[level](x)
        for block in self.up:
            skipped = kept.pop()
            x = block(torch.cat([F.interpolate(x, skipped.shape[2:]), skipped], 1), time)
        return F.pixel_shuffle(self.out(self.last(x)), self.patch)


class _Block(nn.Module):
    """Two convolutions with a shortcut; the time enters between them.

    Shape:
        (B, C, H, W), (B, T) -> (B, C', H, W).
    """

    def __init__(self, into: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(_groups(into), into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(_groups(out), out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.shortcut = nn.Identity() if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        result: Tensor = self.shortcut(x) + h
        return result


def _groups(channels: int) -> int:
    return math.gcd(channels, 8)


def _waves(times: Tensor, width: int) -> Tensor:
    """Times (B,) as sines and cosines of `width` // 2 frequencies (Vaswani et al., 2017): (B, width)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), width // 2, device=times.device))
    angles = times[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
