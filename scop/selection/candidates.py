"""Selection: from scores to a channel plan, under one rule for all methods.

Every method gives one score per channel, see `scop.selection.controls`; low scores go.

How many go, and from where, is the selection's. `uniform` takes the same share from each layer. `global` takes the
lowest of all for the share of their layer that is left when their turn comes; under a budget, the lowest for what they
cost of it: to lose little and save much is a knapsack, and taking by the ratio solves it but for the last item. Fisher
scores are of the same loss and can be compared, other scores are first divided by their layer's mean size.
`knockoff_plus` takes what the knockoff filter does not keep; under a budget, what lies below a threshold of W.

All have a strength in [0, 1), of which the network's size is a falling function: so a budget is met by bisection, see
`scop.selection.budget`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from scop.config import VariantSection
from scop.errors import UserError
from scop.pruning.graph import ChannelGraph, Prunable
from scop.pruning.plan import ChannelPlan
from scop.selection.controls import LayerScore, score_of
from scop.selection.scores import Scores

_SURE = 2.0
"""Standard errors from the cut beyond which a selection is sure of a channel."""


@dataclass(frozen=True)
class Candidate:
    """Layers that lose the same channels, with what is known of these.

    Attributes:
        prunable: which they are.
        scores: (blocks, width), by which they are ranked; from each block equally many go.
        errors: their standard errors, or None.
        rate: that of the layer itself, where there is one.
        gone: so many channels of each block went in an earlier round; they have the lowest scores.
    """

    prunable: Prunable
    scores: Tensor
    errors: Tensor | None
    rate: float | None
    gone: int = 0

    @property
    def blocks(self) -> int:
        return len(self.scores)

    @property
    def width(self) -> int:
        return self.scores.shape[1]

    @cached_property
    def ascending(self) -> Tensor:
        """Scores (width,) from the lowest: the mean over blocks of each one's k-th lowest, which go together."""
        return self.scores.sort(dim=1).values.mean(0)

    def keep(self, count: int) -> list[int]:
        """The channels that stay where each block keeps `count`, ascending.

        Equal scores are kept in the channels' order, so that a selection does not depend on the sorting algorithm.
        """
        order = self.scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        places = order + torch.arange(self.blocks)[:, None] * self.width
        return sorted(places.flatten().tolist())

    def unsure(self, count: int) -> list[int]:
        """The channels within two standard errors of the cut, ascending; none where nothing is cut or nothing known."""
        if self.errors is None or count >= self.width:
            return []
        ordered = self.scores.sort(dim=1, descending=True).values
        cut = (ordered[:, count - 1 : count] + ordered[:, count : count + 1]) / 2
        near = (self.scores - cut).abs() < _SURE * self.errors
        return torch.nonzero(near.flatten()).flatten().tolist()


