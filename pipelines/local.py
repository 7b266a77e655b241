"""`scop run`: the pipeline on this machine, through KFP's local runner."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.compare import compare_runs
from pipelines.console import console, print_variants
from pipelines.containers import (
    Sandbox,
    certificates,
    containers_of,
    existing,
    image_id,
    require_image,
    stop_containers,
    variables_of_steps,
)
from scop import storage
from scop.checkpoints import STOP_SIGNALS
from scop.config import CIFAR_RESNETS, Config
from scop.errors import Stopped, UserError
from scop.manifest import RECORD, write_atomically
from scop.mlflow_server import ARTIFACTS_VARIABLE, shown
from scop.parents import end_parent, start_parent
from scop.parsing import parse
from scop.progress import TERMINAL_VARIABLE
from scop.steps import STEPS
from scop.steps.compare import headline
from scop.steps.earlier import CHECKPOINTS_VARIABLE, KEEP_VARIABLE, RESUME_VARIABLE
from scop.steps.places import (
    KFP_ROOT_VARIABLE,
    RUN_ROOT_VARIABLE,
    STOPPED,
    VARIANTS_VARIABLE,
    absolute,
    meant,
)
from scop.steps.record import (
    ATTEMPT_VARIABLE,
    EXTERNAL_FILES,
    IMAGE_ID_VARIABLE,
    IMAGE_VARIABLE,
    RUN_VARIABLE,
    StepRecord,
    surroundings,
)
from scop.tracking import PARENT_VARIABLE

KFP_FOLDER = ".kfp"
"""KFP's own files in a run's folder: what its launcher exchanges with the steps."""
LOCK = "lock"
"""A file in there, locked for as long as a process works on the run."""


class StepError(Exception):
    """A step of the pipeline failed; its traceback has been printed."""


@dataclass(frozen=True)
class LocalRun:
    """A finished run.

    Attributes:
        place: where everything of it lies, a path or an ``s3://`` URI.
        summary: the content of its summary.json.
        tracking_uri: of MLflow.
    """

    place: str
    summary: dict[str, Any]
    tracking_uri: str


def run_locally(
    config: Config,
    out: str,
    name: str,
    image: str | None = None,
    resume: str | None = None,
    gpus: bool = False,
) -> LocalRun:
    """Run the pipeline, each step in a process or a container of its own.

    Args:
        config: what to run.
        out: a folder or ``s3://`` URI. The run lies in a folder of its own in here; so does MLflow's database, shared
            by all runs, where nothing names a server. Into S3 the steps exchange all they make through it.
        name: what the run's id begins with.
        image: steps run in containers of it.
        resume: the place of an earlier run to go on with; steps that are whole and unchanged are kept.
        gpus: whether the containers get the GPUs.

    Raises:
        UserError: the output folder cannot be written, MLflow cannot be used, or a step refused its input.
        StepError: a step failed.
    """
    started = time.monotonic()
    config = _with_absolute_paths(config)
    if not storage.is_uri(out) and ("://" in out or out.startswith("s3:")):
        raise UserError(f"--out {out} is neither a folder nor an s3:// URI")
    _refuse_what_is_missing(config)
    if image is not None:
        os.environ[IMAGE_VARIABLE] = image  # what the components are compiled with
        require_image(image)
    out = out.rstrip("/") if storage.is_uri(out) else str(Path(out).expanduser().absolute())
    # In S3 nothing tells two that start within a second apart but their names.
    own = f"{datetime.now():%Y%m%d-%H%M%S}" + (f"-{uuid.uuid4().hex[:4]}" if storage.is_uri(out) else "")
    place = resume or storage.join(out, f"{config.run.name or name}-{own}")
    if resume and (running := containers_of(place.rpartition("/")[2])):
        raise UserError(f"a step of this run still runs, in container {running[0]}; wait for it, or: docker stop it")
    tracking = _tracking(config, out)
    with _workspace(place, resume is not None) as folder:
        run_id, count = place.rpartition("/")[2], len(config.variants)
        print(f"run {run_id}{' goes on' if resume else ''}: {count} variant(s), everything in {place}", flush=True)
        surroundings = _surroundings(config, out, place, folder, resume is not None)
        if image is not None:
            surroundings[IMAGE_ID_VARIABLE] = image_id(image) or ""
        with _environment(tracking | surroundings):
            return _run_tracked(config, place, folder, (image, gpus), started)


@contextlib.contextmanager
def _workspace(place: str, exists: bool) -> Iterator[Path]:
    """The run's folder, or a temporary one where the run lies in S3; nobody else works on the run meanwhile.

    In S3 there is nothing that could be locked.
    """
    if storage.is_uri(place):
        with tempfile.TemporaryDirectory(prefix="scop-run-") as name:
            yield Path(name)
        return
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=exists)
        (folder / KFP_FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be made: {error.strerror}") from error
    with (folder / KFP_FOLDER / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it whatever ends this process
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run {folder.name} is still going, by process {lock.read().strip()}; wait for it, or end that"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield folder


def _tracking(config: Config, out: str) -> dict[str, str]:
    """Where MLflow and its artifacts are: as the environment says, or else with the runs."""
    variables = {}
    if not (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        base = Path("runs").absolute() if storage.is_uri(out) else Path(out)
        if set("%?") & set(str(base)):
            raise UserError(
                f"MLflow's database cannot lie in {base}: % and ? mean something else in its address; take another "
                "folder, or name a server by MLFLOW_TRACKING_URI"
            )
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {base} cannot be made: {error.strerror}") from error
        uri = variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{base / 'mlflow.db'}"
    artifacts = config.run.artifact_root
    if artifacts is None and storage.is_uri(out) and uri.startswith("sqlite:"):
        artifacts = storage.join(out, "mlflow")
    if artifacts is not None:
        variables[ARTIFACTS_VARIABLE] = artifacts
    return variables


def _surroundings(config: Config, out: str, place: str, folder: Path, resumed: bool) -> dict[str, str]:
    """What the steps are told by their environment."""
    return {
        RUN_VARIABLE: place.rpartition("/")[2],
        # Shared by all runs in `out`: one that was killed and is started again goes on where it was.
        CHECKPOINTS_VARIABLE: config.run.checkpoints or storage.join(out, "checkpoints"),
        KEEP_VARIABLE: str(config.run.keep_checkpoints),
        KFP_ROOT_VARIABLE: str(folder / KFP_FOLDER),
        RUN_ROOT_VARIABLE: place,
        VARIANTS_VARIABLE: json.dumps([variant.label for variant in config.variants]),
        RESUME_VARIABLE: "1" if resumed else "",
        ATTEMPT_VARIABLE: uuid.uuid4().hex,
    }


def _forget_results(place: str) -> None:
    """What a run that goes on has said before; without a summary it is known to be unfinished."""
    storage.delete(place, [name for name in ("summary.json", "report.html") if storage.exists_at(place, name)])


def _send(files: list[Path], place: str) -> None:
    """Put files of the run's folder into S3 where the run lies there."""
    if storage.is_uri(place):
        for file in files:
            storage.write(storage.join(place, file.name), file.read_bytes())


