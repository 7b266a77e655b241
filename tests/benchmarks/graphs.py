"""Training steps of small networks replayed as CUDA graphs, for the benchmarks on a GPU.

Launching such a network's kernels one by one takes longer than running them, so all of a step is captured once, from
the images to the moved weights and their average, and replayed from then on. ``python -m tests.benchmarks.graphs``
compares losses and speed of both ways on a GPU, to be run before the rest is believed; it is in no setting of the
configuration until it has been.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from scop import make_model
from scop.config import DistillationSection, FinetuneSection
from scop.device import pick_device
from scop.supervised import Supervised, make_optimizer
from scop.training import Objective, Step
from tests.benchmarks.measure import machine, take_turns

_WARMUP = 3
_CHECKED = 20  # steps


class Replayed(Step):
    """Steps that are the first few times launched, which is what libraries settle their algorithms in, then replayed.

    The objective must do the same for every batch, in the network's own process alone, and wait for no result. The
    learning rate may change: the captured step reads it on the GPU.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(objective, optimizer)
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: Any = None
        self._taken = 0
        self._rates: list[Tensor] = []
        for group in optimizer.param_groups:
            group["foreach"], group["fused"] = False, True  # only fused kernels read a rate on the GPU

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.device.type != "cuda":
            raise ValueError(f"only a GPU replays steps, and these images are on {images.device}")
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


def compare(name: str, batch_size: int = 128) -> dict[str, float]:
    """Milliseconds of a step in both ways, and by how much their losses differ in the first few."""
    device = pick_device()
    torch.manual_seed(0)
    teacher = make_model(name, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    section = FinetuneSection(lr=0.01, ema=0.998, distillation=DistillationSection(weight=0.9, attention=50))
    steps: dict[str, Step] = {}
    losses: dict[str, list[float]] = {}
    for way, kind in {"launched": Step, "replayed": Replayed}.items():
        student = deepcopy(teacher)
        frozen = deepcopy(teacher).eval().requires_grad_(False)
        objective = Supervised(student, device, section, frozen, section.distillation)
        optimizer = make_optimizer(student, section)
        steps[way] = kind(objective, optimizer)
        objective.start_epoch()
        losses[way] = []
        for number in range(_CHECKED):
            for group in optimizer.param_groups:
                group["lr"] = section.lr * (1 + number) / _CHECKED
            losses[way].append(float(steps[way](images, labels)[0]))
    apart = max(abs(one - two) / abs(one) for one, two in zip(*losses.values(), strict=True))
    seconds = take_turns({way: lambda step=step: step(images, labels) for way, step in steps.items()}, turns=50)  # type: ignore[misc]
    return {**{f"{way}_ms": 1000 * value for way, value in seconds.items()}, "losses_apart": apart}


if __name__ == "__main__":
    names = sys.argv[1:] or ("resnet20", "resnet56", "torchvision:resnet50")
    every = {f"{name}, batches of {size}": compare(name, size) for name in names for size in (128, 512)}
    print(json.dumps(every | machine(), indent=1))
