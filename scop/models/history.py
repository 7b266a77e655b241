"""The epochs of a training run, and the files that record them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from scop.compute.device import describe_device
from scop.storage.manifest import TIMINGS


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: means over its batches, and the validation split's figures where there is one.

    Attributes:
        epoch: counted from 1.
        lr: at the epoch's end.
        loss, top1: on the training batches as they were trained on; top1 in [0, 1], None where nothing is classified.
        validation_loss, validation_top1: after the epoch.
        seconds: for training, validation left out.
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
        """All figures that there are, by name, without the epoch's number."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "epoch"}


HISTORY = "history.json"


def save_history(history: list[EpochRecord], folder: Path, device: torch.device | None = None) -> None:
    """Write the epochs of a training: history.json; and what no rerun reproduces, seconds and device: timings.json."""
    records = [{key: value for key, value in asdict(record).items() if key != "seconds"} for record in history]
    (folder / HISTORY).write_text(json.dumps(records, indent=1) + "\n")
    timings = {"epoch_seconds": [record.seconds for record in history]}
    described = {} if device is None else {"device": describe_device(device)}
    (folder / TIMINGS).write_text(json.dumps(timings | described) + "\n")


def load_history(folder: Path) -> list[EpochRecord]:
    """The epochs of a training; empty where none were recorded."""
    if not (folder / HISTORY).exists():
        return []
    seconds = json.loads((folder / TIMINGS).read_text())["epoch_seconds"]
    records = json.loads((folder / HISTORY).read_text())
    return [EpochRecord(**record, seconds=spent) for record, spent in zip(records, seconds, strict=True)]


def trained_on(folder: Path) -> str | None:
    """The device of a training; None where it was not recorded, or there was none."""
    path = folder / TIMINGS
    device = json.loads(path.read_text()).get("device") if path.exists() else None
    return None if device is None else str(device)