def _refuse_what_is_missing(config: Config) -> None:
    """What the steps would find missing minutes later is said at once."""
    for section, key in EXTERNAL_FILES:
        value = getattr(getattr(config, section), key)
        if value is not None and not storage.is_uri(value) and not Path(value).exists():
            raise UserError(f"{section}.{key} {value} does not exist; give another: --set {section}.{key}=...")
    if config.dense.model not in CIFAR_RESNETS:
        from scop.models import find_factory

        find_factory(config.dense.model)


def _with_absolute_paths(config: Config) -> Config:
    """The configuration as it means the same in a container, and when it is resumed from another folder."""
    values = config.model_dump()
    for section, key in (*EXTERNAL_FILES, ("run", "checkpoints"), ("run", "artifact_root")):
        if values[section][key] is not None:
            values[section][key] = absolute(values[section][key])
    return parse(Config, values)


def _run_tracked(config: Config, place: str, folder: Path, docker: tuple[str | None, bool], started: float) -> LocalRun:
    run_id = os.environ[RUN_VARIABLE]
    # First, for where MLflow cannot be reached an earlier try's results and configuration are to stay.
    parent = start_parent(config.run.experiment, run_id, surroundings(), resumed=bool(os.environ[RESUME_VARIABLE]))
    try:
        _forget_results(place)
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        _send([folder / "config.yaml"], place)
        with _environment({PARENT_VARIABLE: parent, **_terminal()}):
            report = _execute(config, place, folder, *docker)
        summary = json.loads((report / "summary.json").read_text())
        summary = {"run_id": run_id, "seconds": round(time.monotonic() - started, 1), **summary, "mlflow_run": parent}
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        # The report anew, for only now is it known what all the steps cost.
        compare_runs([place]).page.write(folder / "report.html")
        files = [folder / name for name in ("config.yaml", "summary.json", "report.html")]
        _send(files, place)
    except BaseException as error:
        end_parent(parent, False, {}, [folder / "config.yaml"], str(error), alone=True)
        raise
    finally:
        with contextlib.suppress(UserError, FileNotFoundError):
            _send([folder / "log.txt"], place)
    end_parent(parent, True, headline(summary) | {"seconds": summary["seconds"]}, files, alone=True)
    return LocalRun(place, summary, os.environ["MLFLOW_TRACKING_URI"])


