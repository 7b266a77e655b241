"""Measuring networks: accuracy, parameters, multiply-accumulates, latency."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scop.compute.device import autocast


@dataclass(frozen=True)
class Accuracy:
    """What a network gets right.

    Attributes:
        top1, top5: in [0, 1]; top5 is top-k with k the number of classes where that is less than 5.
        loss: mean cross-entropy.
        confusion: int64 (classes, classes): rows are true labels, columns predictions.
        right: bool (images,): which were answered rightly, in their order.
    """

    top1: float
    top5: float
    loss: float
    confusion: Tensor
    right: Tensor


@torch.inference_mode()
def measure_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Run the network in eval mode over all batches; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    hits5 = total_loss = torch.zeros((), dtype=torch.float64, device=device)
    confusion: Tensor | None = None
    right: list[Tensor] = []
    for images, labels in batches:
        with autocast(device, dtype):
            logits = model(images)
        logits = logits.float()
        classes = logits.shape[1]
        top = logits.topk(min(5, classes)).indices == labels[:, None]
        right.append(top[:, 0])
        hits5 = hits5 + top.sum()
        total_loss = total_loss + F.cross_entropy(logits, labels, reduction="sum")
        pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
        confusion = pairs if confusion is None else confusion + pairs
    model.train(was_training)
    if confusion is None:
        raise ValueError("there are no batches to measure accuracy on")
    every, side = torch.cat(right).cpu(), int(len(confusion) ** 0.5)
    count = len(every)
    return Accuracy(
        top1=int(every.sum()) / count,
        top5=float(hits5) / count,
        loss=float(total_loss) / count,
        confusion=confusion.view(side, side).cpu(),
        right=every,
    )


def count_parameters(model: nn.Module) -> int:
    """Numbers in the network's parameters, weights and biases alike."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image (half of PyTorch's count of FLOPs).

    The network's memory format makes no difference to the count, nor is the network changed.
    """
    # In channels-last memory scattered channels are added by a convolution with zeros and ones, which is no work of
    # the network's: contiguous, they are not.
    network = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
    parameter = next(network.parameters())
    image = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass, in milliseconds."""

    p50: float
    p95: float


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module],
    input_shape: tuple[int, ...],
    batch_size: int,
    device: torch.device,
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Forward passes in float32, channels last, on random images.

    The models take turns, so that what else the machine does hits all alike; each has three passes to warm up first.

    Args:
        models: by name.
        input_shape: (C, H, W).
        batch_size: images in a pass.
        device: where the models are moved.
        repeats: timed passes of each.
        threads: of the CPU; all by default.
    """
    with _threads(threads):
        placed = {
            name: model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
            for name, model in models.items()
        }
        images = torch.randn(batch_size, *input_shape, generator=torch.Generator().manual_seed(0))
        images = images.to(device, memory_format=torch.channels_last)
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(repeats + 3):
            for name, model in placed.items():
                _synchronize(device)
                started = time.perf_counter()
                model(images)
                _synchronize(device)
                if turn >= 3:
                    times[name].append((time.perf_counter() - started) * 1e3)
    return {
        name: Latency(float(np.percentile(values, 50)), float(np.percentile(values, 95)))
        for name, values in times.items()
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
