"""Training steps of small networks replayed as CUDA graphs, for the benchmarks on a GPU.

Launching such a network's kernels one by one takes longer than running them, so all of a step is captured once, from
the images to the moved weights and their average, and replayed from then on. Before that is believed, losses of both
ways are compared on the GPU at hand. It is in no setting of the configuration until it has been seen to work on one.
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
_TOLERANCE = 0.01  # of the loss; bf16, and kernels that add up in another order


class Replayed(Step):
    """Steps that are the first few times launched, which is what libraries settle their algorithms in, then replayed.

    For SGD, in one process, and an objective that does the same for every batch of an epoch and waits for no result.
    The learning rate may change: the captured step reads it on the GPU.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(objective, optimizer)
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: Any = None
        self._taken = 0
        self._attentive = True
        self._rates: list[Tensor] = []
        for group in optimizer.param_groups:
            group["foreach"], group["fused"] = False, True  # only fused kernels read a rate on the GPU

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.device.type != "cuda":
            raise ValueError(f"only a GPU replays steps, and these images are on {images.device}")
        attentive = getattr(self.objective, "attentive", True)
        if attentive != self._attentive:  # another step than the one that was captured
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
        """Note down what a step does, without doing it."""
        self._images, self._labels = images.clone(), labels.clone()
        groups = self.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self._rates = [torch.tensor(number, device=images.device) for number in numbers]
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients lie in the graph's own memory
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._loss, self._logits = super().__call__(self._images, self._labels)
        for group, number in zip(groups, numbers, strict=True):
            group["lr"] = number


def compare(model: str, section: FinetuneSection) -> dict[str, float]:
    """Milliseconds of a step in both ways, and by how much their losses differ in the first few.

    Args:
        model: a factory's name.
        section: how it is trained; with its own copy as teacher, on noise.
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
    """Print what replaying gains, for networks given as (factory, settings); raises SystemExit where it is wrong."""
    for name, (model, section) in networks.items():
        figures = compare(model, section)
        print(name, json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)
        if not figures["losses_apart"] < _TOLERANCE:
            raise SystemExit(f"{name}: replayed steps do not train as launched ones do; give --steps compiled")
