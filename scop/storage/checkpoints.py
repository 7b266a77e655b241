"""Checkpoints of training runs, in a folder or in S3; a killed run resumes from the newest intact one.

A checkpoint is two files, ``EPOCHS-STEPS.pt`` and, written after it, ``EPOCHS-STEPS.json`` with its size and sha256.
Their folder is named after the step's configuration and inputs, so a checkpoint of another configuration is never used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import dataclass, replace
from typing import Any

from scop.errors import DamagedError
from scop.storage.files import delete_files, join_uri, list_files, read_if_exists, write_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a training run.

    Attributes:
        uri: their folder, a path or an ``s3://`` URI, for this run alone.
        fingerprint: hash of everything that the result depends on: configuration and inputs.
        keep: number of checkpoints kept.
    """

    uri: str
    fingerprint: str
    keep: int = 2

    def part(self, name: str) -> Checkpoints:
        """Return the checkpoints of one training within the run; they are removed together with those of the run."""
        return replace(self, uri=join_uri(self.uri, name))

    def save(self, state: dict[str, Any], epochs: int, steps: int = 0) -> None:
        """Write a checkpoint, and remove all but the `keep` newest.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.
            epochs: number of finished epochs.
            steps: number of finished steps of the next epoch.
        """
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content, name = buffer.getvalue(), f"{epochs:05}-{steps:08}"
        seal = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "fingerprint": self.fingerprint}
        write_bytes(join_uri(self.uri, f"{name}.pt"), content)
        write_bytes(join_uri(self.uri, f"{name}.json"), json.dumps(seal).encode())
        for old in self._names()[: -self.keep]:
            if old != name:  # it sorts before damaged ones that could not be removed
                self._delete(old)

    def load(self) -> dict[str, Any] | None:
        """Load the newest intact checkpoint, or return None if there is none.

        Damaged ones are skipped with a warning and removed: the next checkpoints have fewer epochs, so a damaged one
        would be kept instead of them.

        Raises:
            UserError: checkpoints cannot be read now; starting over would lose all progress.
        """
        import torch

        for name in reversed(self._names()):
            uri = join_uri(self.uri, f"{name}.pt")
            try:
                seal = json.loads(read_if_exists(join_uri(self.uri, f"{name}.json")) or b"{}")
                content = read_if_exists(uri) or b""
                if hashlib.sha256(content).hexdigest() != seal["sha256"]:
                    raise ValueError("it does not match its checksum")
                if seal["fingerprint"] != self.fingerprint:
                    raise ValueError("it belongs to another configuration or other inputs")
                state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
                return state
            except (DamagedError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
                logger.warning("checkpoint %s is skipped: %s", uri, error)
                if not isinstance(error, DamagedError):  # the cause may be a bad connection
                    self._delete(name)
        return None

    def remove(self) -> None:
        """Remove all checkpoints, once the result is complete."""
        names = list_files(self.uri)
        delete_files(self.uri, [name for name in names if name.endswith(".json")])
        delete_files(self.uri, [name for name in names if not name.endswith(".json")])

    def _delete(self, name: str) -> None:
        # Delete the JSON file first: a checkpoint without it is not used.
        delete_files(self.uri, [f"{name}.json"])
        delete_files(self.uri, [f"{name}.pt"])

    def _names(self) -> list[str]:
        """Return the names of complete checkpoints, oldest first."""
        own = [name for name in list_files(self.uri) if "/" not in name]
        return [name.removesuffix(".json") for name in own if name.endswith(".json")]
