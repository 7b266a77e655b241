"""Finding runs, and the records of their steps: on this machine, in S3, and where a cluster keeps its artifacts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from scop.errors import UserError
from scop.runtime.record import StepRecord
from scop.storage import files as storage
from scop.storage.manifest import RECORD
from scop.storage.s3 import Location

CONFIG = "config.yaml"
"""At a run's root: what it was to do. Of a cluster's run it is there if `scop submit` could put it there."""


def find_run(run: str, root: str) -> str:
    """The place of a run: a path, a URI, or its name in `root`; raises UserError where there is none."""
    for place in (run.rstrip("/"), storage.join(root, run)):
        place = place if storage.is_uri(place) else str(Path(place).expanduser().absolute())
        if _is_run(place):
            return place
    raise UserError(f"there is no run {run!r}, neither at this place nor in {root} (a run has a {CONFIG})")


def _is_run(place: str) -> bool:
    if storage.exists_at(place, CONFIG):
        return True
    # KFP's own layout is ROOT/PIPELINE/RUN_ID/...; what is less deep holds more than one run.
    if not storage.is_uri(place) or Location.parse(place).key.strip("/").count("/") < 1:
        return False
    return any(name.endswith(f"/{RECORD}") for name in storage.names(place))


def records_of(run: str) -> list[StepRecord]:
    """Of all steps of a run that began, in the order in which they did."""
    run = run.rstrip("/")
    records = []
    for file in storage.names(run):
        folder, _, name = file.rpartition("/")
        if name == RECORD:
            place = storage.join(run, file)
            records.append(StepRecord.parse(storage.read(place) or b"", place).found_in(run, folder))
    return sorted(records, key=lambda record: record.started or "")


def find_record(target: str, root: str) -> StepRecord:
    """The record that a target means.

    Args:
        target: of a record's file or of a step's output folder the path or URI; or RUN/STEP or RUN/VARIANT/STEP.
        root: where runs are, for a RUN that is neither a path nor a URI.

    Raises:
        UserError: there is none, or there are several.
    """
    direct = target if target.endswith(".json") else storage.join(target, RECORD)
    if (content := storage.read(direct, must_exist=False)) is not None:
        return StepRecord.parse(content, direct)
    for place in (target, storage.join(root, target)):
        run, _, step = place.rstrip("/").rpartition("/")
        for folder, variant in ((run, None), tuple(run.rpartition("/")[::2])):
            records = records_of(folder) if folder and _is_run(folder) else []
            if records:
                return _choose(records, step.replace("-", "_"), variant, folder)
    for place in (target, storage.join(root, target)):
        if _is_run(place):
            raise UserError(f"{target} is a run; say which step: {', '.join(r.title for r in records_of(place))}")
    where = "at this place" if storage.is_uri(target) else f"neither at this place nor in {root}"
    raise UserError(
        f"there is no step {target!r}, {where}; name a step's record, or RUN/STEP or RUN/VARIANT/STEP, RUN a run's "
        "folder or URI, or its name in --runs"
    )


def _choose(records: Sequence[StepRecord], step: str, variant: str | None, run: str) -> StepRecord:
    fitting = [r for r in records if r.step == step and variant in (None, r.variant)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        wanted = step if variant is None else f"{variant}/{step}"
        meant = difflib.get_close_matches(wanted, [r.title for r in records], n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"it has: {', '.join(r.title for r in records)}"
        raise UserError(f"{run} has no step {wanted!r} ({hint})")
    raise UserError(
        f"{run} has several steps {step!r}; say which: {', '.join(storage.join(run, r.title) for r in fitting)}"
    )
