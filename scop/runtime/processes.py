"""A training step in several processes, one per GPU of a pod or of several nodes, started by torchrun's launcher.

The process started by KFP or Kubeflow Trainer writes the record, fetches the inputs, opens the MLflow run and stores
the outputs. All processes call only the step's ``run``: the first writes the outputs, and those of the others are
discarded.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from scop.environment import THREADS_VARIABLE, StepEnvironment, TorchrunEnvironment, name_of
from scop.errors import Stopped, UserError, first_line
from scop.runtime.exit_codes import exit_code_of
from scop.runtime.logs import log_nothing, log_to_standard_output
from scop.runtime.registry import TRAINING_STEPS
from scop.runtime.result import StepResult
from scop.runtime.step import Context, find_step
from scop.runtime.uris import map_values
from scop.storage.checkpoints import Checkpoints
from scop.system.progress import show_progress_on
from scop.tracking.mlflow import MlflowTracker
from scop.tracking.tracker import NoTracker, Tracker

_JOB, _RESULT = "job.json", "result.json"
_POLL_SECONDS = 1.0
_RENDEZVOUS_SECONDS = 3600
"""Timeout for nodes to wait for each other; each of them first pulls an image and fetches the inputs."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # handled by torchrun's launcher


@dataclass(frozen=True)
class Processes:
    """Processes that train together.

    Attributes:
        here: number of processes in this pod.
        nodes: number of pods.
        node: index of this pod.
        master: address of the first pod, HOST:PORT, if there are several.
    """

    here: int = 1
    nodes: int = 1
    node: int = 0
    master: str | None = None

    @property
    def total(self) -> int:
        """Number of processes in all pods."""
        return self.here * self.nodes


