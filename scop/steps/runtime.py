"""The life of a step, the same wherever it runs: in a KFP component, in docker, or by `scop step`.

A step is a module of `scop.steps` with a ``Config`` (its sections), ``Inputs`` and ``Outputs`` (its folders) and a
``run``. The runtime validates the configuration and the inputs, writes `step.json` beside the outputs before any work
starts, opens the tracking run, lets the step work, and closes. A user's mistake ends with exit code 2 and one line;
anything else with 1 and the traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

import scop
from scop.config import Section, parse
from scop.errors import UserError
from scop.manifest import MANIFEST, RECORD, read_folder, write_atomically
from scop.steps import STEPS
from scop.tracking import UNSENT, MlflowTracker, NoTracker, Tracker, first_line

if TYPE_CHECKING:
    import torch

    from scop.training import Checkpoint, EpochRecord

RUN_VARIABLE = "SCOP_RUN_ID"
IMAGE_VARIABLE = "SCOP_IMAGE"


@dataclass(frozen=True)
class StepResult:
    """What a step tells its caller beside its output folders.

    Attributes:
        metrics: headline figures by name.
        classes, confusion: class names, and counts with true labels in rows, where the step measured accuracy.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What the runtime offers to a step.

    Attributes:
        tracker: where figures go.
        fingerprint: of the step's configuration and inputs, for checkpoints.
    """

    tracker: Tracker
    fingerprint: str

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on; see `scop.device.pick_device`."""
        from scop.device import pick_device

        return pick_device()

    def checkpoint(self, folder: Path) -> Checkpoint:
        """The checkpoint of a training in an output folder."""
        from scop.training import Checkpoint

        return Checkpoint(folder / "checkpoint.pt", self.fingerprint)

    def on_epoch(self, record: EpochRecord) -> None:
        """Track an epoch."""
        self.tracker.log_metrics(record.metrics, step=record.epoch)


class StepModule(Protocol):
    """What a module of `scop.steps` holds."""

    Config: type[Section]
    Inputs: type[Any]
    Outputs: type[Any]

    @staticmethod
    def run(config: Any, inputs: Any, outputs: Any, context: Context) -> StepResult: ...


def find_step(name: str) -> StepModule:
    """The module of a step, by its name; raises UserError where there is none."""
    if name not in STEPS:
        raise UserError(f"step {name!r} is unknown (known: {', '.join(STEPS)})")
    module: StepModule = importlib.import_module(f"scop.steps.{name}")  # type: ignore[assignment]
    return module


def execute(
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | list[str]],
    outputs: Mapping[str, str],
) -> StepResult:
    """Run a step, and leave the process where it fails.

    Args:
        name: of the step.
        config: its sections by name, each a mapping.
        inputs: input folders by name; a list of folders where the step takes several.
        outputs: output folders by name.
    """
    try:
        return run_step(name, config, inputs, outputs)
    except UserError as error:
        print(f"scop: error: {name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def run_step(
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | list[str]],
    outputs: Mapping[str, str],
) -> StepResult:
    """Run a step; arguments as for `execute`.

    Raises:
        UserError: anything about the configuration or the inputs is wrong.
    """
    started = time.monotonic()
    step = find_step(name)
    settings = parse(step.Config, config)
    sources = _folders(name, "input", step.Inputs, inputs)
    contents = {key: _contents(key, value) for key, value in dataclasses.asdict(sources).items()}
    targets = _folders(name, "output", step.Outputs, outputs)
    folders = list(dataclasses.asdict(targets).values())
    _refuse_overlap(sources, folders)
    for folder in folders:
        _make_ready(folder)
    record = _Record(folders[0] / RECORD, _describe(name, settings, inputs, contents, outputs))
    record.write(status="running")

    fingerprint = _hash({"step": name, "config": settings.model_dump(mode="json"), "inputs": contents})
    tracker: Tracker = NoTracker()
    try:
        tracker = _open_tracker(name, settings, folders[0])
        if isinstance(tracker, MlflowTracker):
            record.write(tracking_run=tracker.run_id)
        tracker.log_params(_flat(settings.model_dump(mode="json")))
        result = step.run(settings, sources, targets, Context(tracker, fingerprint))
        tracker.log_metrics(result.metrics)
    except BaseException as error:
        reason = first_line(error) if isinstance(error, Exception) else type(error).__name__
        record.write(status="failed", error=reason, seconds=round(time.monotonic() - started, 3))
        tracker.close(succeeded=False, error=f"{name}: {reason}")
        if not isinstance(error, UserError):
            traceback.print_exc()
            raise SystemExit(1) from None
        raise
    record.write(status="done", seconds=round(time.monotonic() - started, 3))
    tracker.close(succeeded=True)
    return result


