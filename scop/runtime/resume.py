"""What earlier tries of a step left: a result that can be kept, checkpoints to go on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from scop.errors import UserError
from scop.runtime.record import RecordFile, StepRecord, earlier_record, reason_to_run
from scop.runtime.result import StepResult
from scop.storage import files as storage
from scop.storage.checkpoints import Checkpoints
from scop.storage.manifest import CHECKPOINTS

CHECKPOINTS_VARIABLE = "SCOP_CHECKPOINTS"
KEEP_VARIABLE = "SCOP_KEEP_CHECKPOINTS"
RESUME_VARIABLE = "SCOP_RESUME"
"""Set by `scop run --resume`: a step whose output is there, whole and of the same making, is not run again."""


def kept(now: StepRecord, outputs: Mapping[str, str]) -> StepResult | None:
    """The result of an earlier try, if it is whole and was made of the same; says why, or why not."""
    try:
        before = earlier_record(next(iter(outputs.values())))
    except UserError:
        print("runs again: its record is damaged, or of another version", flush=True)
        return None
    if before is None:
        return None
    if before.still_runs:
        raise UserError(f"it still runs, as process {before.process} of this machine; wait for it, or end it")
    if (reason := reason_to_run(now, before, outputs)) is None:
        RecordFile(before, next(iter(outputs.values()))).write(attempt=now.attempt)
        print(f"kept: it finished in {before.seconds or 0:.1f} s; all that it is made of is unchanged", flush=True)
        return before.result
    print(f"runs again: {reason}", flush=True)
    return None


def _how_many() -> int:
    text = os.environ.get(KEEP_VARIABLE, "2")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{KEEP_VARIABLE} is {text!r}; it must be a number of checkpoints, 1 or more")
    return int(text)


def checkpoints_of(record: StepRecord, output: str) -> Checkpoints:
    """Those of this very work: under SCOP_CHECKPOINTS, or else beside the output."""
    fingerprint = record.fingerprint
    own, keep = f"{record.step}-{fingerprint[:32]}", _how_many()
    if place := os.environ.get(CHECKPOINTS_VARIABLE):
        return Checkpoints(storage.join(place, own), fingerprint, keep)
    if storage.is_uri(output):
        return Checkpoints(storage.join(output, CHECKPOINTS, own), fingerprint, keep)
    folder = Path(output) / CHECKPOINTS
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name != own and any(other.glob("*.json")):
            raise UserError(
                f"checkpoint {other} was made with another configuration or other inputs; delete it to start over, or "
                "choose another output folder"
            )
    return Checkpoints(str(folder / own), fingerprint, keep)
