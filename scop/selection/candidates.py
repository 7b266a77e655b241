"""Candidates: layers that lose the same channels, with their scores."""

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
from scop.selection.controls import LayerScore, score_of
from scop.selection.rounds import Round
from scop.selection.scores import Scores

_CERTAIN = 2.0
"""Distance from the cut, in standard errors, beyond which the choice of a channel is certain."""


@dataclass(frozen=True)
class Candidate:
    """Layers that lose the same channels.

    Attributes:
        prunable: the layers.
        scores: (blocks, width), used to rank the channels; each block loses the same number of channels.
        errors: (blocks, width), the standard errors of the scores, or None.
        rate: the prune rate set for this layer, or None.
        already_removed: number of channels that each block lost in earlier rounds; these have the lowest scores.
        comparable: whether scores of different layers can be compared without normalisation.
    """

    prunable: Prunable
    scores: Tensor
    errors: Tensor | None
    rate: float | None
    already_removed: int = 0
    comparable: bool = False

    @property
    def blocks(self) -> int:
        return len(self.scores)

    @property
    def width(self) -> int:
        """Number of channels in each block."""
        return self.scores.shape[1]

    @cached_property
    def ascending(self) -> Tensor:
        """Scores (width,), ascending: the k-th is the mean of each block's k-th lowest, which are removed together."""
        return self.scores.sort(dim=1).values.mean(0)

    def keep(self, count: int) -> list[int]:
        """Return the kept channels, ascending, if each block keeps `count`.

        Among equal scores, lower indices are kept, so that the choice does not depend on the sorting algorithm.
        """
        order = self.scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        indices = order + torch.arange(self.blocks)[:, None] * self.width
        return sorted(indices.flatten().tolist())

    def uncertain(self, count: int) -> list[int]:
        """Return the channels within two standard errors of the cut, ascending; none without a cut or errors."""
        if self.errors is None or count >= self.width:
            return []
        ordered = self.scores.sort(dim=1, descending=True).values
        cut = (ordered[:, count - 1 : count] + ordered[:, count : count + 1]) / 2
        near = (self.scores - cut).abs() < _CERTAIN * self.errors
        return torch.nonzero(near.flatten()).flatten().tolist()

    def values(self) -> Tensor:
        """Return the values (width,) of the channels in ascending order of score, comparable between layers."""
        scores = self.ascending.double()
        if not self.comparable:
            scores = scores / scores[self.already_removed :].abs().mean().clamp_min(1e-30)  # W may be negative
        # The fewer channels are left, the higher their value: each halving of a layer costs the same.
        left = 1 - torch.arange(self.width, dtype=torch.float64) / self.width
        scores = scores.clamp_min(0) / left + scores.clamp_max(0) * left
        # The scores of layers that share channels are averaged, but all of these layers lose the channels.
        return scores * self.blocks * len(self.prunable.convs)


def find_candidates(
    model: nn.Module,
    graph: ChannelGraph,
    variant: VariantSection,
    scores: Mapping[str, Tensor] | None = None,
    round: Round | None = None,
) -> list[Candidate]:
    """Return the candidates of a variant, in model order.

    Args:
        model: the dense network.
        graph: its channels.
        variant: the settings.
        scores: layer -> scores (channels,) of the knockoff phase; the controls need none.
        round: the current round, if the variant prunes in several.

    Raises:
        UserError: scores are missing or do not match the network, a pattern matches no layer, or nothing can be pruned.
    """
    score = score_of(variant, model, graph, scores)
    error = scores.error.get if isinstance(scores, Scores) and variant.method == "scop" else None
    if variant.selection == "knockoff_plus":
        error = None  # W is measured in standard errors
    prunables = graph.prunable(variant.residual)
    _check_patterns([*variant.include, *variant.exclude, *variant.rates], prunables)
    comparable = variant.method == "scop" and isinstance(scores, Scores) and scores.kind == "fisher"
    chosen = [p for p in prunables if _is_included(p, variant)]
    if not chosen:
        raise UserError("include and exclude leave no layer to prune; exclude takes precedence over include")
    return [_candidate(p, variant, score, error, round or Round(), comparable) for p in chosen]


def _candidate(
    prunable: Prunable,
    variant: VariantSection,
    score: LayerScore,
    error: LayerScore | None,
    round: Round,
    comparable: bool,
) -> Candidate:
    blocks = prunable.blocks
    if variant.method == "none":
        return Candidate(prunable, torch.zeros(blocks, prunable.channels // blocks), None, 0.0)
    rates = (rate for pattern, rate in variant.rates.items() if _matches(prunable, [pattern]))
    rate = next((round.rate(rate) for rate in rates), None)
    errors = None
    if error is not None:
        known = [own.float().square() for conv in prunable.convs if (own := error(conv)) is not None]
        total = torch.stack(known).sum(0).sqrt() / len(known)
        errors = total.view(blocks, -1) if bool(torch.isfinite(total).all()) else None
    combined = _combined(prunable, score, variant)
    previous = round.previous
    earlier = previous.removed(prunable.name) if previous and prunable.name in previous.kept else []
    combined[earlier] = torch.nextafter(combined.min().clamp_max(0), torch.tensor(-math.inf))
    return Candidate(prunable, combined.view(blocks, -1), errors, rate, len(earlier) // blocks, comparable)


def _combined(prunable: Prunable, score: LayerScore, variant: VariantSection) -> Tensor:
    """Return one score per channel (channels,): the mean over the candidate's layers that have scores."""
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
                "were they computed for another network?"
            )
        if not torch.isfinite(scores).all():
            raise UserError(f"layer {prunable.name!r} has scores that are not finite")
    return torch.stack(found).mean(0)


def _is_included(prunable: Prunable, variant: VariantSection) -> bool:
    included = not variant.include or _matches(prunable, variant.include)
    return included and not _matches(prunable, variant.exclude)


def _matches(prunable: Prunable, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(conv, pattern) for conv in prunable.convs for pattern in patterns)


def _check_patterns(patterns: Sequence[str], prunables: Sequence[Prunable]) -> None:
    names = [conv for prunable in prunables for conv in prunable.convs]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names[:6])}, ..."
            raise UserError(f"no prunable layer matches {pattern!r} ({hint})")
