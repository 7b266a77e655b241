"""Selection of channels: from scores to a channel plan."""

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
from scop.selection.candidates import find_candidates
from scop.selection.rounds import Round
from scop.selection.scores import Scores
from scop.selection.sizes import Sizes
from scop.selection.strategy import Selection


def select_channels(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    variant: VariantSection | None = None,
    device: torch.device | None = None,
    round: Round | None = None,
    **settings: object,
) -> ChannelPlan:
    """Select the channels to keep.

    Args:
        model: the dense network.
        scores: layer -> scores (channels,), from `scop.train_knockoffs` or another method; the controls need none.
        input_shape: (C, H, W) of an image; by default that of the scores.
        variant: the settings.
        device: device on which a latency budget is measured.
        round: the current round, if the variant prunes in several.
        settings: settings that override the variant's: ``prune_rate=0.45, residual="coupled"``.

    Raises:
        UserError: a setting is invalid, scores are missing or do not match the network, nothing can be pruned, or the
            budget is out of reach.
    """
    variant = parse(VariantSection, (variant.model_dump() if variant else {}) | settings)
    shape = input_shape or (scores.input_shape if isinstance(scores, Scores) else None)
    if shape is None:
        raise UserError("select_channels needs input_shape=(C, H, W): the scores do not contain it")
    round = round or Round()
    graph = ChannelGraph(model, shape)
    candidates = find_candidates(model, graph, variant, scores, round)
    if variant.budget is None or variant.method == "none":
        selection = Selection(graph.input_shape, variant, candidates, round)
        return selection.plan(selection.strength)
    sizes = Sizes(model, graph)
    prices = None
    if variant.selection == "global":
        what = "params" if variant.budget.params else "macs"
        prices = unit_prices(Selection(graph.input_shape, variant, candidates, round), sizes, what)
    selection = Selection(graph.input_shape, variant, candidates, round, prices)
    return solve(selection, sizes, variant.budget, device)