def _execute(config: Config, place: str, folder: Path, image: str | None, gpus: bool) -> Path:
    """Run the steps; returns the folder of the report."""
    from kfp import local

    from pipelines.pipeline import make_pipeline

    # What is None is left out: KFP's parameters know no null.
    sections = config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
    local.init(
        runner=local.SubprocessRunner(use_venv=False) if image is None else _docker_runner(config, folder, image, gpus),
        pipeline_root=str(folder / KFP_FOLDER),
        workspace_root=str(folder / ".workspace"),
    )
    log, again = storage.join(place, "log.txt"), f"go on with: scop run --resume {place}"
    if storage.is_uri(place) and (before := storage.read(log, must_exist=False)):
        (folder / "log.txt").write_bytes(before)
    with console(folder / "log.txt") as view, _stopping_steps(image) as stopped:
        try:
            task = make_pipeline()(**sections)
        except RuntimeError as error:
            if stopped():
                raise Stopped(f"stopped; {again}", code=128 + stopped()) from error
            failure: Exception = StepError(f"step {view.task} failed; all that it said is in {log}; {again}")
            if view.error:
                failure = UserError(view.error)
                failure.add_note(again)
            if len(config.variants) > 1:
                failure.add_note(f"what is whole, side by side: scop compare {place}")
            raise failure from error
    if vanished := _unfinished(place):
        raise StepError(f"step {vanished} vanished without a word; all that was said is in {log}; {again}")
    report = meant(task.output.path)
    return storage.fetch_folder(report, "report") if storage.is_uri(report) else Path(report)


def _unfinished(place: str) -> str | None:
    """A step of the run that this start of it neither ran to its end nor kept, or None.

    KFP takes a container that vanishes for one that succeeded; what such a step had made before would pass for new.
    """
    records = [name for name in storage.names(place) if name.endswith(f"/{RECORD}")]
    found = [StepRecord.parse(storage.read(storage.join(place, name)) or b"", name) for name in records]
    ended = [r for r in found if r.status == "done" and r.attempt == os.environ[ATTEMPT_VARIABLE]]
    expected = {"prepare_data": 1, "train_dense": 1, "train_knockoff": 1, "compare": 1}
    count = len(json.loads(os.environ[VARIANTS_VARIABLE]))
    for step in STEPS:
        if sum(record.step == step for record in ended) < expected.get(step, count):
            return step
    return None