class Selection:
    """What a variant would select, at any strength.

    Args:
        model: the dense network.
        graph: its channels.
        variant: the settings.
        scores: those of the knockoff phase.
        before, part: see `select_channels`.

    Attributes:
        candidates: for each decision the layers and scores that it is about, in the model's order.
        prices: for each candidate what one channel more of each block costs; at first the channels of its layers.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        variant: VariantSection,
        scores: Mapping[str, Tensor] | None = None,
        before: ChannelPlan | None = None,
        part: float = 1.0,
    ) -> None:
        self.graph, self.variant, self.before, self.part = graph, variant, before, part
        score = score_of(variant, model, graph, scores)
        error = scores.error.get if isinstance(scores, Scores) and variant.method == "scop" else None
        if variant.selection == "knockoff_plus":
            error = None  # W counts in standard errors
        prunables = graph.prunable(variant.residual)
        _check_patterns([*variant.include, *variant.exclude, *variant.rates], prunables)
        self._comparable = variant.method == "scop" and isinstance(scores, Scores) and scores.kind == "fisher"
        self.candidates = [self._candidate(p, score, error) for p in prunables if self._is_chosen(p)]
        if not self.candidates:
            raise UserError("include and exclude leave no layer to prune; what exclude names is left out of include")
        self.prices = [float(c.blocks * len(c.prunable.convs)) for c in self.candidates]

    def _is_chosen(self, prunable: Prunable) -> bool:
        included = not self.variant.include or _matches(prunable, self.variant.include)
        return included and not _matches(prunable, self.variant.exclude)

    def _candidate(self, prunable: Prunable, score: LayerScore, error: LayerScore | None) -> Candidate:
        blocks = prunable.blocks
        if self.variant.method == "none":
            return Candidate(prunable, torch.zeros(blocks, prunable.channels // blocks), None, 0.0)
        rates = (rate for pattern, rate in self.variant.rates.items() if _matches(prunable, [pattern]))
        rate = next((self._on_the_way(rate) for rate in rates), None)
        errors = None
        if error is not None:
            known = [own.float().square() for conv in prunable.convs if (own := error(conv)) is not None]
            total = torch.stack(known).sum(0).sqrt() / len(known)
            errors = total.view(blocks, -1) if bool(torch.isfinite(total).all()) else None
        combined = _combined(prunable, score, self.variant)
        gone = self.before.removed(prunable.name) if self.before and prunable.name in self.before.kept else []
        combined[gone] = torch.nextafter(combined.min().clamp_max(0), torch.tensor(-math.inf))
        return Candidate(prunable, combined.view(blocks, -1), errors, rate, len(gone) // blocks)

    def _on_the_way(self, rate: float) -> float:
        return 1 - (1 - rate) ** self.part

    @property
    def strength(self) -> float:
        """That which the settings ask for. A false-discovery rate is kept in every round."""
        if self.variant.selection == "knockoff_plus":
            return 1 - self.variant.fdr
        return self._on_the_way(self.variant.prune_rate)

    def plan(self, strength: float, counts: list[int] | None = None) -> ChannelPlan:
        """The plan at a strength in [0, 1): a prune rate, or 1 less a false-discovery rate.

        Args:
            strength: how strongly to prune; `fdr` decides where that is what the settings ask for.
            counts: of the channels that stay in each block of each candidate, if not those of `counts`.

        Raises:
            UserError: the knockoff filter keeps nothing.
        """
        kept: dict[str, list[int]] = {}
        channels: dict[str, int] = {}
        unsure: dict[str, list[int]] = {}
        counts = self.counts(strength) if counts is None else counts
        for candidate, count in zip(self.candidates, counts, strict=True):
            chosen, doubtful = candidate.keep(count), candidate.unsure(count)
            for conv in candidate.prunable.convs:
                kept[conv], channels[conv] = chosen, candidate.prunable.channels
                if candidate.errors is not None:
                    unsure[conv] = doubtful
        rate = strength
        if self.variant.method == "none":
            rate = 0.0
        elif self.variant.selection == "knockoff_plus":
            all_channels = sum(c.width * c.blocks for c in self.candidates)
            rate = 1 - sum(n * c.blocks for n, c in zip(counts, self.candidates, strict=True)) / max(1, all_channels)
        return ChannelPlan(
            input_shape=self.graph.input_shape,
            residual=self.variant.residual,
            kept=kept,
            channels=channels,
            method=self.variant.method,
            selection=self.variant.selection,
            prune_rate=round(rate, 6),
            unsure=unsure,
        )

    def counts(self, strength: float) -> list[int]:
        """How many channels stay in each block of each candidate."""
        match self.variant.selection:
            case "uniform":
                return [self._rounded(c, strength if c.rate is None else c.rate) for c in self.candidates]
            case "global":
                removed = self._lowest(strength)
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
        return min(kept, width - candidate.gone)

    def _lowest(self, share: float) -> list[int]:
        """How many of each candidate's channels are the lowest for their price, up to a share of the whole price."""
        free = [(place, c) for place, c in enumerate(self.candidates) if c.rate is None]
        if not free:
            return [0] * len(self.candidates)
        values = torch.cat([self._value(c) / self.prices[place] for place, c in free])
        prices = torch.cat([torch.full((c.width,), self.prices[place], dtype=torch.float64) for place, c in free])
        owners = torch.cat([torch.full((c.width,), place) for place, c in free])
        order = values.argsort(stable=True)
        gone = prices[order].cumsum(0) <= share * prices.sum() * (1 + 1e-9)
        return torch.bincount(owners[order][gone], minlength=len(self.candidates)).tolist()

    def _value(self, candidate: Candidate) -> Tensor:
        """What the channels (width,) are worth, from the lowest, to be compared between layers."""
        scores = candidate.ascending.double()
        if not self._comparable:
            scores = scores / scores[candidate.gone :].abs().mean().clamp_min(1e-30)  # W may be below 0
        # A channel is worth the more, the fewer are left: as if each halving of a layer cost the same.
        left = 1 - torch.arange(candidate.width, dtype=torch.float64) / candidate.width
        scores = scores.clamp_min(0) / left + scores.clamp_max(0) * left
        # Of layers that share their channels the mean is known, of those that have scores; all of them are lost.
        return scores * candidate.blocks * len(candidate.prunable.convs)

    def _undiscovered(self, strength: float) -> list[int]:
        """How many of each candidate's channels the knockoff filter does not keep.

        Under a budget the threshold is what is solved for, and the strength the share of channels below it.
        """
        free = [c.ascending[c.gone :] for c in self.candidates if c.rate is None]
        if not free:
            return [0] * len(self.candidates)
        statistics = torch.cat(free)
        if self.variant.budget is not None:
            threshold = float(statistics.quantile(strength))
        else:
            threshold = knockoff_threshold(statistics, self.variant.fdr)
        if math.isinf(threshold):
            raise UserError(
                f"the knockoff filter keeps no channel at fdr {self.variant.fdr:g}: too few of them beat their "
                "knockoffs; raise fdr, or let the knockoff phase see more images"
            )
        return [int((c.ascending < threshold).sum()) for c in self.candidates]


