"""`scop run`: the whole pipeline on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pipelines.compare.comparison import compare_runs
from pipelines.local.console import print_variants
from pipelines.local.in_process import InProcess
from pipelines.local.job import LOG, Job, Runner, State
from pipelines.local.workspace import tracking_of, workspace
from scop.config import CIFAR_RESNETS, Config
from scop.config.parsing import parse
from scop.environment import StepEnvironment, UserEnvironment
from scop.errors import UserError, redact
from scop.report.summary import headline
from scop.runtime.record import EXTERNAL_FILES, launcher_tags
from scop.runtime.uris import absolute_uri
from scop.storage.files import delete_files, file_exists, is_s3, join_uri, write_bytes
from scop.storage.folders import local_folder
from scop.storage.manifest import write_atomically
from scop.system.revision import git_revision
from scop.tracking.pipeline_run import end_parent, start_parent
from scop.tracking.server import make_client


@dataclass(frozen=True)
class LocalRun:
    """A finished run.

    Attributes:
        uri: folder or ``s3://`` URI of the run.
        summary: content of summary.json.
        tracking_uri: URI of MLflow.
    """

    uri: str
    summary: dict[str, Any]
    tracking_uri: str


def run_locally(
    config: Config,
    out: str,
    name: str,
    *,
    runner: Runner | None = None,
    resume: str | None = None,
    user: UserEnvironment | None = None,
    announce: Callable[[State], None] = lambda state: None,
) -> LocalRun:
    """Run the pipeline.

    Args:
        config: the configuration.
        out: folder or ``s3://`` URI in which the folder of the run is created. It also contains MLflow's database,
            shared by all runs, unless the user has set a server.
        name: prefix of the run's ID.
        runner: runs the steps; by default all in this process.
        resume: folder or URI of an earlier run to continue; its finished steps with unchanged inputs are kept.
        user: environment variables set by the user; by default none.
        announce: called with the run's state when it starts and at each step.

    Raises:
        UserError: the output folder cannot be written, MLflow cannot be used, or a step rejected its input.
        StepError: a step failed.
        Stopped: a signal stopped the run.
    """
    started = time.monotonic()
    runner, user = runner or InProcess(), user or UserEnvironment()
    config = _with_absolute_paths(config)
    if not is_s3(out) and ("://" in out or out.startswith("s3:")):
        raise UserError(f"--out {out} is neither a folder nor an s3:// URI")
    _refuse_missing(config)
    runner.check()
    out = out.rstrip("/") if is_s3(out) else str(Path(out).expanduser().absolute())
    uri = resume or join_uri(out, _new_run_id(config.run.name or name, out))
    run_id = uri.rpartition("/")[2]
    if resume:
        runner.refuse_if_running(run_id)
    tracking_uri, artifact_root = tracking_of(config, out, user.tracking_uri)
    environment = StepEnvironment(
        **user.model_dump(exclude={"tracking_uri"}),
        tracking_uri=tracking_uri,
        artifact_root=artifact_root,
        experiment=config.run.experiment,
        run_id=run_id,
        attempt=uuid.uuid4().hex,
        revision=git_revision(),
        # Shared by all runs in `out`: the same run, started again after a kill, resumes from them.
        checkpoints=config.run.checkpoints or join_uri(out, "checkpoints"),
        keep_checkpoints=config.run.keep_checkpoints,
        resume=resume is not None,
        terminal=_terminal(),
    )
    with workspace(uri, resume is not None) as folder:
        count = len(config.variants)
        variants = f"{count} variant{'s' * (count != 1)}"
        print(f"run {run_id}{' continues' if resume else ''}: {variants}, output in {uri}", flush=True)
        job = Job(config, uri, folder, runner.prepare(environment), announce)
        return _run_tracked(job, runner, started)


def _run_tracked(job: Job, runner: Runner, started: float) -> LocalRun:
    config, folder, environment = job.config, job.folder, job.environment
    tracking_uri = environment.tracking_uri
    assert tracking_uri is not None
    # First, because results and configuration of an earlier attempt must be kept if MLflow cannot be reached.
    parent = start_parent(
        tracking_uri,
        config.run.experiment,
        environment.run_id or "",
        launcher_tags(environment),
        environment.artifact_root,
        resumed=environment.resume,
    )
    job, client = job.below(parent), make_client(tracking_uri)
    job.announce(job.state())
    try:
        _delete_results(job.uri)
        write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        _upload([folder / "config.yaml"], job.uri)
        report = local_folder(runner.run(job), job.cache, "report")
        summary = json.loads((report / "summary.json").read_text())
        seconds = round(time.monotonic() - started, 1)
        summary = {"run_id": environment.run_id, "seconds": seconds, **summary, "mlflow_run": parent}
        write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        # Rewrite the report: only now is the cost of all steps known.
        compare_runs([job.uri], job.cache).page.write(folder / "report.html")
        files = [folder / name for name in ("config.yaml", "summary.json", "report.html")]
        _upload(files, job.uri)
    except BaseException as error:
        end_parent(client, parent, False, {}, [folder / "config.yaml"], str(error), alone=True)
        raise
    finally:
        with contextlib.suppress(UserError, FileNotFoundError):
            _upload([folder / LOG], job.uri)
    end_parent(client, parent, True, headline(summary) | {"seconds": summary["seconds"]}, files, alone=True)
    return LocalRun(job.uri, summary, tracking_uri)


def _new_run_id(name: str, out: str) -> str:
    # In S3, only the name distinguishes two runs that start in the same second.
    suffix = f"-{uuid.uuid4().hex[:4]}" if is_s3(out) else ""
    return f"{name}-{datetime.now():%Y%m%d-%H%M%S}{suffix}"


def _terminal() -> str | None:
    """Return the device file of the user's terminal, for the progress bars of other processes."""
    try:
        return os.ttyname(sys.stderr.fileno())
    except (OSError, io.UnsupportedOperation):
        return None


