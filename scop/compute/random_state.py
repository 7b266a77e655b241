"""Seeding of random number generators that leaves the caller's random state unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def private_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of the CPU and, if CUDA is in use, of all GPUs at the end of the context.

    Args:
        seed: seed within the context; by default the states stay as they are.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if _uses_cuda() else []):
        if seed is not None:
            seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed the generators of the CPU and, if CUDA is in use, of all GPUs.

    `torch.manual_seed` alone would also seed GPUs that the caller starts to use later.
    """
    if _uses_cuda():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
