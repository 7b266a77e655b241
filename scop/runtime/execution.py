"""Execution of a step, the same in `scop run`, in a KFP component, in a container and in `scop step`.

A step is a module of `scop.steps` with a ``Config`` (its sections), ``Inputs`` and ``Outputs`` (its folders) and a
function ``run``. The runtime validates the configuration and the inputs, writes `step.json` beside the output, opens
the MLflow run, calls ``run``, and closes both.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scop.config.parsing import Section, parse
from scop.environment import StepEnvironment, TorchrunEnvironment, name_of
from scop.errors import Stopped, UserError, missing_extra
from scop.runtime import train_job
from scop.runtime.exit_codes import (
    ExitCode,
    NoDeviceError,
    Status,
    StepFailedError,
    exit_code_of,
    reason_of,
    status_of,
    stop_signals_raise,
)
from scop.runtime.logs import log_to_standard_output
from scop.runtime.output_folder import prepare_output
from scop.runtime.processes import Job, Processes, plan_processes, run_in_processes
from scop.runtime.record import RecordedInput, RecordFile, StepRecord, flat
from scop.runtime.registry import STEPS, TRAINING_STEPS
from scop.runtime.result import StepResult
from scop.runtime.resume import checkpoints_of, keep_result
from scop.runtime.step import Context, StepModule, find_step
from scop.runtime.uris import (
    Uris,
    absolute_uri,
    check_names,
    content_of,
    flatten,
    input_folder,
    map_values,
    refuse_overlap,
    refuse_overlap_in_s3,
    shared_uri,
    uri_in_run,
)
from scop.storage.cache import Cache
from scop.storage.checkpoints import Checkpoints
from scop.storage.files import file_exists, is_s3, join_uri, write_bytes
from scop.storage.folders import upload_folder
from scop.storage.manifest import RECORD, read_folder
from scop.system.cost import Cost, Meter
from scop.system.garbage import collect_garbage_rarely
from scop.system.progress import show_progress_on
from scop.tracking.mlflow import MlflowTracker
from scop.tracking.tags import DEVICE_TAG
from scop.tracking.tracker import UNSENT, NoTracker, Tracker

logger = logging.getLogger(__name__)

STOP_FILE = "stopped"
"""A file in KFP's root folder: the run was stopped, so no further step may start."""

_ROW_STEP = "evaluate"
"""Comparisons read its MLflow run, to which no other parameters are logged: every search in MLflow reads all
parameters of a run."""


