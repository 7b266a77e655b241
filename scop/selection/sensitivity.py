"""Sensitivity: the accuracy of the network when only one layer is pruned, at several rates.

The layer's lowest-scored channels are set to 0 wherever surgery would remove them. The other layers stay whole, and
nothing is recalibrated or trained, so the result is a lower bound for each layer. It shows which layers need their own
rate (`variants.rates`).
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
from scop.selection.candidates import find_candidates
from scop.selection.strategy import Selection
from scop.system.progress import progress


def measure_sensitivity(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    rates: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    input_shape: tuple[int, int, int],
) -> dict[str, list[float]]:
    """Measure the network's top-1 with one layer pruned, including layers that must lose the same channels.

    Args:
        model: the dense network.
        scores: layer -> scores (channels,); the lowest-scored channels are removed.
        rates: prune rates of the layer.
        batches: images (N, C, H, W) and labels (N,), on the device.
        device: device to compute on.
        input_shape: (C, H, W) of an image.

    Returns:
        Layer -> top-1 in [0, 1] at each rate.
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
    """Return a selection for each layer with scores that prunes this layer alone.

    The rule is `scatter`, or `coupled` if `scatter` does not prune the layer. Layers that lose the same channels share
    one selection, under the name of the first.
    """
    found: dict[str, Selection] = {}
    seen: set[str] = set()
    for rule in ("scatter", "coupled"):
        for prunable in graph.survey(rule)[0]:
            if seen.isdisjoint(prunable.convs) and not scores.keys().isdisjoint(prunable.convs):
                variant = VariantSection(residual=rule, include=[prunable.name])
                candidates = find_candidates(model, graph, variant, scores)
                found[prunable.name] = Selection(graph.input_shape, variant, candidates)
                seen.update(prunable.convs)
    return found
