"""Lookup of runs and of their steps' records: on this machine, in S3 and below a cluster's pipeline root."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from scop.errors import UserError
from scop.runtime.record import StepRecord
from scop.storage.files import file_exists, is_s3, join_uri, list_files, read_bytes, read_if_exists
from scop.storage.manifest import RECORD
from scop.storage.s3 import Location

CONFIG = "config.yaml"
"""Name of the configuration file of a run. For a run on a cluster, `scop submit` writes it if possible."""


def find_run(run: str, root: str) -> str:
    """Return the folder or URI of a run, given this or its name in `root`; raise UserError if there is no such run."""
    for uri in (run.rstrip("/"), join_uri(root, run)):
        uri = uri if is_s3(uri) else str(Path(uri).expanduser().absolute())
        if _is_run(uri):
            return uri
    raise UserError(f"there is no run {run!r}, neither at this path nor in {root} (a run has a {CONFIG})")


def _is_run(uri: str) -> bool:
    if file_exists(uri, CONFIG):
        return True
    # KFP's own layout is ROOT/PIPELINE/RUN_ID/...; a shorter prefix contains several runs.
    if not is_s3(uri) or Location.parse(uri).key.strip("/").count("/") < 1:
        return False
    return any(name.endswith(f"/{RECORD}") for name in list_files(uri))


def records_of(run: str) -> list[StepRecord]:
    """Return the records of all started steps of a run, in the order in which they started."""
    run = run.rstrip("/")
    records = []
    for file in list_files(run):
        folder, _, name = file.rpartition("/")
        if name == RECORD:
            uri = join_uri(run, file)
            records.append(StepRecord.parse(read_bytes(uri), uri).relocated(run, folder))
    return sorted(records, key=lambda record: record.started or "")


def find_record(target: str, root: str) -> StepRecord:
    """Return a step's record.

    Args:
        target: path or URI of the record's file or of the step's output folder; or RUN/STEP or RUN/VARIANT/STEP.
        root: folder or URI of the runs, for a RUN that is neither a path nor a URI.

    Raises:
        UserError: there is no such record, or there are several.
    """
    direct = target if target.endswith(".json") else join_uri(target, RECORD)
    if (content := read_if_exists(direct)) is not None:
        return StepRecord.parse(content, direct)
    for uri in (target, join_uri(root, target)):
        run, _, step = uri.rstrip("/").rpartition("/")
        for folder, variant in ((run, None), tuple(run.rpartition("/")[::2])):
            records = records_of(folder) if folder and _is_run(folder) else []
            if records:
                return _choose(records, step.replace("-", "_"), variant, folder)
    for uri in (target, join_uri(root, target)):
        if _is_run(uri):
            raise UserError(f"{target} is a run; add the step: {', '.join(r.title for r in records_of(uri))}")
    where = "at this URI" if is_s3(target) else f"neither at this path nor in {root}"
    raise UserError(
        f"there is no step {target!r}, {where}; name a step's record, or RUN/STEP or RUN/VARIANT/STEP, RUN being a "
        "run's folder or URI, or its name in --runs"
    )


def _choose(records: Sequence[StepRecord], step: str, variant: str | None, run: str) -> StepRecord:
    matching = [r for r in records if r.step == step and variant in (None, r.variant)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        wanted = step if variant is None else f"{variant}/{step}"
        near = difflib.get_close_matches(wanted, [r.title for r in records], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(r.title for r in records)}"
        raise UserError(f"{run} has no step {wanted!r} ({hint})")
    raise UserError(
        f"{run} has several steps {step!r}; choose one: {', '.join(join_uri(run, r.title) for r in matching)}"
    )