def knockoff_threshold(statistics: Tensor, fdr: float) -> float:
    """The knockoff+ threshold (Barber and Candès, 2015, arXiv 1404.5609, equation 1.9); infinite where none will do.

    The smallest t > 0 with ``(1 + #{W <= -t}) / max(1, #{W >= t}) <= fdr``; W >= t is kept.
    """
    for t in torch.unique(statistics.abs()).tolist():
        allowed = fdr * max(1, int((statistics >= t).sum())) * (1 + 1e-9)  # 0.1 * 10 must do for 1
        if t > 0 and 1 + int((statistics <= -t).sum()) <= allowed:
            return float(t)
    return math.inf


def kept_count(channels: int, prune_rate: float, round_to: int = 1, min_channels: int = 1) -> int:
    """How many of a layer's channels stay: all but ``int(prune_rate * channels)``, as in the paper, then rounded.

    Rounding goes to the nearest multiple of `round_to`, a tie to the smaller one, but never to nothing and never above
    the layer's width.
    """
    # The small term keeps 0.29 * 100 = 28.999999999999996 from losing a channel to binary fractions.
    kept = channels - math.floor(prune_rate * channels + 1e-9)
    if round_to > 1 and prune_rate > 0:
        kept = max(math.ceil(kept / round_to - 0.5), 1) * round_to
    return min(channels, max(kept, min_channels, 1))


def _matches(prunable: Prunable, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(conv, pattern) for conv in prunable.convs for pattern in patterns)


def _check_patterns(patterns: Sequence[str], prunables: Sequence[Prunable]) -> None:
    names = [conv for prunable in prunables for conv in prunable.convs]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:6])}, ..."
            raise UserError(f"no layer that can be pruned is named like {pattern!r} ({hint})")


def _combined(prunable: Prunable, score: LayerScore, variant: VariantSection) -> Tensor:
    """One score per channel for layers that share their channels: the mean over those that have one."""
    found = [torch.as_tensor(s).detach().float().cpu() for conv in prunable.convs if (s := score(conv)) is not None]
    if not found:
        raise UserError(
            f"method {variant.method!r} has no scores for layer {prunable.name!r}"
            + (": it has no batch norm" if variant.method == "bn_gamma" else "")
        )
    for scores in found:
        if scores.shape != (prunable.channels,):
            raise UserError(
                f"layer {prunable.name!r} has {prunable.channels} channels but {len(scores)} scores; "
                "were they made for another network?"
            )
        if not torch.isfinite(scores).all():
            raise UserError(f"layer {prunable.name!r} has scores that are not finite")
    return torch.stack(found).mean(0)
