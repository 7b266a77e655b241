"""Sensitivity: what pruning one layer alone does to accuracy, at several rates.

The lowest-scored channels of one layer are held at 0 behind its batch norm, which is what surgery makes of them; the
others stay whole, and nothing is recalibrated or trained. What comes of it is a lower bound, layer by layer, and tells
where rates of one's own (`variants.rates`) are worth while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scop.device import autocast_dtype
from scop.evaluation import measure_accuracy
from scop.graph import ChannelGraph
from scop.knockoff import folded_copy
from scop.progress import progress
from scop.selection import kept_count


def measure_sensitivity(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    rates: Sequence[float],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    input_shape: tuple[int, int, int],
) -> dict[str, list[float]]:
    """Top-1 in [0, 1] of the network with one layer pruned.

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
    network = folded_copy(model, ChannelGraph(model, input_shape), dtype)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, list[float]] = {}
    with progress(len(scores) * len(rates), "sensitivity", unit="network") as bar:
        for layer, score in scores.items():
            found[layer] = []
            ascending = score.argsort(stable=True)
            for rate in rates:
                gone = ascending[: len(score) - kept_count(len(score), rate)].to(device)
                hook = network.get_submodule(layer).register_forward_hook(_Silenced(gone))
                found[layer].append(measure_accuracy(network, batches, device, dtype).top1)
                hook.remove()
                bar.update(1)
    return found


class _Silenced:
    """Forward hook: channels held at 0."""

    def __init__(self, channels: Tensor) -> None:
        self.channels = channels

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(1, self.channels, 0)
