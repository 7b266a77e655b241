"""Selection: from scores to a channel plan, under one rule for all methods.

Every method gives one score per channel; low scores go. The controls differ from SCOP in nothing but the score:
`random` draws it, `l1` is the L1 norm of the channel's filter (Li et al., 2017, arXiv 1608.08710), `bn_gamma` the
absolute weight of its batch norm (Liu et al., 2017, arXiv 1708.06519), `fpgm` its filter's distance from the others of
its layer (He et al., 2019, arXiv 1811.00250). `none` removes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scop.config import VariantSection
from scop.errors import UserError
from scop.graph import ChannelGraph, Prunable
from scop.knockoff import Scores
from scop.parsing import parse
from scop.plan import ChannelPlan

LayerScore = Callable[[str], Tensor | None]
"""Gives a convolution's scores (channels,), or None where the method has none for it."""


def select_channels(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    variant: VariantSection | None = None,
    **settings: object,
) -> ChannelPlan:
    """Decide which channels stay.

    Args:
        model: the dense network.
        scores: layer -> (channels,), from `scop.train_knockoffs` or elsewhere; the controls need none.
        input_shape: (C, H, W) of an image; that of the scores by default.
        variant: the settings, or give them one by one as keywords: ``prune_rate=0.45, residual="coupled"``.

    Raises:
        UserError: a setting is bad, scores are missing or do not fit, or nothing can be pruned.
    """
    variant = parse(VariantSection, (variant.model_dump() if variant else {}) | settings)
    shape = input_shape or (scores.input_shape if isinstance(scores, Scores) else None)
    if shape is None:
        raise UserError("select_channels needs input_shape=(C, H, W) where the scores do not tell it")
    graph = ChannelGraph(model, shape)
    score = _score_of(variant, model, graph, scores)
    kept: dict[str, list[int]] = {}
    channels: dict[str, int] = {}
    for prunable in graph.prunable(variant.residual):
        if variant.method == "none":
            chosen = list(range(prunable.channels))
        else:
            chosen = keep_highest(_combined(prunable, score, variant), prunable.blocks, variant)
        for conv in prunable.convs:
            kept[conv], channels[conv] = chosen, prunable.channels
    return ChannelPlan(
        input_shape=shape,
        residual=variant.residual,
        kept=kept,
        channels=channels,
        method=variant.method,
        prune_rate=0.0 if variant.method == "none" else variant.prune_rate,
    )


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


def keep_highest(scores: Tensor, blocks: int, variant: VariantSection) -> list[int]:
    """The channels to keep, ascending: the highest scores, equally many in each of `blocks` equal parts.

    Equal scores are kept in the channels' order, so that a selection does not depend on the sorting algorithm.
    """
    width = len(scores) // blocks
    per_block = -(-variant.min_channels // blocks)
    round_to = max(1, variant.round_to // math.gcd(variant.round_to, blocks))
    count = kept_count(width, variant.prune_rate, round_to, per_block)
    order = scores.view(blocks, width).argsort(dim=1, descending=True, stable=True)[:, :count]
    places = order + torch.arange(blocks)[:, None] * width
    return sorted(places.flatten().tolist())


def _combined(prunable: Prunable, score: LayerScore, variant: VariantSection) -> Tensor:
    """One score per channel for layers that share their channels: the mean over those that have one."""
    found = [s.detach().float().cpu() for conv in prunable.convs if (s := score(conv)) is not None]
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


def _score_of(
    variant: VariantSection, model: nn.Module, graph: ChannelGraph, scores: Mapping[str, Tensor] | None
) -> LayerScore:
    if variant.method == "scop":
        if scores is None:
            raise UserError("method 'scop' needs the scores of the knockoff phase; a control does without")
        unknown = sorted(set(scores) - {name for name, _ in model.named_modules()})
        if unknown:
            raise UserError(f"layer {unknown[0]!r} has scores but is not in the model; were they made for another one?")
        return scores.get
    if variant.method == "random":
        generator = torch.Generator().manual_seed(variant.seed)
        return lambda conv: torch.rand(_conv(model, conv).out_channels, generator=generator)
    if variant.method == "l1":
        return lambda conv: _conv(model, conv).weight.detach().abs().sum((1, 2, 3)).float().cpu()
    if variant.method == "fpgm":
        return lambda conv: _distances(_conv(model, conv).weight.detach().flatten(1).float().cpu())
    if variant.method == "bn_gamma":
        return lambda conv: _gamma(model, graph, conv)
    return lambda conv: None


def _gamma(model: nn.Module, graph: ChannelGraph, conv: str) -> Tensor | None:
    norm = graph.batch_norm(conv)
    weight = None if norm is None else model.get_submodule(norm).weight
    return None if weight is None else weight.detach().abs().float().cpu()  # type: ignore[operator]


def _distances(filters: Tensor) -> Tensor:
    """Each filter's sum of Euclidean distances to all of them; small near their geometric median: (C, D) -> (C,)."""
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _conv(model: nn.Module, name: str) -> nn.Conv2d:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    return layer
