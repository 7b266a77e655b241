"""Checkpoints of training runs, in a folder or in S3: the newest whole one is where a killed run goes on.

A checkpoint is two files, ``EPOCHS-STEPS.pt`` and, written after it, ``EPOCHS-STEPS.json`` with its size and sha256.
They lie in a folder named after the step's configuration and inputs, so one of another configuration is never taken.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from typing import Any

from scop.errors import DamagedError
from scop.storage import files as storage


@dataclass(frozen=True)
class Checkpoints:
    """Where a training run keeps its states.

    Attributes:
        place: a path or an ``s3://`` URI, for this run alone.
        fingerprint: of everything that the result depends on: configuration and inputs.
        keep: so many are kept.
    """

    place: str
    fingerprint: str
    keep: int = 2

    def part(self, name: str) -> Checkpoints:
        """Those of a training within the run; they are removed with it."""
        return replace(self, place=storage.join(self.place, name))

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None:
        """Write a state, and remove what is older than the `keep` newest.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.
            epochs: that are done.
            steps: of the next epoch that are done.
        """
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content, name = buffer.getvalue(), f"{epochs:05}-{steps:08}"
        seal = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "fingerprint": self.fingerprint}
        storage.write(storage.join(self.place, f"{name}.pt"), content)
        storage.write(storage.join(self.place, f"{name}.json"), json.dumps(seal).encode())
        for old in self._names()[: -self.keep]:
            if old != name:  # which counts less than damaged ones that could not be removed
                self._delete(old)

    def load(self) -> dict[str, Any] | None:
        """The newest whole state, or None where there is none; damaged ones are passed over with a warning.

        And removed, since those that follow count fewer epochs: a damaged one would be kept in place of a whole one.

        Raises:
            UserError: they cannot be read now; to start over would cost all that was done.
        """
        import torch

        for name in reversed(self._names()):
            place = storage.join(self.place, f"{name}.pt")
            try:
                seal = json.loads(storage.read(storage.join(self.place, f"{name}.json"), must_exist=False) or b"{}")
                content = storage.read(place, must_exist=False) or b""
                if hashlib.sha256(content).hexdigest() != seal["sha256"]:
                    raise ValueError("it does not match its checksum")
                if seal["fingerprint"] != self.fingerprint:
                    raise ValueError("it is of another configuration or other inputs")
                state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
                return state
            except (DamagedError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
                print(f"warning: checkpoint {place} is passed over: {error}", flush=True)
                if not isinstance(error, DamagedError):  # which may be a bad connection
                    self._delete(name)
        return None

    def remove(self) -> None:
        """Remove all, once the result is whole."""
        names = storage.names(self.place)
        storage.delete(self.place, [name for name in names if name.endswith(".json")])
        storage.delete(self.place, [name for name in names if not name.endswith(".json")])

    def _delete(self, name: str) -> None:
        # The seal first: what lacks one is not taken.
        storage.delete(self.place, [f"{name}.json"])
        storage.delete(self.place, [f"{name}.pt"])

    def _names(self) -> list[str]:
        """What is sealed, oldest first."""
        own = [name for name in storage.names(self.place) if "/" not in name]
        return [name.removesuffix(".json") for name in own if name.endswith(".json")]
