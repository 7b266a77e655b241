"""The number of channels that each layer keeps at a given pruning strength.

`uniform` removes the same fraction of each layer. `global` removes the channels with the lowest value in the whole
network, see `Candidate.values`; under a budget, those with the lowest value per unit of cost. (Removing the least value
for a given cost is a knapsack problem; taking items in order of this ratio solves it except for the last item.)
`knockoff_plus` removes the channels that the knockoff filter does not keep; under a budget, those with W below a
threshold.

Every strategy has a strength in [0, 1), and a higher strength gives a smaller network. So bisection finds the strength
that meets a budget, see `scop.selection.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scop.config import VariantSection
from scop.errors import UserError
from scop.pruning.plan import ChannelPlan
from scop.selection.candidates import Candidate
from scop.selection.rounds import Round


class Selection:
    """The selection of a variant as a function of the strength.

    Args:
        input_shape: (C, H, W) of an image.
        variant: the settings.
        candidates: the layers to prune, in model order.
        round: the current round, if the variant prunes in several.
        prices: for each candidate, the cost of one channel in each of its blocks; by default the number of channels.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        variant: VariantSection,
        candidates: Sequence[Candidate],
        round: Round | None = None,
        prices: Sequence[float] | None = None,
    ) -> None:
        self.input_shape, self.variant, self.candidates = input_shape, variant, candidates
        self.round = round or Round()
        self.prices = prices or [float(c.blocks * len(c.prunable.convs)) for c in candidates]

    @property
    def strength(self) -> float:
        """The strength that the settings specify for this round; a false-discovery rate is the same in every round."""
        if self.variant.selection == "knockoff_plus":
            return 1 - self.variant.fdr
        return self.round.rate(self.variant.prune_rate)

    def plan(self, strength: float, counts: Sequence[int] | None = None) -> ChannelPlan:
        """Return the plan at a strength in [0, 1): a prune rate, or 1 minus a false-discovery rate.

        Args:
            strength: pruning strength.
            counts: number of channels that each block of each candidate keeps; by default as `self.counts` returns it.

        Raises:
            UserError: the knockoff filter keeps nothing.
        """
        kept: dict[str, list[int]] = {}
        channels: dict[str, int] = {}
        unsure: dict[str, list[int]] = {}
        counts = self.counts(strength) if counts is None else counts
        for candidate, count in zip(self.candidates, counts, strict=True):
            chosen, uncertain = candidate.keep(count), candidate.uncertain(count)
            for conv in candidate.prunable.convs:
                kept[conv], channels[conv] = chosen, candidate.prunable.channels
                if candidate.errors is not None:
                    unsure[conv] = uncertain
        rate = strength
        if self.variant.method == "none":
            rate = 0.0
        elif self.variant.selection == "knockoff_plus":
            all_channels = sum(c.width * c.blocks for c in self.candidates)
            rate = 1 - sum(n * c.blocks for n, c in zip(counts, self.candidates, strict=True)) / max(1, all_channels)
        return ChannelPlan(
            input_shape=self.input_shape,
            residual=self.variant.residual,
            kept=kept,
            channels=channels,
            method=self.variant.method,
            selection=self.variant.selection,
            prune_rate=round(rate, 6),
            unsure=unsure,
        )

    def counts(self, strength: float) -> list[int]:
        """Return the number of channels that each block of each candidate keeps."""
        match self.variant.selection:
            case "uniform":
                return [self._rounded(c, strength if c.rate is None else c.rate) for c in self.candidates]
            case "global":
                removed = self._cheapest(strength)
            case "knockoff_plus":
                removed = self._undiscovered(strength)
        return [
            self._rounded(c, n / c.width, self.variant.floor) if c.rate is None else self._rounded(c, c.rate)
            for c, n in zip(self.candidates, removed, strict=True)
        ]

    def _rounded(self, candidate: Candidate, rate: float, floor: float = 0.0) -> int:
        width = candidate.width
        per_block = -(-self.variant.min_channels // candidate.blocks)
        round_to = max(1, self.variant.round_to // math.gcd(self.variant.round_to, candidate.blocks))
        least = -(-math.ceil(floor * width - 1e-9) // round_to) * round_to
        kept = max(kept_count(width, min(rate, 1 - floor), round_to, per_block), least)
        return min(kept, width - candidate.already_removed)

    def _cheapest(self, share: float) -> list[int]:
        """Return how many channels each candidate loses: lowest value per price first, up to a share of all prices."""
        free = [(index, c) for index, c in enumerate(self.candidates) if c.rate is None]
        if not free:
            return [0] * len(self.candidates)
        values = torch.cat([c.values() / self.prices[index] for index, c in free])
        prices = torch.cat([torch.full((c.width,), self.prices[index], dtype=torch.float64) for index, c in free])
        owners = torch.cat([torch.full((c.width,), index) for index, c in free])
        order = values.argsort(stable=True)
        removed = prices[order].cumsum(0) <= share * prices.sum() * (1 + 1e-9)
        return torch.bincount(owners[order][removed], minlength=len(self.candidates)).tolist()

    def _undiscovered(self, strength: float) -> list[int]:
        """Return, for each candidate, the number of channels that the knockoff filter does not keep.

        Under a budget, the threshold of the filter is the quantile of W at the strength.
        """
        free = [c.ascending[c.already_removed :] for c in self.candidates if c.rate is None]
        if not free:
            return [0] * len(self.candidates)
        statistics = torch.cat(free)
        if self.variant.budget is not None:
            threshold = float(statistics.quantile(strength))
        else:
            threshold = knockoff_threshold(statistics, self.variant.fdr)
        if math.isinf(threshold):
            raise UserError(
                f"the knockoff filter keeps no channel at fdr {self.variant.fdr:g}: too few of them score better "
                "than their knockoffs; raise fdr, or use more images in the knockoff phase"
            )
        return [int((c.ascending < threshold).sum()) for c in self.candidates]


def knockoff_threshold(statistics: Tensor, fdr: float) -> float:
    """Return the knockoff+ threshold (Barber and Candès, 2015, arXiv 1404.5609, equation 1.9), or infinity.

    The smallest t > 0 with ``(1 + #{W <= -t}) / max(1, #{W >= t}) <= fdr``; channels with W >= t are kept.
    """
    for t in torch.unique(statistics.abs()).tolist():
        allowed = fdr * max(1, int((statistics >= t).sum())) * (1 + 1e-9)  # tolerance, so that 0.1 * 10 allows 1
        if t > 0 and 1 + int((statistics <= -t).sum()) <= allowed:
            return float(t)
    return math.inf


def kept_count(channels: int, prune_rate: float, round_to: int = 1, min_channels: int = 1) -> int:
    """Return the number of kept channels of a layer: all but ``int(prune_rate * channels)``, as in the paper, rounded.

    The result is rounded to the nearest multiple of `round_to`, ties to the smaller one, but never to zero and never
    above the layer's width.
    """
    # Without the small term, 0.29 * 100 = 28.999999999999996 would remove 28 channels.
    kept = channels - math.floor(prune_rate * channels + 1e-9)
    if round_to > 1 and prune_rate > 0:
        kept = max(math.ceil(kept / round_to - 0.5), 1) * round_to
    return min(channels, max(kept, min_channels, 1))
