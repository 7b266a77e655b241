"""How good knockoffs are: whether swapping them in would be noticed, and what they still say about the originals.

Knockoffs are valid where the pair (x, x~) has the same distribution after any set of coordinates was swapped between
the two (exchangeability; Candès et al., 2018, definition 3.1), and where x~ says nothing about the label that x does
not. They are powerful where x~ is unlike x. Each part of that is measured. Which coordinates are swapped matters:
another image altogether passes in principal components, which are uncorrelated, and not in pixels, of which each is
missed by its neighbours. So swaps are tried in both.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.compute.device import autocast, autocast_dtype, to_device
from scop.knockoffs.sources import KnockoffSource
from scop.training.loop import TrainingBatches

_COMPONENTS = 32
_SHRUNK = 4
_PAIRS = 1500
_PERMUTATIONS = 999


@dataclass(frozen=True)
class TwoSamples:
    """A test of whether two samples come from one distribution.

    Attributes:
        statistic: the energy distance between them (Székely and Rizzo, 2013), 0 for the same distribution.
        p: the share of random exchanges with as large a statistic; small where the samples differ.
    """

    statistic: float
    p: float


@dataclass(frozen=True)
class Quality:
    """What is known of a source's knockoffs.

    Attributes:
        pairs: so many were looked at.
        swap_all: of pairs against pairs in which everything was swapped.
        swap_half: the same, a random half of the principal components swapped.
        swap_pixels: the same of images shrunk to 4x4, a random half of their pixels swapped.
        correlation: of originals and knockoffs, the mean of the absolute values over principal components.
        correlation_expected: what that would be for independent ones.
        label_agreement: the share of knockoffs that the dense network takes for the class of the original.
        label_agreement_expected: what that would be if they were independent.
        label_p: the share of permutations of the labels with as large an agreement; small where knockoffs tell classes.
    """

    pairs: int
    swap_all: TwoSamples
    swap_half: TwoSamples
    swap_pixels: TwoSamples
    correlation: float
    correlation_expected: float
    label_agreement: float
    label_agreement_expected: float
    label_p: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """For MLflow, flat."""
        return {
            "knockoff_swap_all_p": self.swap_all.p,
            "knockoff_swap_half_p": self.swap_half.p,
            "knockoff_swap_pixels_p": self.swap_pixels.p,
            "knockoff_correlation": self.correlation,
            "knockoff_label_agreement": self.label_agreement,
            "knockoff_label_agreement_expected": self.label_agreement_expected,
        }


@torch.no_grad()
def measure_quality(
    source: KnockoffSource, model: nn.Module, batches: TrainingBatches, device: torch.device, seed: int = 0
) -> Quality:
    """Look at a source's knockoffs of up to 1,500 images.

    Args:
        source: makes knockoffs.
        model: the dense network, on the device and in eval mode.
        batches: (images, labels), images as the network takes them.
        device: where to compute.
        seed: of the samples drawn; the source draws from torch's own generators.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = autocast_dtype(device, "auto")
    real, knock, truth, answers = [], [], [], []
    seen: set[int] = set()
    for images, labels in batches:
        images, labels = to_device(images, labels, device)
        knockoffs = source(images, labels)
        with autocast(device, dtype):
            answer = model(knockoffs).argmax(1).cpu()
        images, knockoffs = images.float().cpu(), knockoffs.float().cpu()
        chosen = _new_pairs(images, knockoffs, seen)
        real.append(images[chosen])
        knock.append(knockoffs[chosen])
        truth.append(labels.cpu()[chosen])
        answers.append(answer[chosen])
        if sum(map(len, real)) >= _PAIRS:
            break
    originals, copies = torch.cat(real)[:_PAIRS], torch.cat(knock)[:_PAIRS]
    labels, predicted = torch.cat(truth)[:_PAIRS], torch.cat(answers)[:_PAIRS]
    z, z_knock = _components(originals.flatten(1), copies.flatten(1), generator)
    small, small_knock = _shrunk(originals, copies)
    agreement, expected, p = _agreement(labels, predicted, generator)
    return Quality(
        pairs=len(z),
        swap_all=swap_test(z, z_knock, torch.ones(z.shape[1], dtype=torch.bool), generator),
        swap_half=swap_test(z, z_knock, _half(z.shape[1], generator), generator),
        swap_pixels=swap_test(small, small_knock, _half(small.shape[1], generator), generator),
        correlation=float(_correlation(z, z_knock).abs().mean()),
        # Of independent samples a correlation has the standard deviation 1 / sqrt(n), and is about normal.
        correlation_expected=math.sqrt(2 / math.pi / len(z)),
        label_agreement=agreement,
        label_agreement_expected=expected,
        label_p=p,
    )