@contextlib.contextmanager
def _stopping_steps(image: str | None) -> Iterator[Callable[[], int]]:
    """Within, a signal to stop is handed to the step that runs, which ends, with a checkpoint; gives which one came.

    No further step begins then: KFP would go on with the next variant.
    """
    came = 0

    def stop(number: int, _: object) -> None:
        nonlocal came
        came = number
        (Path(os.environ[KFP_ROOT_VARIABLE]) / STOPPED).touch()
        found = stop_containers(os.environ[RUN_VARIABLE]) if image is not None else 0
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        if not children and not found:  # between two steps
            raise RuntimeError("stopped between two steps")

    (Path(os.environ[KFP_ROOT_VARIABLE]) / STOPPED).unlink(missing_ok=True)
    before = {number: signal.signal(number, stop) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _docker_runner(config: Config, folder: Path, image: str, gpus: bool) -> Any:
    from kfp import local

    # A folder is mounted if it is writable; the other folders and files lie in these, or KFP mounts them.
    writable, folders, files = [folder], [folder / KFP_FOLDER, folder / ".workspace"], []
    environment = {}
    if (uri := os.environ["MLFLOW_TRACKING_URI"]).startswith("sqlite:///"):
        files.append(Path(uri.removeprefix("sqlite:///")))
        writable.append(files[0].parent)
    for place in (os.environ[CHECKPOINTS_VARIABLE], os.environ.get(ARTIFACTS_VARIABLE, storage.SCHEME)):
        if not storage.is_uri(place):
            writable.append(Path(place))
    given = [getattr(getattr(config, section), key) for section, key in EXTERNAL_FILES]
    places = (os.environ[RUN_ROOT_VARIABLE], *given, config.run.checkpoints)
    if in_s3 := any(storage.is_uri(place) for place in places if place):
        writable.append(storage.cache_folder())
        folders += [storage.cache_folder() / part for part in storage.CACHE_PARTS]
        environment[storage.CACHE_VARIABLE] = str(storage.cache_folder())
    for path in (*writable, *folders):
        path.mkdir(parents=True, exist_ok=True)
    files += folder.rglob("*")  # what an earlier try left, perhaps by another runner
    readable = existing(given) + certificates()
    in_s3 |= storage.is_uri(os.environ.get(ARTIFACTS_VARIABLE, ""))
    sandbox = Sandbox(image, tuple(writable), readable, environment, variables_of_steps(with_s3=in_s3), gpus)
    sandbox.open_to_user((*folders, *files))
    return local.DockerRunner(**sandbox.for_kfp())


def _terminal() -> dict[str, str]:
    """The terminal that somebody watches, for the steps' progress bars."""
    try:
        return {TERMINAL_VARIABLE: os.ttyname(sys.stderr.fileno())}
    except (OSError, io.UnsupportedOperation):
        return {}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def print_result(run: LocalRun) -> None:
    """The table dense against pruned, where things are, and how to open MLflow."""
    print_variants(run.summary["variants"])
    for line in (
        *(f"{variant['name']}: {variant['model']}" for variant in run.summary["variants"]),
        f"report:  {storage.join(run.place, 'report.html')}",
        f"summary: {storage.join(run.place, 'summary.json')} ({run.summary['seconds']:.0f} s)",
        f"MLflow:  {mlflow_command(run.tracking_uri)}",
    ):
        print(line)


def mlflow_command(uri: str) -> str:
    """The line that opens MLflow's pages on the results."""
    if uri.startswith("http"):
        return shown(uri)
    # By its path where the virtual environment is not active, as after `make run`.
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.join([command, 'server', '--backend-store-uri', uri, '--port', '5000'])}  # http://127.0.0.1:5000"