class Job(BaseModel):
    """The work that the processes share.

    Attributes:
        step: name of the step.
        config: sections of its configuration, by name.
        sources, targets: local folders that it reads and writes, by name.
        input_uris: absolute paths or URIs of the inputs, by name.
        checkpoints: URI, fingerprint and number of checkpoints to keep.
        environment: variables set by the launcher.
        mlflow_run: MLflow ID of the step's open run.
        unsent: the file for tracking data that could not be sent.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    config: dict[str, Any]
    sources: dict[str, Path | list[Path]]
    targets: dict[str, Path]
    input_uris: dict[str, str | list[str]]
    checkpoints: tuple[str, str, int]
    environment: StepEnvironment
    mlflow_run: str | None
    unsent: Path


def plan_processes(step: str, environment: StepEnvironment, torchrun: TorchrunEnvironment) -> Processes:
    """Return the processes that run a step together, according to SCOP_PROCESSES and Kubeflow Trainer's variables.

    Raises:
        UserError: there are fewer GPUs than processes, or the step was started by torchrun.
    """
    count = environment.processes
    variable = name_of(StepEnvironment, "processes")
    if torchrun.world_size > 1:
        raise UserError(f"start the step without torchrun and set {variable}; the step starts the processes itself")
    if step not in TRAINING_STEPS:
        return Processes()
    if count > 1:
        import torch

        if torch.cuda.is_available() and torch.cuda.device_count() < count:
            raise UserError(f"{variable} is {count}, but there are {torch.cuda.device_count()} GPUs")
    return Processes(count, torchrun.nodes, torchrun.node, f"{torchrun.master_address}:{torchrun.master_port}")


def run_in_processes(job: Job, processes: Processes) -> StepResult:
    """Run a step in several processes.

    Returns:
        The step's result on the first node; an empty result on the others.

    Raises:
        UserError: the first UserError of any process.
        Stopped: a signal stopped the processes after they wrote a checkpoint.
        RuntimeError: a process failed; its traceback is on stderr.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the errors below are clearer
    os.environ.setdefault(THREADS_VARIABLE, str(max(1, len(os.sched_getaffinity(0)) // processes.here)))
    rendezvous: dict[str, Any] = {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "local_addr": "localhost",
        "run_id": uuid.uuid4().hex,
    }
    if processes.nodes > 1:
        rendezvous = {
            "rdzv_backend": "static",
            "rdzv_endpoint": processes.master,
            "rdzv_configs": {"rank": processes.node, "timeout": _RENDEZVOUS_SECONDS},
            "run_id": "scop",
        }
    launch = LaunchConfig(
        min_nodes=processes.nodes,
        max_nodes=processes.nodes,
        nproc_per_node=processes.here,
        max_restarts=0,
        **rendezvous,
    )
    with tempfile.TemporaryDirectory(prefix="scop-") as name:
        folder = Path(name)
        (folder / _JOB).write_text(job.model_dump_json())
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            elastic_launch(launch, sys.executable)("-m", "scop.runtime.processes", name)
        except (ChildFailedError, SignalException) as error:
            raise _reason(folder, error) from None
        finally:  # the launcher does not restore the handlers
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return StepResult(**json.loads((folder / _RESULT).read_text())) if processes.node == 0 else StepResult()


def _reason(folder: Path, error: Exception) -> Exception:
    """Return the exception of the process that failed first; the others fail because its connection is closed."""
    failures: Mapping[int, Any] = getattr(error, "failures", {})
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # a killed process cannot report
            name = signal.Signals(-failure.exitcode).name
            hint = " (possibly out of memory)" if failure.exitcode == -signal.SIGKILL else ""
            return RuntimeError(f"process {rank} was killed by {name}{hint}")
    reports = [json.loads(path.read_text()) for path in folder.glob("failure-*.json")]
    for kind, raised in (("user error", UserError), ("stopped", Stopped), ("failure", RuntimeError)):
        found = sorted((entry for entry in reports if entry["kind"] == kind), key=lambda entry: entry["time"])
        if found:
            where = "" if kind != "failure" else f"process {found[0]['rank']}: "
            return raised(where + found[0]["message"])
    codes = ", ".join(f"{rank} with {failure.exitcode}" for rank, failure in sorted(failures.items()))
    return RuntimeError(f"the processes ended without a report ({codes})") if codes else Stopped("terminated")


def main(name: str) -> int:
    """Run one of the processes.

    Args:
        name: folder with the job, in which the result and failure reports are written.

    Returns:
        The exit code.
    """
    folder = Path(name)
    rank = TorchrunEnvironment.read().rank
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        result = _work(Job.model_validate_json((folder / _JOB).read_bytes()), folder, rank)
        if rank == 0:
            result.save(str(folder / _RESULT))
        return 0
    except UserError as error:
        kind, message, code = "user error", str(error), exit_code_of(error)
    except Stopped as error:
        kind, message, code = "stopped", str(error), exit_code_of(error)
    except Exception as error:
        traceback.print_exc()
        kind, message, code = "failure", first_line(error), exit_code_of(error)
    failure = {"kind": kind, "message": message, "rank": rank, "time": time.time()}
    (folder / f"failure-{rank}.json").write_text(json.dumps(failure))
    return code


def _end_with_parent(parent: int) -> None:
    """End this process when its parent dies; the processes of a killed step would wait for each other forever."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


def _work(job: Job, folder: Path, rank: int) -> StepResult:
    from scop.compute import distributed
    from scop.config.parsing import parse
    from scop.training.shared_checkpoints import SharedCheckpoints

    step = find_step(job.step)
    sources = map_values(job.sources, lambda _, path: Path(path))
    uri, fingerprint, keep = job.checkpoints
    checkpoints = SharedCheckpoints(Checkpoints(uri, fingerprint, keep))
    tracker: Tracker = NoTracker()
    targets = job.targets
    with ExitStack() as stack:
        stack.enter_context(show_progress_on(job.environment.terminal, enabled=rank == 0))
        if rank > 0:  # only the first process writes and logs; the others report failures
            log_nothing()
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            targets = {key: folder / f"rank-{rank}" / key for key in job.targets}
            for target in targets.values():
                target.mkdir(parents=True)
        else:
            log_to_standard_output()
            if job.mlflow_run is not None and job.environment.tracking_uri is not None:
                tracker = MlflowTracker.join(job.environment.tracking_uri, job.mlflow_run, job.unsent)
        stack.enter_context(distributed.process_group(TorchrunEnvironment.read().local_rank))
        inputs, outputs = step.Inputs(**sources), step.Outputs(**targets)
        context = Context(tracker, checkpoints, job.input_uris, job.environment)
        return step.run(parse(step.Config, job.config), inputs, outputs, context)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
