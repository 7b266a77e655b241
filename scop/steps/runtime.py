"""The life of a step, the same wherever it runs: in a KFP component, in docker, or by `scop step`.

A step is a module of `scop.steps` with a ``Config`` (its sections), ``Inputs`` and ``Outputs`` (its folders) and a
``run``. The runtime validates the configuration and the inputs, writes `step.json` beside the outputs before any work
starts, opens the tracking run, lets the step work, and closes. A user's mistake ends with exit code 2 and one line;
anything else with 1 and the traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args, get_type_hints

import psutil

import scop
from scop import storage
from scop.checkpoints import Checkpoints
from scop.config import Section, parse
from scop.errors import Stopped, UserError
from scop.manifest import CHECKPOINTS, MANIFEST, RECORD, read_folder
from scop.steps import STEPS
from scop.tracking import UNSENT, MlflowTracker, NoTracker, Tracker, first_line

if TYPE_CHECKING:
    import torch

    from scop.training import EpochRecord

RUN_VARIABLE = "SCOP_RUN_ID"
IMAGE_VARIABLE = "SCOP_IMAGE"
CHECKPOINTS_VARIABLE = "SCOP_CHECKPOINTS"
KEEP_VARIABLE = "SCOP_KEEP_CHECKPOINTS"
KFP_ROOT_VARIABLE, RUN_ROOT_VARIABLE, VARIANTS_VARIABLE = "SCOP_KFP_ROOT", "SCOP_RUN_ROOT", "SCOP_VARIANTS"
"""Set by `scop run`: what a component's path below KFP's root means as a place of the run; see `meant`."""
RESUME_VARIABLE = "SCOP_RESUME"
"""Set by `scop run --resume`: a step whose output is there, whole and of the same making, is not run again."""

TERMINATED = 128 + signal.SIGTERM
Places = Mapping[str, str | list[str]]
"""Paths or ``s3://`` URIs by name; a list where a step takes several."""


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
        checkpoints: where a training keeps its states.
        places: of the inputs: absolute paths or URIs, by name.
    """

    tracker: Tracker
    checkpoints: Checkpoints
    places: Places

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on; see `scop.device.pick_device`."""
        from scop.device import pick_device

        return pick_device()

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


