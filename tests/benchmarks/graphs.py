"""Training steps of small networks replayed as CUDA graphs, for the benchmarks on a GPU.

Launching the kernels of such a network takes longer than running them. A whole step, from the images to the updated
weights and their average, is therefore captured once and then replayed. `check_replays` first compares the losses of
replayed and launched steps on the GPU. No configuration setting enables replays until they are verified on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scop import make_model
from scop.compute.device import pick_device
from scop.config import FinetuneSection
from scop.training.loop import Objective, Step
from scop.training.supervised import Supervised, make_optimizer
from tests.benchmarks.measure import take_turns

_WARMUP = 3
_CHECKED = 20  # steps
_TOLERANCE = 0.01  # relative difference of the losses, from bf16 and another order of sums


class Replayed(Step):
    """Launches the first few steps, in which libraries choose their algorithms, then replays a captured step.

    Requires SGD, a single process, and an objective that runs the same operations for every batch of an epoch without
    waiting for the GPU. The learning rate may change: the captured step reads it from GPU memory.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(objective, optimizer)
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: Any = None
        self._taken = 0
        self._attentive = True
        self._rates: list[Tensor] = []
        for group in optimizer.param_groups:
            group["foreach"], group["fused"] = False, True  # only fused kernels read the learning rate from GPU memory

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.device.type != "cuda":
            raise ValueError(f"steps can be replayed only on a GPU, but the images are on {images.device}")
        attentive = getattr(self.objective, "attentive", True)
        if attentive != self._attentive:  # the captured step is another one
            self._attentive, self._graph, self._taken = attentive, None, 0
        if self._taken < _WARMUP:
            self._taken += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                loss, logits = super().__call__(images, labels)
            torch.cuda.current_stream().wait_stream(self._stream)
            return loss.clone(), None if logits is None else logits.clone()
        if self._graph is None:
            self._capture(images, labels)
        self._images.copy_(images)
        self._labels.copy_(labels)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        return self._loss.clone(), None if self._logits is None else self._logits.clone()

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """Capture a step without running it."""
        self._images, self._labels = images.clone(), labels.clone()
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self._rates = [torch.tensor(number, device=images.device) for number in numbers]
        self.optimizer.zero_grad(set_to_none=True)  # gradients must be in the graph's memory pool
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss, self._logits = super().__call__(self._images, self._labels)
        for group, number in zip(groups, numbers, strict=True):
            group["lr"] = number


def compare(model: str, section: FinetuneSection) -> dict[str, float]:
    """Return the milliseconds of launched and replayed steps and the largest relative difference of their losses.

    Args:
        model: name of a factory.
        section: training settings. The teacher is a copy of the model, the images are noise.
    """
    device = pick_device()
    torch.manual_seed(0)
    teacher = make_model(model, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(section.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (section.batch_size,), device=device)
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for way, kind in {"launched": Step, "replayed": Replayed}.items():
        student = deepcopy(teacher)
        frozen = deepcopy(teacher).eval().requires_grad_(False)
        objective = Supervised(student, device, section, frozen, section.distillation)
        optimizer = make_optimizer(student, section)
        steps[way] = kind(objective, optimizer)
        objective.start_epoch(0)
        losses[way] = []
        for number in range(_CHECKED):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * section.lr * (1 + number) / _CHECKED
            losses[way].append(float(steps[way](images, labels)[0]))
    apart = max(abs(one - two) / abs(one) for one, two in zip(*losses.values(), strict=True))
    seconds = take_turns({way: partial(step, images, labels) for way, step in steps.items()}, turns=50)
    return {**{f"{way}_ms": 1000 * value for way, value in seconds.items()}, "losses_apart": apart}


def check_replays(networks: Mapping[str, tuple[str, FinetuneSection]]) -> None:
    """Print the speed of launched and replayed steps of networks, given as (factory, settings).

    Raises:
        SystemExit: the losses of launched and replayed steps differ.
    """
    for name, (model, section) in networks.items():
        figures = compare(model, section)
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if not figures["losses_apart"] < _TOLERANCE:
            raise SystemExit(f"{name}: losses of replayed and launched steps differ; use --steps compiled")
