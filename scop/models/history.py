"""The epochs of a training run, and the files that record them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from scop.compute.device import describe_device
from scop.storage.manifest import TIMINGS

HISTORY = "history.json"


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: means over its batches, and the metrics of the validation split if there is one.

    Attributes:
        epoch: counted from 1.
        lr: learning rate at the end of the epoch.
        loss: mean over the training batches.
        top1: accuracy on the training batches, in [0, 1]; None without logits.
        validation_loss, validation_top1: after the epoch.
        seconds: duration of the training, without validation.
    """

    epoch: int
    lr: float
    loss: float
    top1: float | None
    seconds: float
    validation_loss: float | None = None
    validation_top1: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Return all known values by name, without the epoch's number."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "epoch"}


def save_history(history: list[EpochRecord], folder: Path, device: torch.device | None = None) -> None:
    """Write the epochs to history.json, and values that differ between runs (seconds, device) to timings.json."""
    records = [{key: value for key, value in asdict(record).items() if key != "seconds"} for record in history]
    (folder / HISTORY).write_text(json.dumps(records, indent=1) + "\n")
    timings = {"epoch_seconds": [record.seconds for record in history]}
    described = {} if device is None else {"device": describe_device(device)}
    (folder / TIMINGS).write_text(json.dumps(timings | described) + "\n")


def load_history(folder: Path) -> list[EpochRecord]:
    """Read the epochs of a training run; an empty list if none were recorded."""
    if not (folder / HISTORY).exists():
        return []
    seconds = json.loads((folder / TIMINGS).read_text())["epoch_seconds"]
    records = json.loads((folder / HISTORY).read_text())
    return [EpochRecord(**record, seconds=spent) for record, spent in zip(records, seconds, strict=True)]


def trained_on(folder: Path) -> str | None:
    """Return the device of a training run, or None if it was not recorded."""
    path = folder / TIMINGS
    device = json.loads(path.read_text()).get("device") if path.exists() else None
    return None if device is None else str(device)
