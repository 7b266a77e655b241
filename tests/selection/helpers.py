"""Scores and selections for the tests of `scop.selection`."""

from typing import Any

import torch
from torch import nn

from scop.config import VariantSection
from scop.knockoffs.phase import gated_layers
from scop.pruning.graph import ChannelGraph
from scop.selection.candidates import find_candidates
from scop.selection.scores import Scores
from scop.selection.strategy import Selection

SHAPE = (3, 16, 16)


def scores_of(model: nn.Module, kind: str = "fisher", seed: int = 0) -> Scores:
    """Return random scores of every prunable layer."""
    generator = torch.Generator().manual_seed(seed)
    widths = {layer: model.get_submodule(layer).out_channels for layer in gated_layers(ChannelGraph(model, SHAPE))}
    score = {layer: torch.rand(width, generator=generator) for layer, width in widths.items()}
    error = {layer: torch.full((width,), 0.01) for layer, width in widths.items()}
    signed = {layer: torch.randn(width, generator=generator) + 2 for layer, width in widths.items()}
    return Scores(score, error, signed, score, kind, SHAPE)


def selection_of(model: nn.Module, graph: ChannelGraph, **settings: Any) -> Selection:
    """Return the selection of a variant, by default of method l1."""
    variant = VariantSection.model_validate({"method": "l1"} | settings)
    return Selection(SHAPE, variant, find_candidates(model, graph, variant))
