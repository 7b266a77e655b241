"""Training by several processes, one on each GPU, with the result that one process would have.

Every process takes its share of each batch; gradients are averaged by PyTorch's DistributedDataParallel. What one
process knows and the others need goes through here: batch statistics, figures, checkpoints, and the wish to stop. In a
single process everything is as if this module were not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    pass

Share = tuple[int, int]
"""Which part of each batch is this process's, counted from 0, and of how many."""

WHOLE: Share = (0, 1)


def share() -> Share:
    """That of this process: its rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def rank() -> int:
    """Of this process; the first, 0, writes what is written once."""
    return share()[0]


def several() -> bool:
    """Whether more than one process trains."""
    return share()[1] > 1


@contextmanager
def process_group() -> Iterator[None]:
    """Within, this process is one of those that torchrun started; its GPU, where there are any, is the current one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, its gradients averaged over the processes after each backward pass.

    Args:
        module: on the device; all its trained parameters take part in each forward pass.
        device: of this process.
    """
    if not several():
        return module
    own = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=own, gradient_as_bucket_view=True)


def mean(*values: float) -> list[float]:
    """Each value's mean over the processes, which all must ask for it."""
    if not several():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return [float(value) for value in totals / share()[1]]


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, which all must ask for it; in place."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def gathered(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those of every process, by rank; on the CPU, and of the same shapes everywhere."""
    if not several():
        return [tensors]
    columns = []
    for tensor in tensors:
        column = [torch.empty_like(tensor) for _ in range(share()[1])]
        dist.all_gather(column, tensor)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def of_the_first(text: str) -> str:
    """The first process's text, in all of them."""
    if not several():
        return text
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(content))
    dist.broadcast(length, 0)
    content = content if rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def spread_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers."""
    if several():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def agreed(told: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process was told to stop, which all learn at the same step.

    A process that stopped by itself would leave the others waiting for its gradients for ever. The answer is that of
    one step ago: it is there already, so nobody waits for it.
    """
    if not several():
        return told
    asked: list[tuple[Any, Tensor]] = []

    def stopping() -> bool:
        flag = torch.tensor(int(told()))
        asked.append((dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag))
        if len(asked) == 1:
            return False
        work, before = asked.pop(0)
        work.wait()
        return bool(before)

    return stopping
