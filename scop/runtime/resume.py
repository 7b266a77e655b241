"""Results and checkpoints of earlier attempts of a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from scop.environment import StepEnvironment
from scop.errors import UserError
from scop.runtime.exit_codes import Status
from scop.runtime.record import RecordFile, StepRecord, flat, read_record
from scop.runtime.result import StepResult
from scop.storage.cache import Cache
from scop.storage.checkpoints import Checkpoints
from scop.storage.files import is_s3, join_uri
from scop.storage.folders import fetch_folder, is_complete
from scop.storage.manifest import CHECKPOINTS, read_folder

logger = logging.getLogger(__name__)


def keep_result(now: StepRecord, outputs: Mapping[str, str], cache: Cache) -> StepResult | None:
    """Return the result of an earlier attempt if it is complete and its inputs are unchanged; log the reason if not.

    Args:
        now: record of the step to run.
        outputs: URIs by name.
        cache: the local cache.

    Raises:
        UserError: another process is running the step.
    """
    first = next(iter(outputs.values()))
    try:
        before = read_record(first)
    except UserError:
        logger.info("runs again: its record is damaged or of another version")
        return None
    if before is None:
        return None
    if before.is_running_elsewhere:
        raise UserError(f"process {before.machine.pid} on this machine is running this step; wait for it or stop it")
    if (reason := reason_to_run(now, before, outputs, cache)) is None:
        RecordFile(before, first).write(launch=before.launch.model_copy(update={"attempt": now.launch.attempt}))
        logger.info("kept: it finished in %.1f s, and its configuration and inputs are unchanged", before.seconds or 0)
        return before.result
    logger.info("runs again: %s", reason)
    return None


def reason_to_run(now: StepRecord, before: StepRecord, outputs: Mapping[str, str], cache: Cache) -> str | None:
    """Return why a step must run again, or None if its earlier result is complete and its inputs are unchanged.

    Args:
        now: record of the step to run.
        before: record of the earlier attempt.
        outputs: URIs by name.
        cache: the local cache.
    """
    if before.status is not Status.DONE or before.result is None:
        return f"it did not finish ({before.status})"
    config, earlier = flat(now.config), flat(before.config)
    changed = sorted(key for key in config.keys() | earlier.keys() if config.get(key) != earlier.get(key))
    if changed:
        return f"its configuration has changed ({', '.join(changed)})"
    if before.files != now.files:
        return f"{', '.join(before.files)} has changed"
    for name, value in now.inputs.items():
        if name not in before.inputs or before.inputs[name].content != value.content:
            return f"its input {name!r} has changed"
    for name, uri in outputs.items():
        try:
            if is_s3(uri) and not is_complete(uri):
                return f"{uri} is no longer complete"
            folder = fetch_folder(uri, cache) if is_s3(uri) else Path(uri)
            if name not in before.outputs or read_folder(folder).content != before.outputs[name].content:
                return f"its output {name!r} has changed"
        except UserError as error:
            return str(error)
    return None


def checkpoints_of(record: StepRecord, output: str, environment: StepEnvironment) -> Checkpoints:
    """Return the checkpoints of this step, configuration and inputs, in the configured folder or beside the output.

    Raises:
        UserError: the output folder holds checkpoints of another configuration or other inputs.
    """
    fingerprint, keep = record.fingerprint, environment.keep_checkpoints
    own = f"{record.step}-{fingerprint[:32]}"
    if environment.checkpoints:
        return Checkpoints(join_uri(environment.checkpoints, own), fingerprint, keep)
    if is_s3(output):
        return Checkpoints(join_uri(output, CHECKPOINTS, own), fingerprint, keep)
    folder = Path(output) / CHECKPOINTS
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name != own and any(other.glob("*.json")):
            raise UserError(
                f"checkpoint {other} belongs to another configuration or other inputs; delete it to start over, or "
                "choose another output folder"
            )
    return Checkpoints(str(folder / own), fingerprint, keep)
