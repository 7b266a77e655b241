"""Passes of small networks replayed as CUDA graphs, for the benchmarks on a GPU.

Launching such a network's kernels one by one takes longer than running them.
``python -m tests.benchmarks.graphs`` compares losses and speed of both ways on a GPU, to be run before the rest is
believed; it is in no setting of the configuration until it has been.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from scop import make_model
from scop.config import DistillationSection, FinetuneSection
from scop.device import autocast, pick_device
from scop.distillation import Watched
from scop.supervised import Supervised, make_optimizer
from tests.benchmarks.measure import machine, take_turns

_WARMUP = 3
_CHECKED = 20  # steps


class Graphed(Supervised):
    """The same training, its passes forward and backward, and the teacher's, replayed; no other without a GPU."""

    def _begin(self, images: Tensor) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        forward = super()._begin(images)
        if images.device.type != "cuda":
            return forward
        assert self._watched is not None
        if self._distillation is not None:
            with autocast(images.device, self.dtype):
                self._distillation._teacher = Replayed(self._distillation._teacher, images)
        # Capturing runs the network on these images a few times, of which its batch norms are to know nothing.
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        # Weights that were cast once must not be kept: each replay has to cast them anew.
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            graphed: Any = torch.cuda.make_graphed_callables(self._watched, (images.clone(),))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])
        replay: Callable[[Tensor], tuple[Tensor, list[Tensor]]] = graphed
        return replay


class Replayed(Watched):
    """A watched network's pass without gradients, captured once.

    Args:
        watched: in eval mode; it is called no more.
        images: (B, C, H, W), as all that follow are.
    """

    def __init__(self, watched: Watched, images: Tensor) -> None:
        super().__init__(watched.network)
        self._hooks += watched._hooks
        self._images = images.clone()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(_WARMUP):
                watched(self._images)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._answer = watched(self._images)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the network gave; overwritten by the next call."""
        self._images.copy_(images)
        self._graph.replay()
        answer: tuple[Tensor, list[Tensor]] = self._answer
        return answer


def compare(name: str, batch_size: int = 128) -> dict[str, float]:
    """Milliseconds of a step in both ways, and by how much their losses differ in the first few."""
    device = pick_device()
    torch.manual_seed(0)
    teacher = make_model(name, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    section = FinetuneSection(lr=0.01, ema=0.998, distillation=DistillationSection(weight=0.9, attention=50))
    steps: dict[str, Callable[[], Tensor]] = {}
    losses: dict[str, list[float]] = {}
    for way, kind in {"launched": Supervised, "replayed": Graphed}.items():
        student = deepcopy(teacher)
        frozen = deepcopy(teacher).eval().requires_grad_(False)
        objective = kind(student, device, section, frozen, section.distillation)
        steps[way] = _step(objective, make_optimizer(student, section), images, labels)
        objective.start_epoch()
        losses[way] = [float(steps[way]()) for _ in range(_CHECKED)]
    apart = max(abs(one - two) / abs(one) for one, two in zip(*losses.values(), strict=True))
    seconds = take_turns(steps, turns=50)
    return {**{f"{way}_ms": 1000 * value for way, value in seconds.items()}, "losses_apart": apart}


def _step(
    objective: Supervised, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss, _ = objective.loss(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        objective.after_step()
        return loss.detach()

    return step


if __name__ == "__main__":
    print(json.dumps({name: compare(name) for name in sys.argv[1:] or ("resnet20", "resnet56")} | machine(), indent=1))
