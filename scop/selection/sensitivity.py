"""Sensitivity: what pruning one layer alone does to accuracy, at several rates.

The lowest-scored channels of one layer are held at 0 wherever surgery would remove them; the others stay whole, and
nothing is recalibrated or trained. What comes of it is a lower bound, layer by layer, and tells where rates of one's
own (`variants.rates`) are worth while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scop.compute.device import autocast_dtype
from scop.config import VariantSection
from scop.models.evaluation import measure_accuracy
from scop.pruning.cuts import cuts_of
from scop.pruning.exactness import masked_twin
from scop.pruning.graph import ChannelGraph
from scop.selection.candidates import Selection
from scop.system.progress import progress


def measure_sensitivity(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    rates: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    input_shape: tuple[int, int, int],
) -> dict[str, list[float]]:
    """Top-1 in [0, 1] of the network with one layer pruned, together with those that must lose the same channels.

    Args:
        model: the dense network.
        scores: layer -> scores (channels,); the lowest go.
        rates: of the layer that is pruned.
        batches: (images, labels) on the device.
        device: where to compute.
        input_shape: (C, H, W) of an image.

    Returns:
        Layer -> top-1 at each rate.
    """
    dtype = autocast_dtype(device, "auto")
    graph = ChannelGraph(model, input_shape)
    alone = one_by_one(model, graph, scores)
    found: dict[str, list[float]] = {}
    with progress(len(alone) * len(rates), "sensitivity", unit="network") as bar:
        for layer, selection in alone.items():
            found[layer] = []
            for rate in rates:
                twin = masked_twin(model, cuts_of(graph, selection.plan(rate))).eval()
                twin.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                found[layer].append(measure_accuracy(twin, batches, device, dtype).top1)
                bar.update(1)
    return found


def one_by_one(model: nn.Module, graph: ChannelGraph, scores: Mapping[str, Tensor]) -> dict[str, Selection]:
    """For each layer with scores a selection from it alone, by rule `scatter`, or `coupled` where that leaves it whole.

    Layers that lose their channels together are one, under the name of the first.
    """
    found: dict[str, Selection] = {}
    seen: set[str] = set()
    for rule in ("scatter", "coupled"):
        for prunable in graph.survey(rule)[0]:
            if seen.isdisjoint(prunable.convs) and not scores.keys().isdisjoint(prunable.convs):
                variant = VariantSection(residual=rule, include=[prunable.name])
                found[prunable.name] = Selection(model, graph, variant, scores)
                seen.update(prunable.convs)
    return found