def _delete_results(uri: str) -> None:
    """Delete the results of an earlier attempt; a run without a summary counts as unfinished."""
    delete_files(uri, [name for name in ("summary.json", "report.html") if file_exists(uri, name)])


def _upload(files: list[Path], uri: str) -> None:
    """Upload files from the run's folder if the run is in S3."""
    if is_s3(uri):
        for file in files:
            write_bytes(join_uri(uri, file.name), file.read_bytes())


def _refuse_missing(config: Config) -> None:
    """Raise UserError if a required file or network is missing, instead of minutes later in a step."""
    for section, key in EXTERNAL_FILES:
        value = getattr(getattr(config, section), key)
        if value is not None and not is_s3(value) and not Path(value).exists():
            raise UserError(f"{section}.{key} {value} does not exist; correct it with --set {section}.{key}=...")
    if config.dense.model not in CIFAR_RESNETS:
        from scop.models.factories import find_factory

        find_factory(config.dense.model)


def _with_absolute_paths(config: Config) -> Config:
    """Make paths absolute, so that they are valid in a container and in a resumed run."""
    values = config.model_dump()
    for section, key in (*EXTERNAL_FILES, ("run", "checkpoints"), ("run", "artifact_root")):
        if values[section][key] is not None:
            values[section][key] = absolute_uri(values[section][key])
    return parse(Config, values)


def print_result(run: LocalRun) -> None:
    """Print a dense-vs-pruned table, the paths of the results, and the command that opens MLflow."""
    print_variants(run.summary["variants"])
    for line in (
        *(f"{variant['name']}: {variant['model']}" for variant in run.summary["variants"]),
        f"report:  {join_uri(run.uri, 'report.html')}",
        f"summary: {join_uri(run.uri, 'summary.json')} ({run.summary['seconds']:.0f} s)",
        f"MLflow:  {mlflow_command(run.tracking_uri)}",
    ):
        print(line)


def mlflow_command(uri: str) -> str:
    """Return the command that opens MLflow's pages, or the URL if the command would contain a password."""
    if uri.startswith("http") or redact(uri) != uri:
        return redact(uri)
    # With its path if the virtual environment is not active, as after `make run`.
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.join([command, 'server', '--backend-store-uri', uri, '--port', '5000'])}  # http://127.0.0.1:5000"