def _new_pairs(images: Tensor, knockoffs: Tensor, seen: set[int]) -> list[int]:
    """The places of pairs of which neither image is in the sample yet, as itself or as a knockoff.

    An image that is there twice makes the parts of the sample look more alike than they are. All, where each image is
    its own knockoff.
    """
    chosen = []
    for place, pair in enumerate(zip(images, knockoffs, strict=True)):
        hashes = {hash(image.numpy().tobytes()) for image in pair}
        if len(hashes) == 2 and not hashes & seen:
            seen |= hashes
            chosen.append(place)
    return chosen or list(range(len(images)))


# Scales and bases are those of both samples together: if they were those of the originals, the knockoffs alone would
# be strangers to them, however good.


def _components(real: Tensor, knock: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both as coordinates of unit variance: (n, D) -> (n, K)."""
    both = torch.cat([real, knock])
    mean, rank = both.mean(0), min(_COMPONENTS, len(both) - 1, both.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        _, singular, basis = torch.pca_lowrank(both - mean, rank, center=False, niter=4)
    scale = math.sqrt(len(both)) / singular.clamp_min(1e-6 * float(singular[0]))
    return (real - mean) @ basis * scale, (knock - mean) @ basis * scale


def _shrunk(real: Tensor, knock: Tensor) -> tuple[Tensor, Tensor]:
    """Both at 4x4 pixels, each pixel of unit variance: (n, C, H, W) -> (n, C * 16)."""
    small, small_knock = (F.adaptive_avg_pool2d(images, _SHRUNK).flatten(1) for images in (real, knock))
    both = torch.cat([small, small_knock])
    mean, deviation = both.mean(0), both.std(0).clamp_min(1e-6)
    return (small - mean) / deviation, (small_knock - mean) / deviation


def _half(count: int, generator: torch.Generator) -> Tensor:
    """A random half, bool (count,)."""
    return torch.rand(count, generator=generator).argsort() < count / 2


def swap_test(z: Tensor, z_knock: Tensor, swap: Tensor, generator: torch.Generator) -> TwoSamples:
    """Whether pairs would notice that some of their coordinates were swapped.

    The statistic is the energy distance of the pairs from the pairs swapped, ``2 E|P - Q| - E|P - P'| - E|Q - Q'|``.
    If nobody can tell the two apart, neither can anybody tell which of a pair's two versions went into which sample;
    so the two are exchanged at random, pair by pair, which gives the statistic's distribution.

    Args:
        z, z_knock: (n, K).
        swap: which coordinates, bool (K,).
        generator: draws the exchanges.
    """
    pairs = torch.cat([z, z_knock], 1)
    swapped = torch.cat([torch.where(swap, z_knock, z), torch.where(swap, z, z_knock)], 1)
    both = torch.cat([pairs, swapped])
    distances = torch.cdist(both, both)
    signs = torch.randint(2, (1 + _PERMUTATIONS, len(z)), generator=generator) * 2.0 - 1
    signs[0] = 1  # as it is
    # With a the signed weights of the samples, the statistic is -a' D a.
    weights = torch.cat([signs, -signs], 1) / len(z)
    statistics = -((weights @ distances) * weights).sum(1)
    # Samples that are alike have statistics of 0, but for rounding, which must not decide.
    rounding = 1e-6 * float(distances.mean())
    as_large = int((statistics[1:] >= statistics[0] - rounding).sum())
    return TwoSamples(float(statistics[0]), (1 + as_large) / (1 + _PERMUTATIONS))


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Column by column: (n, K), (n, K) -> (K,)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0)).clamp_min(1e-12)


def _agreement(labels: Tensor, predicted: Tensor, generator: torch.Generator) -> tuple[float, float, float]:
    """Share of predictions that equal the label, what chance would give, and a permutation p-value."""
    observed = float((labels == predicted).double().mean())
    by_chance = torch.tensor(
        [
            float((labels[torch.randperm(len(labels), generator=generator)] == predicted).double().mean())
            for _ in range(_PERMUTATIONS)
        ]
    )
    p = (1 + int((by_chance >= observed).sum())) / (1 + _PERMUTATIONS)
    return observed, float(by_chance.mean()), p
