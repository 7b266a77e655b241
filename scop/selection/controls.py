"""What each method ranks channels by: SCOP by the knockoff phase, the controls by what they see in the network.

`random` draws scores, `l1` is the L1 norm of the channel's filter (Li et al., 2017, arXiv 1608.08710), `bn_gamma` the
absolute weight of its batch norm (Liu et al., 2017, arXiv 1708.06519), `fpgm` its filter's distance from the others of
its layer (He et al., 2019, arXiv 1811.00250). `scratch` takes the first of each layer, which is as good as any where
all weights are drawn anew. `none` removes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scop.config import VariantSection
from scop.errors import UserError
from scop.pruning.graph import ChannelGraph, gamma, out_channels
from scop.selection.scores import Scores

LayerScore = Callable[[str], Tensor | None]
"""Gives a convolution's scores (channels,), or None where the method has none for it."""


def score_of(
    variant: VariantSection, model: nn.Module, graph: ChannelGraph, scores: Mapping[str, Tensor] | None
) -> LayerScore:
    """What ranks the channels of each layer by the variant's method.

    Args:
        variant: the settings.
        model: the dense network.
        graph: its channels.
        scores: those of the knockoff phase; the controls need none.

    Raises:
        UserError: scores are missing, or are not this network's.
    """
    if variant.method == "scop":
        if scores is None:
            raise UserError("method 'scop' needs the scores of the knockoff phase; a control does without")
        unknown = sorted(set(scores) - {name for name, _ in model.named_modules()})
        if unknown:
            raise UserError(f"layer {unknown[0]!r} has scores but is not in the model; were they made for another one?")
        if variant.selection == "knockoff_plus":
            if not isinstance(scores, Scores):
                raise UserError("selection knockoff_plus needs the signed statistics of the knockoff phase")
            return scores.signed.get
        return scores.get
    if variant.method == "random":
        generator = torch.Generator().manual_seed(variant.seed)
        return lambda conv: torch.rand(out_channels(model.get_submodule(conv)), generator=generator)
    if variant.method == "l1":
        return lambda conv: _filters(model, conv).abs().sum(1)
    if variant.method == "fpgm":
        return lambda conv: _distances(_filters(model, conv))
    if variant.method == "bn_gamma":
        return lambda conv: gamma(model, graph, conv)
    return lambda conv: torch.zeros(out_channels(model.get_submodule(conv)))  # scratch, none


def _distances(filters: Tensor) -> Tensor:
    """Each filter's sum of Euclidean distances to all of them; small near their geometric median: (C, D) -> (C,).

    Filters of zeros, which an earlier round removed, are not among them.
    """
    present = filters[filters.any(1)]
    return torch.cdist(filters, present, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _filters(model: nn.Module, conv: str) -> Tensor:
    """A layer's weights, one row for each channel that it puts out: (C, D)."""
    weight = model.get_submodule(conv).weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1).float().cpu()
