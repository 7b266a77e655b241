"""Channel scores of each method: SCOP uses the knockoff phase, the controls only the dense network.

`random` draws the scores at random. `l1` is the L1 norm of the channel's filter (Li et al., 2017, arXiv 1608.08710).
`bn_gamma` is the absolute weight of its batch norm (Liu et al., 2017, arXiv 1708.06519). `fpgm` is the distance of its
filter from the others in the layer (He et al., 2019, arXiv 1811.00250). `scratch` keeps the first channels of each
layer: since all weights are drawn anew, any other choice is equivalent. `none` removes nothing.
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
"""Returns the scores (channels,) of the convolution with this name, or None if the method cannot score it."""


def score_of(
    variant: VariantSection, model: nn.Module, graph: ChannelGraph, scores: Mapping[str, Tensor] | None
) -> LayerScore:
    """Return the function that scores a layer's channels by the variant's method.

    Args:
        variant: the settings.
        model: the dense network.
        graph: its channels.
        scores: layer -> scores (channels,) of the knockoff phase; the controls need none.

    Raises:
        UserError: scores are missing, or name a layer that the network does not have.
    """
    if variant.method == "scop":
        if scores is None:
            raise UserError("method 'scop' needs the scores of the knockoff phase; the other methods need none")
        unknown = sorted(set(scores) - {name for name, _ in model.named_modules()})
        if unknown:
            raise UserError(
                f"layer {unknown[0]!r} has scores but is not in the model; were they computed for another network?"
            )
        if variant.selection == "knockoff_plus":
            if not isinstance(scores, Scores):
                raise UserError(
                    "selection knockoff_plus needs signed statistics; use the scores of scop.train_knockoffs"
                )
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
    """Return each filter's sum of Euclidean distances to all filters, which is small near their geometric median.

    Distances to zero filters, which an earlier round removed, do not count.

    Shape:
        (C, D) -> (C,)
    """
    present = filters[filters.any(1)]
    return torch.cdist(filters, present, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def _filters(model: nn.Module, conv: str) -> Tensor:
    """Return a layer's weights (C, D), one row per output channel."""
    weight = model.get_submodule(conv).weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1).float().cpu()
