"""Training in several processes, one per GPU, with the same result as in one process.

Each process takes its shard of each batch; PyTorch's DistributedDataParallel averages the gradients. This module
contains the collective operations for everything else: batch statistics, metrics, checkpoints, and the decision to
stop. In a single process they return their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Shard = tuple[int, int]
"""This process's part of each batch: its index, and the number of parts."""

WHOLE: Shard = (0, 1)


def shard() -> Shard:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def rank() -> int:
    """Return this process's rank; rank 0 writes the shared outputs."""
    return shard()[0]


def is_distributed() -> bool:
    """Whether more than one process trains."""
    return shard()[1] > 1


@contextmanager
def process_group(local_rank: int) -> Iterator[None]:
    """Join the processes that torchrun started, within the context.

    Args:
        local_rank: index of this process in its pod; selects its GPU, if there are GPUs.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module with its gradients averaged over all processes after each backward pass.

    Args:
        module: module on the device; every forward pass uses all its trained parameters.
        device: device of this process.
    """
    if not is_distributed():
        return module
    own = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=own, gradient_as_bucket_view=True)


def all_reduce_mean(*values: float) -> list[float]:
    """Return each value's mean over all processes. All processes must call this."""
    if not is_distributed():
        return list(values)
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return [float(value) for value in totals / shard()[1]]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, in place. All processes must call this."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return the tensors of every process, by rank; CPU tensors of the same shapes in all processes."""
    if not is_distributed():
        return [tensors]
    columns = []
    for tensor in tensors:
        column = [torch.empty_like(tensor) for _ in range(shard()[1])]
        dist.all_gather(column, tensor)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def broadcast_text(text: str) -> str:
    """Return the first process's text in all processes."""
    if not is_distributed():
        return text
    content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(content))
    dist.broadcast(length, 0)
    content = content if rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def broadcast_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers to all processes."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def any_process(condition: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that returns whether the condition holds in any process, the same answer in all of them.

    A process that stopped alone would leave the others waiting for its gradients. The answer is one step old, so
    no process waits for it.
    """
    if not is_distributed():
        return condition
    pending: list[tuple[Any, Tensor]] = []

    def agreed() -> bool:
        flag = torch.tensor(int(condition()))
        pending.append((dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag))
        if len(pending) == 1:
            return False
        work, before = pending.pop(0)
        work.wait()
        return bool(before)

    return agreed
