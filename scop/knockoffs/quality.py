"""Quality of knockoffs: whether swaps with the originals can be detected, and what they reveal about the originals.

Knockoffs are valid if swapping any set of coordinates between x and x~ leaves the distribution of the pair unchanged
(exchangeability; Candès et al., 2018, definition 3.1), and if x~ carries no information about the label that x does not
carry. They are powerful if x~ is unlike x. Each of these properties is measured. The choice of swapped coordinates
matters: if x~ is a different image, swaps of principal components, which are uncorrelated, go undetected, but swaps of
pixels, which correlate with their neighbours, do not. So both are tested.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.compute.device import autocast, autocast_dtype, to_device
from scop.compute.random_state import private_random_state
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
        statistic: energy distance between the samples (Székely and Rizzo, 2013); 0 for the same distribution.
        p: permutation p-value: the share of random exchanges with a statistic at least as large.
    """

    statistic: float
    p: float


@dataclass(frozen=True)
class Quality:
    """Measured quality of a source's knockoffs.

    Attributes:
        pairs: number of pairs of original and knockoff in the sample.
        swap_all: test of the pairs against the pairs with all principal components swapped.
        swap_half: the same test with a random half of the principal components swapped.
        swap_pixels: the same test on images shrunk to 4x4, with a random half of the pixels swapped.
        correlation: mean absolute correlation between originals and knockoffs, over principal components.
        correlation_expected: expected value of this for independent images.
        label_agreement: share of knockoffs for which the dense network predicts the original's label.
        label_agreement_expected: expected value of this for knockoffs that are independent of the label.
        label_p: permutation p-value of the label agreement; small if knockoffs reveal the label.
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
        """Return a nested dict for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return a flat dict for MLflow."""
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
    """Measure the quality of a source's knockoffs on up to 1,500 images.

    Args:
        source: returns knockoffs.
        model: the dense network, on the device and in eval mode.
        batches: (images, labels), images normalised for the network.
        device: device to compute on.
        seed: seed of the tests; the source itself uses PyTorch's global generators.
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
        # The correlation of independent samples is about normal, with standard deviation 1 / sqrt(n).
        correlation_expected=math.sqrt(2 / math.pi / len(z)),
        label_agreement=agreement,
        label_agreement_expected=expected,
        label_p=p,
    )


def _new_pairs(images: Tensor, knockoffs: Tensor, seen: set[int]) -> list[int]:
    """Return the indices of the pairs whose images are not in the sample yet, neither as original nor as knockoff.

    A repeated image would make parts of the sample look more alike than they are. If no pair is new, for example if
    each image is its own knockoff, all indices are returned.
    """
    chosen = []
    for index, pair in enumerate(zip(images, knockoffs, strict=True)):
        hashes = {hash(image.numpy().tobytes()) for image in pair}
        if len(hashes) == 2 and not hashes & seen:
            seen |= hashes
            chosen.append(index)
    return chosen or list(range(len(images)))


# Scales and bases are computed from both samples together. Computed from the originals alone, they would describe the
# originals better than the knockoffs, however good the knockoffs are.


def _components(real: Tensor, knock: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return both samples as principal components of unit variance: (n, D) -> (n, K)."""
    both = torch.cat([real, knock])
    mean, rank = both.mean(0), min(_COMPONENTS, len(both) - 1, both.shape[1])
    with private_random_state(int(torch.randint(2**31, (), generator=generator))):
        _, singular, basis = torch.pca_lowrank(both - mean, rank, center=False, niter=4)
    scale = math.sqrt(len(both)) / singular.clamp_min(1e-6 * float(singular[0]))
    return (real - mean) @ basis * scale, (knock - mean) @ basis * scale


def _shrunk(real: Tensor, knock: Tensor) -> tuple[Tensor, Tensor]:
    """Return both samples at 4x4 pixels, each pixel with unit variance: (n, C, H, W) -> (n, C * 16)."""
    small, small_knock = (F.adaptive_avg_pool2d(images, _SHRUNK).flatten(1) for images in (real, knock))
    both = torch.cat([small, small_knock])
    mean, deviation = both.mean(0), both.std(0).clamp_min(1e-6)
    return (small - mean) / deviation, (small_knock - mean) / deviation


def _half(count: int, generator: torch.Generator) -> Tensor:
    """Return a mask of a random half, bool (count,)."""
    return torch.rand(count, generator=generator).argsort() < count / 2


def swap_test(z: Tensor, z_knock: Tensor, swap: Tensor, generator: torch.Generator) -> TwoSamples:
    """Test whether swapping some coordinates within pairs changes their distribution.

    The statistic is the energy distance between pairs and swapped pairs, ``2 E|P - Q| - E|P - P'| - E|Q - Q'|``. If
    the distributions are equal, a pair and its swapped version can be exchanged between the two samples. Random
    exchanges, pair by pair, give the distribution of the statistic.

    Args:
        z, z_knock: originals and knockoffs (n, K).
        swap: coordinates to swap, bool (K,).
        generator: source of the random exchanges.
    """
    pairs = torch.cat([z, z_knock], 1)
    swapped = torch.cat([torch.where(swap, z_knock, z), torch.where(swap, z, z_knock)], 1)
    both = torch.cat([pairs, swapped])
    distances = torch.cdist(both, both)
    signs = torch.randint(2, (1 + _PERMUTATIONS, len(z)), generator=generator) * 2.0 - 1
    signs[0] = 1  # the observed samples
    # With signed weights a of the samples and distances D, the statistic is -a' D a.
    weights = torch.cat([signs, -signs], 1) / len(z)
    statistics = -((weights @ distances) * weights).sum(1)
    # Identical samples have statistics of 0 up to rounding errors, which must not decide.
    rounding = 1e-6 * float(distances.mean())
    as_large = int((statistics[1:] >= statistics[0] - rounding).sum())
    return TwoSamples(float(statistics[0]), (1 + as_large) / (1 + _PERMUTATIONS))


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the correlation of each column: (n, K), (n, K) -> (K,)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0)).clamp_min(1e-12)


def _agreement(labels: Tensor, predicted: Tensor, generator: torch.Generator) -> tuple[float, float, float]:
    """Return the share of predictions that equal the label, its mean over permutations, and a permutation p-value."""
    observed = float((labels == predicted).double().mean())
    by_chance = torch.tensor(
        [
            float((labels[torch.randperm(len(labels), generator=generator)] == predicted).double().mean())
            for _ in range(_PERMUTATIONS)
        ]
    )
    p = (1 + int((by_chance >= observed).sum())) / (1 + _PERMUTATIONS)
    return observed, float(by_chance.mean()), p
