"""Measurements of networks: accuracy, parameters, multiply-accumulates, latency."""

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
    """Accuracy of a network on a set of images.

    Attributes:
        top1, top5: fractions in [0, 1]; with fewer than 5 classes, top5 is top-k for k classes.
        loss: mean cross-entropy.
        confusion: int64 (classes, classes): rows are true labels, columns are predictions.
        right: bool (images,): whether each image is classified correctly, in the order of the batches.
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
    """Evaluate the network on all batches, in eval mode; its training mode is restored afterwards.

    Args:
        model: the network, on the device.
        batches: images (N, C, H, W) and labels (N,), on the device.
        device: device to compute on.
        dtype: dtype of convolutions and matrix products.

    Raises:
        ValueError: there are no batches.
    """
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
        raise ValueError("accuracy cannot be measured: there are no batches")
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
    """Return the number of scalar parameters: weights and biases."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one image: half of PyTorch's FLOP count.

    The count does not depend on the network's memory format. The network is not changed.
    """
    # In channels-last memory, scattered channels are added by a convolution with a 0/1 matrix, which is not part of
    # the network and must not count. In contiguous memory there is no such convolution.
    network = copy.deepcopy(model).to(memory_format=torch.contiguous_format).eval()
    parameter = next(network.parameters())
    image = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile of the duration of a forward pass, in milliseconds."""

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
    """Measure forward passes in float32, channels last, on random images.

    The models run alternately, so that other load on the machine affects all of them equally. Each model first runs
    three passes to warm up.

    Args:
        models: the networks in float32, by name; they are moved to the device and set to eval mode.
        input_shape: (C, H, W) of an image.
        batch_size: number of images in a pass.
        device: device to measure on.
        repeats: number of timed passes of each model.
        threads: number of CPU threads; by default PyTorch's current setting.

    Returns:
        The latency of each model, by name.
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