def _folders(step: str, kind: str, fields: type[Any], given: Mapping[str, str | list[str]]) -> Any:
    """An instance of a step's Inputs or Outputs, with paths for strings."""
    wanted = get_type_hints(fields)
    for name in given.keys() - wanted.keys():
        known = ", ".join(wanted) or "none"
        raise UserError(f"step {step!r} has no {kind} {name!r} (known: {known})")
    for name in wanted.keys() - given.keys():
        raise UserError(f"step {step!r} needs --{kind} {name}=FOLDER")
    paths: dict[str, Any] = {}
    for name, value in given.items():
        several = bool(get_args(wanted[name]))
        values = [Path(v) for v in ([value] if isinstance(value, str) else value)]
        if not several and len(values) != 1:
            raise UserError(f"step {step!r} takes one {kind} {name!r}, not {len(values)}")
        paths[name] = values if several else values[0]
    return fields(**paths)


# What kind of artifact each input must be.
_KINDS = {
    "dataset": "dataset",
    "dense": "model",
    "pruned": "model",
    "scores": "scores",
    "plan": "plan",
    "evaluation": "evaluation",
    "evaluations": "evaluation",
    "exports": "model",
}


def _contents(name: str, value: Path | list[Path]) -> str | list[str]:
    if isinstance(value, list):
        return [read_folder(path, _KINDS[name]).content for path in value]
    return read_folder(value, _KINDS[name]).content


def _refuse_overlap(sources: Any, outputs: list[Path]) -> None:
    """An output folder is emptied before the work: it must not be, hold or lie in an input or another output."""
    inputs = [p for v in dataclasses.asdict(sources).values() for p in (v if isinstance(v, list) else [v])]
    for place, output in enumerate(outputs):
        for other in [*inputs, *outputs[:place]]:
            a, b = output.resolve(), other.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise UserError(f"output folder {output} overlaps with {other}; name another one")


def _make_ready(folder: Path) -> None:
    """Make an output folder, or clear the one of an earlier try, whose checkpoint stays.

    Only what that try wrote is removed: what its manifest lists or, where it did not come to that, what lies beside its
    record. Other folders, and files of any other kind, are somebody's: then nothing is touched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = list(folder.iterdir())
        earlier = {path for path in present if path.is_file() and path.suffix in _WRITTEN_BY_STEPS}
        marked = any((folder / name).exists() for name in (MANIFEST, RECORD))
        if present and (not marked or set(present) - earlier):
            raise UserError(f"output folder {folder} holds other files; name a new or empty one")
        # The manifest first: from here on nobody takes the folder for whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in earlier:
            if path.name not in (MANIFEST, RECORD, "checkpoint.pt"):
                path.unlink()
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error


# Suffixes of all that a step leaves in its output folder, a killed one included.
_WRITTEN_BY_STEPS = {".json", ".jsonl", ".npy", ".onnx", ".png", ".html", ".pt", ".pt2", ".safetensors", ".part"}


class _Record:
    """`step.json`: all that it takes to run the step again, and how it ended."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content

    def write(self, **changes: Any) -> None:
        self._content |= changes
        write_atomically(self._path, json.dumps(self._content, indent=1) + "\n")


def _describe(
    name: str,
    settings: Section,
    inputs: Mapping[str, str | list[str]],
    contents: Mapping[str, str | list[str]],
    outputs: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "step": name,
        "version": scop.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": os.environ.get(RUN_VARIABLE),
        "image": os.environ.get(IMAGE_VARIABLE),
        "revision": git_revision(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "config": settings.model_dump(mode="json"),
        "inputs": {key: {"uri": _absolute(inputs[key]), "content": contents[key]} for key in inputs},
        "outputs": {key: _absolute(value) for key, value in outputs.items()},
    }


def _absolute(value: str | list[str]) -> str | list[str]:
    return str(Path(value).absolute()) if isinstance(value, str) else [str(Path(v).absolute()) for v in value]


def git_revision() -> str | None:
    """The commit of the source tree that is running, ``+`` behind it where the tree has changes; None outside git."""
    if stated := os.environ.get("SCOP_REVISION"):
        return stated
    here = Path(scop.__file__).parent
    try:
        options = {"cwd": here, "capture_output": True, "text": True, "timeout": 5, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], **options).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _open_tracker(name: str, settings: Section, folder: Path) -> Tracker:
    """MLflow where MLFLOW_TRACKING_URI names one; `scop run` sets it."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return NoTracker()
    variant = getattr(settings, "variant", None)
    label = f"{variant.label} {name}" if variant is not None else name
    tags = {"scop.step": name, "scop.version": scop.__version__}
    if variant is not None:
        tags |= {"scop.variant": variant.label, "scop.method": variant.method}
    if run := os.environ.get(RUN_VARIABLE):
        tags["scop.run"] = run
    return MlflowTracker(label, tags, folder / UNSENT)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted names, as MLflow wants parameters."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            flat[f"{prefix}{key}"] = value
    return flat


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
