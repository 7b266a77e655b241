"""`scop run`: the pipeline on this machine, through KFP's local runner."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.compare.comparison import compare_runs
from pipelines.local.console import console, print_variants
from pipelines.local.containers import (
    Sandbox,
    certificates,
    containers_of,
    existing,
    image_id,
    require_image,
    stop_containers,
    variables_of_steps,
)
from pipelines.local.workspace import KFP_FOLDER, environment, for_mlflow, for_steps, terminal, workspace
from scop.config import CIFAR_RESNETS, Config
from scop.config.parsing import parse
from scop.errors import Stopped, UserError, shown
from scop.runtime.places import KFP_ROOT_VARIABLE, RUN_ROOT_VARIABLE, STOPPED, VARIANTS_VARIABLE, absolute, meant
from scop.runtime.record import (
    ATTEMPT_VARIABLE,
    EXTERNAL_FILES,
    IMAGE_ID_VARIABLE,
    IMAGE_VARIABLE,
    RUN_VARIABLE,
    StepRecord,
    surroundings,
)
from scop.runtime.registry import STEPS
from scop.runtime.resume import CHECKPOINTS_VARIABLE, RESUME_VARIABLE
from scop.steps.compare import headline
from scop.storage import cache
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.manifest import RECORD, write_atomically
from scop.system.signals import handled
from scop.tracking.mlflow import PARENT_VARIABLE
from scop.tracking.pipeline_run import end_parent, start_parent
from scop.tracking.server import ARTIFACTS_VARIABLE


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
    told = for_mlflow(config, out)
    with workspace(place, resume is not None) as folder:
        run_id, count = place.rpartition("/")[2], len(config.variants)
        print(f"run {run_id}{' goes on' if resume else ''}: {count} variant(s), everything in {place}", flush=True)
        told |= for_steps(config, out, place, folder, resume is not None)
        if image is not None:
            told[IMAGE_ID_VARIABLE] = image_id(image) or ""
        with environment(told):
            return _run_tracked(config, place, folder, (image, gpus), started)


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
        from scop.models.factories import find_factory

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
        with environment({PARENT_VARIABLE: parent, **terminal()}):
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
    return remote.fetch_folder(report, "report") if storage.is_uri(report) else Path(report)


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
    before = handled(stop)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _docker_runner(config: Config, folder: Path, image: str, gpus: bool) -> Any:
    from kfp import local

    # A folder is mounted if it is writable; the other folders and files lie in these, or KFP mounts them.
    writable, folders, files = [folder], [folder / KFP_FOLDER, folder / ".workspace"], []
    variables = {}
    if (uri := os.environ["MLFLOW_TRACKING_URI"]).startswith("sqlite:///"):
        files.append(Path(uri.removeprefix("sqlite:///")))
        writable.append(files[0].parent)
    for place in (os.environ[CHECKPOINTS_VARIABLE], os.environ.get(ARTIFACTS_VARIABLE, storage.SCHEME)):
        if not storage.is_uri(place):
            writable.append(Path(place))
    given = [getattr(getattr(config, section), key) for section, key in EXTERNAL_FILES]
    places = (os.environ[RUN_ROOT_VARIABLE], *given, config.run.checkpoints)
    if in_s3 := any(storage.is_uri(place) for place in places if place):
        writable.append(cache.cache_folder())
        folders += [cache.cache_folder() / part for part in cache.CACHE_PARTS]
        variables[cache.CACHE_VARIABLE] = str(cache.cache_folder())
    for path in (*writable, *folders):
        path.mkdir(parents=True, exist_ok=True)
    files += folder.rglob("*")  # what an earlier try left, perhaps by another runner
    readable = existing(given) + certificates()
    in_s3 |= storage.is_uri(os.environ.get(ARTIFACTS_VARIABLE, ""))
    sandbox = Sandbox(image, tuple(writable), readable, variables, variables_of_steps(with_s3=in_s3), gpus)
    sandbox.open_to_user((*folders, *files))
    return local.DockerRunner(**sandbox.for_kfp())


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
    """The line that opens MLflow's pages on the results or, where it would have to show a password, their place."""
    if uri.startswith("http") or shown(uri) != uri:
        return shown(uri)
    # By its path where the virtual environment is not active, as after `make run`.
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.join([command, 'server', '--backend-store-uri', uri, '--port', '5000'])}  # http://127.0.0.1:5000"