def execute(name: str, config: Mapping[str, Any], inputs: Places, outputs: Mapping[str, str]) -> StepResult:
    """Run a step as a component does, and leave the process where it fails.

    Args:
        name: of the step.
        config: its sections by name, each a mapping.
        inputs: input folders by name; a list of folders where the step takes several.
        outputs: output folders by name.
    """
    try:
        return run_step(
            name,
            config,
            _map(inputs, lambda _, path: meant(path)),
            _map(outputs, lambda _, path: meant(path)),
        )
    except UserError as error:
        print(f"scop: error: {name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def meant(path: str) -> str:
    """The place that kfp.local's path of an artifact means in a run.

    kfp.local has ROOT/PIPELINE-TIME/for-loop-1-iteration-0/TASK/NAME; a run has VARIANT/TASK/NAME below its own root,
    which may be in S3, and is the same when the run is resumed.
    """
    here, there = os.environ.get(KFP_ROOT_VARIABLE), os.environ.get(RUN_ROOT_VARIABLE)
    if not here or not there or not path.startswith(f"{here}/"):
        return path
    _, *inside, task, name = path.removeprefix(f"{here}/").split("/")
    labels = json.loads(os.environ[VARIANTS_VARIABLE])
    variants = [labels[int(part.rpartition("-")[2])] for part in inside]
    return storage.join(there, *variants, task.replace("-", "_"), name)


def run_step(name: str, config: Mapping[str, Any], inputs: Places, outputs: Mapping[str, str]) -> StepResult:
    """Run a step; arguments as for `execute`, where any folder may be an ``s3://`` URI.

    Raises:
        UserError: anything about the configuration or the inputs is wrong.
    """
    step = find_step(name)
    settings = parse(step.Config, config)
    inputs = _checked(name, "input", step.Inputs, inputs)
    _checked(name, "output", step.Outputs, outputs)
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, _ending_on_sigterm():
        sources = _map(inputs, _fetched)
        contents = _map(sources, _content)
        targets = {key: Path(scratch) / key if storage.is_uri(value) else Path(value) for key, value in outputs.items()}
        _refuse_overlap(sources, targets, inputs, outputs)
        description = _describe(name, settings, inputs, contents, outputs)
        fingerprint = _hash({key: description[key] for key in ("step", "config", "files")} | {"inputs": contents})
        checkpoints = _checkpoints(name, fingerprint, outputs, targets)
        if os.environ.get(RESUME_VARIABLE) and (result := _kept(description, outputs)):
            return result
        for folder in targets.values():
            _make_ready(folder)
        record = _Record(
            [storage.join(value, RECORD) for value in _with_remote(next(iter(outputs.values())))], description
        )
        record.write(status="running")
        return _run_recorded(name, step, settings, (inputs, sources), (outputs, targets), record, checkpoints)


def _run_recorded(
    name: str,
    step: StepModule,
    settings: Section,
    inputs: tuple[Places, Mapping[str, Any]],
    outputs: tuple[Mapping[str, str], Mapping[str, Path]],
    record: _Record,
    checkpoints: Checkpoints,
) -> StepResult:
    """The work between the record's first line and its last; inputs and outputs as (places, local folders)."""
    started = time.monotonic()
    places = _map(inputs[0], lambda _, place: _absolute(place))
    unsent = next(iter(outputs[1].values())) / UNSENT
    tracker: Tracker = NoTracker()
    try:
        tracker = _open_tracker(name, settings, unsent)
        if isinstance(tracker, MlflowTracker):
            record.write(tracking_run=tracker.run_id)
        tracker.log_params(_flat(settings.model_dump(mode="json")))
        context = Context(tracker, checkpoints, places)
        result = step.run(settings, step.Inputs(**inputs[1]), step.Outputs(**outputs[1]), context)
        for key, folder in outputs[1].items():
            if storage.is_uri(outputs[0][key]):
                storage.send_folder(folder, outputs[0][key])
        tracker.log_metrics(result.metrics)
    except BaseException as error:
        reason = first_line(error) if isinstance(error, Exception) else type(error).__name__
        status = "stopped" if isinstance(error, Stopped | _Terminated) else "failed"
        with contextlib.suppress(UserError):  # S3 itself may be what failed; the first error is the one to tell
            record.write(status=status, error=reason, seconds=round(time.monotonic() - started, 3))
        tracker.close(succeeded=False, error=f"{name}: {reason}")
        if status == "stopped":
            print(f"{name}: {reason}; run it again, and it goes on from there", flush=True)
            raise SystemExit(TERMINATED) from None
        if not isinstance(error, UserError):
            traceback.print_exc()
            raise SystemExit(1) from None
        raise
    finally:
        if unsent.exists() and storage.is_uri(outputs[0][next(iter(outputs[0]))]):
            with contextlib.suppress(UserError):
                storage.write(storage.join(next(iter(outputs[0].values())), UNSENT), unsent.read_bytes())
    made = {key: read_folder(folder) for key, folder in outputs[1].items()}
    record.write(
        status="done",
        seconds=round(time.monotonic() - started, 3),
        result=dataclasses.asdict(result),
        outputs={
            key: {
                "uri": _absolute(outputs[0][key]),
                "content": manifest.content,
                "files": {file: entry.sha256 for file, entry in manifest.files.items()},
            }
            for key, manifest in made.items()
        },
    )
    tracker.close(succeeded=True)
    try:
        checkpoints.remove()
    except UserError as error:
        print(f"warning: checkpoints are left behind: {error}", flush=True)
    return result


def _kept(description: Mapping[str, Any], outputs: Mapping[str, str]) -> StepResult | None:
    """The result of an earlier try, if it is whole and was made of the same; says why, or why not."""
    content = storage.read(storage.join(next(iter(outputs.values())), RECORD), must_exist=False)
    if content is None:
        return None
    try:
        record = json.loads(content)
        if _still_runs(record):
            raise UserError(f"it still runs, as process {record['process']} of this machine; wait for it, or end it")
        if (reason := _reason_to_run(record, description, outputs)) is None:
            print(f"kept: it finished in {record['seconds']:.1f} s; all that it is made of is unchanged", flush=True)
            return StepResult(**record["result"])
    except (ValueError, KeyError, TypeError):
        reason = "its record is damaged, or of another version"
    print(f"runs again: {reason}", flush=True)
    return None


def _still_runs(record: Mapping[str, Any]) -> bool:
    """Whether the very process is alive; numbers are used again, above all in containers."""
    if record.get("status") != "running" or record.get("host") != platform.node():
        return False
    try:
        process = psutil.Process(record["process"])
        return process.pid != os.getpid() and abs(process.create_time() - record["process_started"]) < 0.01
    except (psutil.Error, KeyError):
        return False


def _reason_to_run(record: Mapping[str, Any], description: Mapping[str, Any], outputs: Mapping[str, str]) -> str | None:
    if record.get("status") != "done":
        return f"it did not finish ({record.get('status')})"
    now, before = _flat(description["config"]), _flat(record["config"])
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if changed:
        return f"its configuration has changed ({', '.join(changed)})"
    if record["files"] != description["files"]:
        return f"{', '.join(record['files'])} has changed"
    for name, value in description["inputs"].items():
        if record["inputs"].get(name, {}).get("content") != value["content"]:
            return f"its input {name!r} has changed"
    for name, place in outputs.items():
        try:
            if storage.is_uri(place) and not storage.stands(place):
                return f"{place} is not whole any more"
            folder = storage.fetch_folder(place) if storage.is_uri(place) else Path(place)
            if read_folder(folder).content != record["outputs"][name]["content"]:
                return f"its output {name!r} has changed"
        except UserError as error:
            return str(error)
    return None


class _Terminated(SystemExit):
    """SIGTERM came at a time when there was nothing to save."""

    def __str__(self) -> str:
        return "terminated"


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM unwinds the stack, so that the record says how the step ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _Terminated(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _map(values: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """``change(name, value)`` of every value by name, of each entry where it is a list."""
    return {
        name: [change(name, entry) for entry in value] if isinstance(value, list) else change(name, value)
        for name, value in values.items()
    }


def _fetched(name: str, place: str) -> Path:
    return storage.fetch_folder(place, _KINDS[name]) if storage.is_uri(place) else Path(place)


def _content(name: str, folder: Path) -> str:
    return read_folder(folder, _KINDS[name]).content


def _with_remote(place: str) -> list[str]:
    """The place, and the URI that a KFP launcher uploads it to, where it is such a path: /s3/BUCKET/KEY."""
    return [place, f"s3://{place.removeprefix('/s3/')}"] if place.startswith("/s3/") else [place]


def _checkpoints(name: str, fingerprint: str, outputs: Mapping[str, str], targets: Mapping[str, Path]) -> Checkpoints:
    """Those of this very work: under SCOP_CHECKPOINTS, or else beside the output."""
    own, keep = f"{name}-{fingerprint[:32]}", int(os.environ.get(KEEP_VARIABLE, "2"))
    if place := os.environ.get(CHECKPOINTS_VARIABLE):
        return Checkpoints(storage.join(place, own), fingerprint, keep)
    first = next(iter(outputs))
    if storage.is_uri(outputs[first]):
        return Checkpoints(storage.join(outputs[first], CHECKPOINTS, own), fingerprint, keep)
    folder = targets[first] / CHECKPOINTS
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        if other.name != own and any(other.glob("*.json")):
            raise UserError(
                f"checkpoint {other} was made with another configuration or other inputs; delete it to start over, or "
                "choose another output folder"
            )
    return Checkpoints(str(folder / own), fingerprint, keep)


def _checked(step: str, kind: str, fields: type[Any], given: Places) -> Places:
    """The places, lists where the step takes several; raises UserError where one is missing or unknown."""
    wanted = get_type_hints(fields)
    for name in given.keys() - wanted.keys():
        known = ", ".join(wanted) or "none"
        raise UserError(f"step {step!r} has no {kind} {name!r} (known: {known})")
    places: dict[str, str | list[str]] = {}
    for name, annotation in wanted.items():
        if name not in given:
            raise UserError(f"step {step!r} needs --{kind} {name}=FOLDER")
        value = given[name]
        values = [value] if isinstance(value, str) else value
        several = bool(get_args(annotation))
        if not several and len(values) != 1:
            raise UserError(f"step {step!r} takes one {kind} {name!r}, not {len(values)}")
        places[name] = values if several else values[0]
    return places


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


def _refuse_overlap(
    sources: Mapping[str, Any], targets: Mapping[str, Path], inputs: Places, outputs: Mapping[str, str]
) -> None:
    """An output folder is emptied before the work: it must not be, hold or lie in an input or another output."""
    folders = [p for v in sources.values() for p in (v if isinstance(v, list) else [v])]
    for place, output in enumerate(targets.values()):
        for other in [*folders, *list(targets.values())[:place]]:
            a, b = output.resolve(), other.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise UserError(f"output folder {output} overlaps with {other}; name another one")
    uris = [u.rstrip("/") for v in inputs.values() for u in (v if isinstance(v, list) else [v]) if storage.is_uri(u)]
    for output_uri in filter(storage.is_uri, outputs.values()):
        for uri in uris:
            if f"{uri}/".startswith(f"{output_uri.rstrip('/')}/") or output_uri.startswith(f"{uri}/"):
                raise UserError(f"output {output_uri} overlaps with {uri}; name another one")


def _make_ready(folder: Path) -> None:
    """Make an output folder, or clear the one of an earlier try, whose checkpoints stay.

    Only what that try wrote is removed: what its manifest lists or, where it did not come to that, what lies beside its
    record. Other folders, and files of any other kind, are somebody's: then nothing is touched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = list(folder.iterdir())
        earlier = {path for path in present if path.suffix in _WRITTEN_BY_STEPS and path.is_file()}
        earlier |= {path for path in present if path.name == CHECKPOINTS}
        marked = any((folder / name).exists() for name in (MANIFEST, RECORD))
        if present and (not marked or set(present) - earlier):
            raise UserError(f"output folder {folder} holds other files; name a new or empty one")
        # The manifest first: from here on nobody takes the folder for whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in earlier:
            if path.name not in (MANIFEST, RECORD, CHECKPOINTS):
                path.unlink()
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error


# Suffixes of all that a step leaves in its output folder, a killed one included.
_WRITTEN_BY_STEPS = {".json", ".jsonl", ".npy", ".onnx", ".png", ".html", ".pt", ".pt2", ".safetensors", ".part"}


class _Record:
    """`step.json`: all that it takes to run the step again, and how it ended; no secrets."""

    def __init__(self, places: list[str], content: dict[str, Any]) -> None:
        self._places, self._content = places, content

    def write(self, **changes: Any) -> None:
        self._content |= changes
        for place in self._places:
            storage.write(place, (json.dumps(self._content, indent=1) + "\n").encode())


def _describe(
    name: str, settings: Section, inputs: Places, contents: Mapping[str, Any], outputs: Mapping[str, str]
) -> dict[str, Any]:
    config, files = settings.model_dump(mode="json"), {}
    for section, key in EXTERNAL_FILES:
        if place := config.get(section, {}).get(key):
            config[section][key] = _absolute(place)
            files[f"{section}.{key}"] = storage.version_of(place)
    return {
        "step": name,
        "version": scop.__version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": os.environ.get(RUN_VARIABLE),
        "image": os.environ.get(IMAGE_VARIABLE),
        "revision": git_revision(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": int(os.environ["OMP_NUM_THREADS"]) if "OMP_NUM_THREADS" in os.environ else None,
        "cpus": os.cpu_count(),
        "host": platform.node(),
        "process": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "config": config,
        "files": files,
        "inputs": {key: {"uri": uri, "content": contents[key]} for key, uri in _map(inputs, _recorded).items()},
        "outputs": {key: {"uri": uri} for key, uri in _map(outputs, _recorded).items()},
    }


def _recorded(_: str, place: str) -> str:
    return _with_remote(_absolute(place))[-1]


# Entries of the configuration that name files or folders; what they hold is recorded with the step.
EXTERNAL_FILES = (("data", "path"), ("dense", "weights"))


def _absolute(place: str) -> str:
    return place if storage.is_uri(place) else str(Path(place).expanduser().absolute())


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


def _open_tracker(name: str, settings: Section, unsent: Path) -> Tracker:
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
    return MlflowTracker(label, tags, unsent)


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
