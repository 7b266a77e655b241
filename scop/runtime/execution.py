"""The life of a step, the same wherever it runs: in a KFP component, in docker, or by `scop step`.

A step is a module of `scop.steps` with a ``Config`` (its sections), ``Inputs`` and ``Outputs`` (its folders) and a
``run``. The runtime validates the configuration and the inputs, writes `step.json` beside the outputs before any work
starts, opens the tracking run, lets the step work, and closes. A user's mistake ends with exit code 2 and one line;
anything else with 1 and the traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.config.parsing import Section, parse
from scop.errors import Stopped, UserError
from scop.runtime import train_job
from scop.runtime.exit_codes import TERMINATED, code_of, ending_when_told, reason_of, status_of
from scop.runtime.places import (
    KFP_ROOT_VARIABLE,
    STOPPED,
    Places,
    absolute,
    check,
    content_of,
    each,
    exchanged,
    fetched,
    make_ready,
    meant,
    refuse_overlap,
    refuse_overlap_in_s3,
)
from scop.runtime.processes import Job, Processes, wanted, work_together
from scop.runtime.record import RecordedInput, RecordFile, StepRecord, flat
from scop.runtime.registry import STEPS, TRAINING_STEPS
from scop.runtime.result import StepResult
from scop.runtime.resume import RESUME_VARIABLE, checkpoints_of, kept
from scop.runtime.step import Context, StepModule, find_step
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.checkpoints import Checkpoints
from scop.storage.manifest import RECORD, read_folder
from scop.system.cost import Cost, Meter
from scop.tracking.mlflow import UNSENT, MlflowTracker
from scop.tracking.tags import DEVICE_TAG
from scop.tracking.tracker import NoTracker, Tracker

PLACES_VARIABLE = "SCOP_PLACES"
"""Set by `scop rerun`: the recorded places of the inputs, in JSON, which a summary names."""
DEVICE_VARIABLE = "SCOP_REQUIRED_DEVICE"
"""Set on a cluster for a step that was promised a GPU: the class of step, resource and node selector it runs under."""

ROW_STEP = "evaluate"
"""Its run in MLflow is the row that people compare: it says itself which parameters belong there, and no more do, for
MLflow reads all that a run has whenever it is looked for."""

NO_DEVICE = 3


def execute(name: str, config: Mapping[str, Any], inputs: Places, outputs: Mapping[str, str]) -> StepResult:
    """Run a step as a component does, and leave the process where it fails.

    Args:
        name: of the step.
        config: its sections by name, each a mapping.
        inputs: input folders by name; a list of folders where the step takes several.
        outputs: output folders by name.
    """
    if (root := os.environ.get(KFP_ROOT_VARIABLE)) and (Path(root) / STOPPED).exists():
        raise SystemExit(TERMINATED)  # KFP begins the next variant though one was stopped
    try:
        return run_step(
            name,
            config,
            each(inputs, lambda _, path: meant(path)),
            each(outputs, lambda _, path: meant(path)),
        )
    except UserError as error:
        print(f"scop: error: {name}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def run_step(name: str, config: Mapping[str, Any], inputs: Places, outputs: Mapping[str, str]) -> StepResult:
    """Run a step; arguments as for `execute`, where any folder may be an ``s3://`` URI.

    Raises:
        UserError: anything about the configuration or the inputs is wrong.
    """
    step = find_step(name)
    inputs, outputs = each(inputs, lambda _, place: absolute(place)), each(outputs, lambda _, place: absolute(place))
    processes = wanted(name)
    settings = parse(step.Config, config)
    inputs = check(name, "input", step.Inputs, inputs)
    check(name, "output", step.Outputs, outputs)
    refuse_overlap_in_s3(inputs, outputs)
    if (lacking := _lacking_device(processes.here)) is not None:
        _refuse(name, settings, inputs, outputs, lacking)
    if (plan := train_job.planned()) is not None:
        with ending_when_told():
            return train_job.run(plan, name, settings, inputs, outputs)
    if processes.node > 0:
        return _assist(name, step, settings, inputs, outputs, processes)
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, ending_when_told():
        targets = {key: Path(scratch) / key if storage.is_uri(value) else Path(value) for key, value in outputs.items()}
        with _announced(name, settings, inputs, outputs) as announced:
            sources = each(inputs, fetched)
            work = _Work(name, step, settings, inputs, sources, outputs, targets, processes)
            refuse_overlap(work.sources, targets)
            record = work.describe()
            checkpoints = checkpoints_of(record, work.first_output)
            if os.environ.get(RESUME_VARIABLE) and not announced and (result := kept(record, outputs)):
                checkpoints.remove()  # which a try that was killed at its very end has left
                return result
            for folder in targets.values():
                make_ready(folder)
        return _run_recorded(work, RecordFile(record, work.first_output), checkpoints)


def _assist(
    name: str, step: StepModule, settings: Section, inputs: Places, outputs: Mapping[str, str], processes: Processes
) -> StepResult:
    """A further node's part: its processes work with the first node's, which keeps the record and the outputs."""
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, ending_when_told():
        targets = {key: Path(scratch) / key for key in outputs}
        work = _Work(name, step, settings, inputs, each(inputs, fetched), {}, targets, processes)
        try:
            return work.run(NoTracker(), Checkpoints("", ""))
        except Stopped as error:
            print(f"{name}: {error}", flush=True)
            raise SystemExit(TERMINATED) from None


@contextlib.contextmanager
def _announced(name: str, settings: Section, inputs: Places, outputs: Mapping[str, str]) -> Iterator[bool]:
    """Within, while inputs are fetched, there is a record already, unless an earlier try's would be lost by it.

    Gives whether there is: then there was no earlier try.
    """
    output = next(iter(outputs.values()))
    from_afar = [p for v in inputs.values() for p in (v if isinstance(v, list) else [v]) if storage.is_uri(p)]
    taken = storage.exists_at(output, RECORD) or (not storage.is_uri(output) and Path(output).exists())
    if not from_afar or taken:
        yield False
        return
    places = {key: RecordedInput(uri=uri) for key, uri in each(inputs, lambda _, place: exchanged(place)).items()}
    file = RecordFile(StepRecord.starting(name, settings.model_dump(mode="json"), places, outputs), output)
    file.write()
    try:
        yield True
    except BaseException as error:
        with contextlib.suppress(UserError):
            file.write(status=status_of(error), error=reason_of(error), code=code_of(error))
        raise


def _refuse(name: str, settings: Section, inputs: Places, outputs: Mapping[str, str], reason: str) -> None:
    """Leave the process before any data is read, but not without a record, and a word to the run in MLflow."""
    print(f"scop: error: {name}: {reason}", file=sys.stderr, flush=True)
    places = {key: RecordedInput(uri=uri) for key, uri in each(inputs, lambda _, place: exchanged(place)).items()}
    record = StepRecord.starting(name, settings.model_dump(mode="json"), places, outputs)
    with contextlib.suppress(UserError):
        RecordFile(record, next(iter(outputs.values()))).write(status="failed", error=reason, code=NO_DEVICE)
    with tempfile.TemporaryDirectory(prefix="scop-") as scratch, contextlib.suppress(UserError):
        _open_tracker(record, Path(scratch) / UNSENT).close(succeeded=False, error=f"{name}: {reason}")
    raise SystemExit(NO_DEVICE)


def _lacking_device(processes: int) -> str | None:
    """What is wrong where a GPU was asked for and is not there, or None.

    Old backends drop the request silently; hours on a CPU would be the result.
    """
    if promised := os.environ.get(DEVICE_VARIABLE):
        import torch

        # Counted alone they may be there for a driver that is too old to be used.
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if there < processes:
            asked = "a GPU" if processes == 1 else f"{processes} GPUs"
            return (
                f"it was to have {asked}, and PyTorch sees {there or 'none'}; it runs as {promised}; check that the "
                "node has them free, that its device plugin runs, and that KFP's backend passes the request on"
            )
    return None


@dataclass(frozen=True)
class _Work:
    """What a step is to do, and on what.

    Attributes:
        name: of the step.
        step: its module.
        settings: its validated configuration.
        inputs, outputs: their places by name.
        sources, targets: the local folders that it reads and writes.
        processes: which share the work.
    """

    name: str
    step: StepModule
    settings: Section
    inputs: Places
    sources: Mapping[str, Any]
    outputs: Mapping[str, str]
    targets: Mapping[str, Path]
    processes: Processes

    @property
    def places(self) -> Places:
        """Where the inputs come from; for a step that is run again, where they came from the first time."""
        told: dict[str, Any] = json.loads(os.environ.get(PLACES_VARIABLE, "{}"))
        return each(self.inputs, lambda _, place: absolute(place)) | told

    @property
    def first_output(self) -> str:
        """The place of the output that the record lies beside."""
        return next(iter(self.outputs.values()))

    def describe(self) -> StepRecord:
        contents = each(self.sources, content_of)
        places = each(self.inputs, lambda _, place: exchanged(place))
        inputs = {key: RecordedInput(uri=uri, content=contents[key]) for key, uri in places.items()}
        return StepRecord.starting(
            self.name, self.settings.model_dump(mode="json"), inputs, self.outputs, self.processes.total
        )

    def run(self, tracker: Tracker, checkpoints: Checkpoints) -> StepResult:
        """Do it, and put what was made where it belongs."""
        if self.processes.total > 1:
            result = self._share(tracker, checkpoints)
        else:
            inputs, outputs = self.step.Inputs(**self.sources), self.step.Outputs(**self.targets)
            result = self.step.run(self.settings, inputs, outputs, Context(tracker, checkpoints, self.places))
        for name, place in self.outputs.items():
            if storage.is_uri(place):
                remote.send_folder(self.targets[name], place)
        return result

    def _share(self, tracker: Tracker, checkpoints: Checkpoints) -> StepResult:
        job = Job(
            step=self.name,
            config=self.settings.model_dump(mode="json"),
            sources=dict(self.sources),
            targets=dict(self.targets),
            places=dict(self.places),
            checkpoints=(checkpoints.place, checkpoints.fingerprint, checkpoints.keep),
            tracking_run=tracker.run_id if isinstance(tracker, MlflowTracker) else None,
            unsent=self.unsent,
        )
        return work_together(job, self.processes)

    @property
    def unsent(self) -> Path:
        """The file for what could not be tracked."""
        return next(iter(self.targets.values())) / UNSENT


def _run_recorded(work: _Work, file: RecordFile, checkpoints: Checkpoints) -> StepResult:
    """The work between the record's first line and its last."""
    meter, name = Meter(work.processes.total, work.processes.here), file.record.step
    unsent = work.unsent
    tracker: Tracker = NoTracker()
    file.write()
    try:
        tracker = _open_tracker(file.record, unsent)
        if isinstance(tracker, MlflowTracker):
            file.write(tracking_run=tracker.run_id)
        tracker.log_configuration(file.record.config, file.record.title)
        if name != ROW_STEP:
            tracker.log_params(flat(work.settings.model_dump(mode="json")))
        if name in TRAINING_STEPS:
            tracker.watch_system()
        result = work.run(tracker, checkpoints)
        cost = meter.read()
        _tell_cost(tracker, name, cost)
        tracker.log_metrics(result.metrics)
        made = file.record.made({key: read_folder(folder) for key, folder in work.targets.items()})
        file.write(status="done", seconds=cost.seconds, cost=cost, result=result, outputs=made, code=0)
    except BaseException as error:
        reason = reason_of(error)
        status = status_of(error)
        cost = meter.read()
        with contextlib.suppress(UserError):  # S3 itself may be what failed; the first error is the one to tell
            file.write(status=status, error=reason, seconds=cost.seconds, cost=cost, code=code_of(error))
        _tell_cost(tracker, name, cost)
        tracker.close(succeeded=False, error=f"{name}: {reason}")
        if status == "stopped":
            print(f"{name}: {reason}; run it again, and it goes on from there", flush=True)
            raise SystemExit(TERMINATED) from None
        if not isinstance(error, UserError):
            traceback.print_exc()
            raise SystemExit(1) from None
        raise
    else:
        tracker.close(succeeded=True, last=result.metrics if name == list(STEPS)[-1] else None)
    finally:
        if unsent.exists() and storage.is_uri(work.first_output):
            with contextlib.suppress(UserError):
                storage.write(storage.join(work.first_output, UNSENT), unsent.read_bytes())
    try:
        checkpoints.remove()
    except UserError as error:
        print(f"warning: checkpoints are left behind: {error}", flush=True)
    return result


def _tell_cost(tracker: Tracker, name: str, cost: Cost) -> None:
    tracker.log_metrics(cost.metrics)
    # The device of a pipeline's run is the one that it trains on.
    tracker.set_tags({DEVICE_TAG: cost.device}, of_the_run=name in TRAINING_STEPS)


def _open_tracker(record: StepRecord, unsent: Path) -> Tracker:
    """MLflow where MLFLOW_TRACKING_URI names one; `scop run` sets it."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return NoTracker()
    return MlflowTracker(record.title.replace("/", " "), record.tags, unsent)