def execute(name: str, config: Mapping[str, Any], inputs: Uris, outputs: Mapping[str, str]) -> StepResult:
    """Run a step as the only work of this process; if the step fails, exit with its exit code.

    KFP components call this. It reads the environment variables.

    Args:
        name: name of the step.
        config: sections of its configuration, by name.
        inputs: input folders by name; a list for a name that takes several.
        outputs: output folders by name.
    """
    collect_garbage_rarely()
    log_to_standard_output()
    try:
        environment = StepEnvironment.read()
        os.environ.pop(name_of(StepEnvironment, "mlflow_run"), None)  # MLflow would use it for other runs, too
        if environment.kfp_root and (Path(environment.kfp_root) / STOP_FILE).exists():
            raise SystemExit(ExitCode.TERMINATED)  # KFP starts the next variant even after a stop
        with show_progress_on(environment.terminal):
            return run_step(
                name,
                config,
                map_values(inputs, lambda _, path: uri_in_run(path, environment)),
                {key: uri_in_run(path, environment) for key, path in outputs.items()},
                environment,
                TorchrunEnvironment.read(),
            )
    except UserError as error:
        print(f"scop: error: {name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(exit_code_of(error)) from None
    except (Stopped, StepFailedError) as error:
        raise SystemExit(exit_code_of(error)) from None


def run_step(
    name: str,
    config: Mapping[str, Any],
    inputs: Uris,
    outputs: Mapping[str, str],
    environment: StepEnvironment | None = None,
    torchrun: TorchrunEnvironment | None = None,
) -> StepResult:
    """Run a step in this process.

    Args:
        name: name of the step.
        config: sections of its configuration, by name.
        inputs: folders or ``s3://`` URIs by name; a list for a name that takes several.
        outputs: folders or ``s3://`` URIs by name.
        environment: variables set by the launcher; by default nothing is tracked or resumed.
        torchrun: variables set by torchrun or Kubeflow Trainer; by default one node.

    Raises:
        UserError: the configuration or an input is wrong.
        NoDeviceError: a required GPU is missing.
        Stopped: a signal stopped the step.
        StepFailedError: the step failed for another reason, which has been logged.
    """
    environment = environment or StepEnvironment()
    step = find_step(name)
    inputs = map_values(inputs, lambda _, uri: absolute_uri(uri))
    outputs = {key: absolute_uri(uri) for key, uri in outputs.items()}
    processes = plan_processes(name, environment, torchrun or TorchrunEnvironment())
    settings = parse(step.Config, config)
    inputs = check_names(name, "input", step.Inputs, inputs)
    check_names(name, "output", step.Outputs, outputs)
    refuse_overlap_in_s3(inputs, outputs)
    request = _Request(name, step, settings, inputs, outputs, environment, processes)
    if (missing := _missing_device(environment, processes)) is not None:
        _fail_without_device(request, missing)
    if environment.train_job is not None:
        plan = train_job.TrainJobPlan.model_validate_json(environment.train_job)
        with stop_signals_raise():
            return train_job.run(plan, name, settings, inputs, outputs, environment)
    if processes.node > 0:
        return _assist(request)
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, stop_signals_raise():
        targets = {key: Path(scratch) / key if is_s3(uri) else Path(uri) for key, uri in outputs.items()}
        with _announced(request) as announced:
            work = _Work(request, map_values(inputs, request.fetch), targets)
            refuse_overlap(work.sources, targets)
            record = work.new_record()
            checkpoints = checkpoints_of(record, request.first_output, environment)
            if environment.resume and not announced and (result := keep_result(record, outputs, request.cache)):
                checkpoints.remove()  # left behind if the step was killed just before its end
                return result
            for folder in targets.values():
                prepare_output(folder)
        return _run_recorded(work, RecordFile(record, request.first_output), checkpoints)


@dataclass(frozen=True)
class _Request:
    """A validated request to run a step.

    Attributes:
        name: name of the step.
        step: module of the step.
        settings: configuration of the step.
        inputs, outputs: URIs by name.
        environment: variables set by the launcher.
        processes: processes that run the step together.
    """

    name: str
    step: StepModule
    settings: Section
    inputs: Uris
    outputs: Mapping[str, str]
    environment: StepEnvironment
    processes: Processes

    @property
    def first_output(self) -> str:
        """URI of the output beside which the record is stored."""
        return next(iter(self.outputs.values()))

    @property
    def cache(self) -> Cache:
        return Cache(self.environment.cache_folder)

    def fetch(self, name: str, uri: str) -> Path:
        return input_folder(name, uri, self.cache)

    def new_record(self, contents: Mapping[str, Any] | None = None) -> StepRecord:
        """Create the step's record, with the inputs' content hashes if they are known."""
        uris = map_values(self.inputs, lambda _, uri: shared_uri(uri))
        inputs = {key: RecordedInput(uri=uri, content=(contents or {}).get(key)) for key, uri in uris.items()}
        values = self.settings.model_dump(mode="json")
        return StepRecord.start(self.name, values, inputs, self.outputs, self.environment, self.processes.total)


@dataclass(frozen=True)
class _Work:
    """A request with its local folders.

    Attributes:
        request: what to run.
        sources, targets: the local folders that the step reads and writes, by name.
    """

    request: _Request
    sources: Mapping[str, Any]
    targets: Mapping[str, Path]

    @property
    def unsent(self) -> Path:
        """The file for tracking data that could not be sent."""
        return next(iter(self.targets.values())) / UNSENT

    def new_record(self) -> StepRecord:
        return self.request.new_record(map_values(self.sources, content_of))

    def run(self, tracker: Tracker, checkpoints: Checkpoints) -> StepResult:
        """Run the step and upload its outputs if their URIs are in S3."""
        request = self.request
        # A rerun reports the URIs of the first run.
        uris = dict(request.inputs) | request.environment.input_uris
        if request.processes.total > 1:
            job = Job(
                step=request.name,
                config=request.settings.model_dump(mode="json"),
                sources=dict(self.sources),
                targets=dict(self.targets),
                input_uris=uris,
                checkpoints=(checkpoints.uri, checkpoints.fingerprint, checkpoints.keep),
                environment=request.environment.model_dump(mode="json"),
                mlflow_run=tracker.run_id if isinstance(tracker, MlflowTracker) else None,
                unsent=self.unsent,
            )
            result = run_in_processes(job, request.processes)
        else:
            inputs, outputs = request.step.Inputs(**self.sources), request.step.Outputs(**self.targets)
            context = Context(tracker, checkpoints, uris, request.environment)
            result = request.step.run(request.settings, inputs, outputs, context)
        for name, uri in request.outputs.items():
            if is_s3(uri):
                upload_folder(self.targets[name], uri)
        return result


def _assist(request: _Request) -> StepResult:
    """Run the processes of a node other than the first; the first node writes the record and the outputs."""
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, stop_signals_raise():
        targets = {key: Path(scratch) / key for key in request.outputs}
        local = _Request(
            request.name, request.step, request.settings, request.inputs, {}, request.environment, request.processes
        )
        work = _Work(local, map_values(request.inputs, request.fetch), targets)
        try:
            return work.run(NoTracker(), Checkpoints("", ""))
        except Stopped as error:
            logger.info("%s: %s", request.name, error)
            raise


@contextlib.contextmanager
def _announced(request: _Request) -> Iterator[bool]:
    """Write a record before inputs are fetched, unless an earlier attempt has left one.

    Yields True if it was written, which means that there was no earlier attempt.
    """
    output = request.first_output
    remote = [uri for uri in flatten(request.inputs) if is_s3(uri)]
    taken = file_exists(output, RECORD) or (not is_s3(output) and Path(output).exists())
    if not remote or taken:
        yield False
        return
    file = RecordFile(request.new_record(), output)
    file.write()
    try:
        yield True
    except BaseException as error:
        with contextlib.suppress(UserError):
            file.write(status=status_of(error), error=reason_of(error), exit_code=exit_code_of(error))
        raise


def _fail_without_device(request: _Request, reason: str) -> NoReturn:
    """Raise NoDeviceError before any data is read; write a record and a failed run in MLflow."""
    record = request.new_record()
    with contextlib.suppress(UserError):
        file = RecordFile(record, request.first_output)
        file.write(status=Status.FAILED, error=reason, exit_code=ExitCode.NO_DEVICE)
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, contextlib.suppress(UserError):
        tracker = _open_tracker(record, request.environment, Path(scratch) / UNSENT)
        tracker.close(succeeded=False, error=f"{request.name}: {reason}")
    raise NoDeviceError(reason)


def _missing_device(environment: StepEnvironment, processes: Processes) -> str | None:
    """Return a description of the problem if a required GPU is missing, else None.

    Old KFP backends drop the GPU request silently; without this check, training would run on a CPU for days.
    """
    if environment.required_device is None:
        return None
    import torch

    # device_count alone also counts GPUs whose driver is too old to be used.
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= processes.here:
        return None
    asked = "a GPU" if processes.here == 1 else f"{processes.here} GPUs"
    return (
        f"the step requires {asked}, but PyTorch finds {found or 'none'}; it was requested as "
        f"{environment.required_device}; check that the node has free GPUs, that its device plugin is running, and "
        "that KFP's backend passes the request to the pod"
    )


def _run_recorded(work: _Work, file: RecordFile, checkpoints: Checkpoints) -> StepResult:
    """Run the step with its record and its MLflow run."""
    request, name = work.request, work.request.name
    meter = Meter(request.processes.total, request.processes.here)
    tracker: Tracker = NoTracker()
    file.write()
    try:
        tracker = _open_tracker(file.record, request.environment, work.unsent)
        if isinstance(tracker, MlflowTracker):
            file.write(launch=file.record.launch.model_copy(update={"mlflow_run": tracker.run_id}))
        tracker.log_configuration(file.record.config, file.record.title)
        if name != _ROW_STEP:
            tracker.log_params(flat(request.settings.model_dump(mode="json")))
        if name in TRAINING_STEPS:
            tracker.watch_system()
        result = work.run(tracker, checkpoints)
        cost = meter.read()
        _log_cost(tracker, name, cost)
        tracker.log_metrics(result.metrics)
        made = file.record.describe_outputs({key: read_folder(folder) for key, folder in work.targets.items()})
        file.write(
            status=Status.DONE,
            seconds=cost.seconds,
            cost=cost,
            result=result,
            outputs=made,
            exit_code=ExitCode.SUCCESS,
        )
    except BaseException as raised:
        error = missing_extra(raised) or raised
        reason, status, cost = reason_of(error), status_of(error), meter.read()
        with contextlib.suppress(UserError):  # S3 may be the cause; report the first error
            file.write(status=status, error=reason, seconds=cost.seconds, cost=cost, exit_code=exit_code_of(error))
        _log_cost(tracker, name, cost)
        tracker.close(succeeded=False, error=f"{name}: {reason}")
        if status is Status.STOPPED:
            logger.info("%s: %s; rerun it to resume", name, reason)
            raise Stopped(f"{name}: {reason}", code=exit_code_of(error)) from None
        if isinstance(error, UserError):
            raise error from None
        logger.error("%s failed", name, exc_info=error)
        raise StepFailedError(f"{name}: {reason}") from error
    else:
        tracker.close(succeeded=True, last=result.metrics if name == list(STEPS)[-1] else None)
    finally:
        if work.unsent.exists() and is_s3(request.first_output):
            with contextlib.suppress(UserError):
                write_bytes(join_uri(request.first_output, UNSENT), work.unsent.read_bytes())
    try:
        checkpoints.remove()
    except UserError as error:
        logger.warning("checkpoints could not be removed: %s", error)
    return result


def _log_cost(tracker: Tracker, name: str, cost: Cost) -> None:
    tracker.log_metrics(cost.metrics)
    # The device of a pipeline run is the one used for training.
    tracker.set_tags({DEVICE_TAG: cost.device}, of_the_run=name in TRAINING_STEPS)


def _open_tracker(record: StepRecord, environment: StepEnvironment, unsent: Path) -> Tracker:
    """Open the step's MLflow run, if tracking is configured."""
    if not environment.tracking_uri:
        return NoTracker()
    return MlflowTracker.start(environment, record.title.replace("/", " "), record.tags, unsent)
