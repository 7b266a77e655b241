"""Checkpoints of a training run that several processes share."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist

from scop.compute.distributed import rank
from scop.training.checkpointing import CheckpointStore


class SharedCheckpoints:
    """A store that only the first process writes and reads, on behalf of all.

    Args:
        store: the store that the first process uses.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    @property
    def uri(self) -> str:
        """The folder of the checkpoints."""
        return self._store.uri

    def part(self, name: str) -> SharedCheckpoints:
        """See `scop.storage.checkpoints.Checkpoints.part`."""
        return SharedCheckpoints(self._store.part(name))

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None:
        """See `scop.storage.checkpoints.Checkpoints.save`; raises in the first process only.

        All processes wait for the write: if one exited earlier, the launcher would stop the process that writes.
        """
        try:
            if rank() == 0:
                self._store.save(state, epochs, steps)
        finally:
            dist.all_reduce(torch.zeros(1))

    def load(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint in all processes; only the first needs access to the store."""
        content = b""
        if rank() == 0 and (state := self._store.load()) is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            content = buffer.getvalue()
        size = torch.tensor(len(content))
        dist.broadcast(size, 0)
        if not size:
            return None
        packed = torch.empty(int(size), dtype=torch.uint8)
        if content:
            packed = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(packed, 0)
        loaded: dict[str, Any] = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
        return loaded
