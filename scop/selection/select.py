"""From scores to a channel plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scop.config import VariantSection
from scop.config.parsing import parse
from scop.errors import UserError
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.selection.budget import solve, unit_prices
from scop.selection.candidates import Selection
from scop.selection.scores import Scores
from scop.selection.sizes import Sizes


def select_channels(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    variant: VariantSection | None = None,
    device: torch.device | None = None,
    before: ChannelPlan | None = None,
    part: float = 1.0,
    **settings: object,
) -> ChannelPlan:
    """Decide which channels stay.

    Args:
        model: the dense network.
        scores: layer -> (channels,), from `scop.train_knockoffs` or elsewhere; the controls need none.
        input_shape: (C, H, W) of an image; that of the scores by default.
        variant: the settings, or give them one by one as keywords: ``prune_rate=0.45, residual="coupled"``.
        device: on which a budget of latency is measured.
        before: the plan of an earlier round; what it removed does not come back.
        part: of the way, in the logarithm of what stays: at 0.5, and a rate of 0.75, half of the channels do.

    Raises:
        UserError: a setting is bad, scores are missing or do not fit, nothing can be pruned, or a budget is out of
            reach.
    """
    variant = parse(VariantSection, (variant.model_dump() if variant else {}) | settings)
    shape = input_shape or (scores.input_shape if isinstance(scores, Scores) else None)
    if shape is None:
        raise UserError("select_channels needs input_shape=(C, H, W) where the scores do not tell it")
    graph = ChannelGraph(model, shape)
    selection = Selection(model, graph, variant, scores, before, part)
    if variant.budget is None or variant.method == "none":
        return selection.plan(selection.strength)
    sizes = Sizes(model, graph)
    if variant.selection == "global":
        selection.prices = unit_prices(selection, sizes, "params" if variant.budget.params else "macs")
    return solve(selection, sizes, variant.budget, device, part)
