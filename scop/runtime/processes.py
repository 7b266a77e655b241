"""A training step run by several processes, one on each GPU of its pod or of several nodes, through torchrun.

The process that KFP or Kubeflow Trainer started has the step's life: record, inputs from S3, tracking run, outputs.
Only the work itself, the step's ``run``, is done by all of them: the first writes the outputs, what the others write is
thrown away.
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

from scop.errors import Stopped, UserError, first_line
from scop.runtime.exit_codes import code_of
from scop.runtime.places import each
from scop.runtime.registry import TRAINING_STEPS
from scop.runtime.result import StepResult
from scop.runtime.step import Context, find_step
from scop.storage.checkpoints import Checkpoints
from scop.tracking.mlflow import MlflowTracker
from scop.tracking.tracker import NoTracker, Tracker

PROCESSES_VARIABLE = "SCOP_PROCESSES"
"""So many processes train; on a cluster, the number of GPUs that a pod has."""

_JOB, _RESULT = "job.json", "result.json"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_FOR_ALL_NODES = 3600
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # which torchrun's launcher handles


@dataclass(frozen=True)
class Processes:
    """Who trains together.

    Attributes:
        here: processes of this pod.
        nodes: pods, this one included.
        node: which of them this is, counted from 0.
    """

    here: int = 1
    nodes: int = 1
    node: int = 0

    @property
    def total(self) -> int:
        return self.here * self.nodes


class Job(BaseModel):
    """The work that the processes share.

    Attributes:
        step: its name.
        config: its sections by name.
        sources, targets: the local folders that it reads and writes, by name.
        places: of the inputs: absolute paths or URIs, by name.
        checkpoints: place, fingerprint and number of those kept.
        tracking_run: MLflow's id of the step's run, which is open.
        unsent: the file for what could not be sent there.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    config: dict[str, Any]
    sources: dict[str, Path | list[Path]]
    targets: dict[str, Path]
    places: dict[str, str | list[str]]
    checkpoints: tuple[str, str, int]
    tracking_run: str | None
    unsent: Path


def wanted(step: str) -> Processes:
    """Who is to train together: as SCOP_PROCESSES says and, in a TrainJob, Kubeflow Trainer's own variables.

    Raises:
        UserError: they were asked for in a way that cannot be.
    """
    text = os.environ.get(PROCESSES_VARIABLE, "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{PROCESSES_VARIABLE} is {text!r}; it must be a number of processes, 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"start the step without torchrun, with {PROCESSES_VARIABLE} set; it starts the processes itself"
        )
    if step not in TRAINING_STEPS:
        return Processes()
    if int(text) > 1:
        import torch

        if torch.cuda.is_available() and torch.cuda.device_count() < int(text):
            raise UserError(f"{PROCESSES_VARIABLE} is {text}, and there are {torch.cuda.device_count()} GPUs")
    # PET: what torchrun itself reads where it is not told on its command line.
    return Processes(int(text), int(os.environ.get("PET_NNODES", "1")), int(os.environ.get("PET_NODE_RANK", "0")))


def work_together(job: Job, processes: Processes) -> StepResult:
    """Do the work by several processes; its result where the first of them runs, an empty one on the other nodes.

    Raises:
        UserError: the first that a process raised.
        Stopped: they were told to stop, and wrote a checkpoint.
        RuntimeError: a process failed; its traceback is on stderr.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its banners say less than we do
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes.here)))
    meeting: dict[str, Any] = {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "local_addr": "localhost",
        "run_id": uuid.uuid4().hex,
    }
    if processes.nodes > 1:
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}",
            # Each node has fetched an image and the inputs before it comes here.
            "rdzv_configs": {"rank": processes.node, "timeout": _SECONDS_FOR_ALL_NODES},
            "run_id": "scop",
        }
    launch = LaunchConfig(
        min_nodes=processes.nodes,
        max_nodes=processes.nodes,
        nproc_per_node=processes.here,
        max_restarts=0,
        **meeting,
    )
    with tempfile.TemporaryDirectory(prefix="scop-") as name:
        folder = Path(name)
        (folder / _JOB).write_text(job.model_dump_json())
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            elastic_launch(launch, sys.executable)("-m", "scop.runtime.processes", name)
        except (ChildFailedError, SignalException) as error:
            raise _reason(folder, error) from None
        finally:  # the launcher keeps its own
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return StepResult(**json.loads((folder / _RESULT).read_text())) if processes.node == 0 else StepResult()


def _reason(folder: Path, error: Exception) -> Exception:
    """What a process said that was the first to fail: when one ends, the others only find its connection closed."""
    failures: Mapping[int, Any] = getattr(error, "failures", {})
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # it could not say anything
            name = signal.Signals(-failure.exitcode).name
            hint = ", perhaps for want of memory" if failure.exitcode == -signal.SIGKILL else ""
            return RuntimeError(f"process {rank} was ended by {name}{hint}")
    said = [json.loads(path.read_text()) for path in folder.glob("failure-*.json")]
    for kind, raised in (("mistake", UserError), ("stopped", Stopped), ("failure", RuntimeError)):
        found = sorted((entry for entry in said if entry["kind"] == kind), key=lambda entry: entry["time"])
        if found:
            where = "" if kind != "failure" else f"process {found[0]['rank']}: "
            return raised(where + found[0]["message"])
    codes = ", ".join(f"{rank} with {failure.exitcode}" for rank, failure in sorted(failures.items()))
    return RuntimeError(f"the processes ended without a word ({codes})") if codes else Stopped("terminated")


def main(name: str) -> int:
    """One of the processes; its work is described in a folder. Returns the exit code."""
    folder = Path(name)
    rank = int(os.environ["RANK"])
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        result = _work(Job.model_validate_json((folder / _JOB).read_bytes()), folder, rank)
        if rank == 0:
            result.save(str(folder / _RESULT))
        return 0
    except UserError as error:
        kind, message, code = "mistake", str(error), code_of(error)
    except Stopped as error:
        kind, message, code = "stopped", str(error), code_of(error)
    except Exception as error:
        traceback.print_exc()
        kind, message, code = "failure", first_line(error), code_of(error)
    failure = {"kind": kind, "message": message, "rank": rank, "time": time.time()}
    (folder / f"failure-{rank}.json").write_text(json.dumps(failure))
    return code


def _end_with_parent(parent: int) -> None:
    """A step that was killed outright could not stop its processes, which would wait for each other for ever."""
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _work(job: Job, folder: Path, rank: int) -> StepResult:
    from scop.compute import distributed
    from scop.config.parsing import parse
    from scop.training.shared_checkpoints import SharedCheckpoints

    step = find_step(job.step)
    sources = each(job.sources, lambda _, path: Path(path))
    place, fingerprint, keep = job.checkpoints
    checkpoints = SharedCheckpoints(Checkpoints(place, fingerprint, keep))
    tracker: Tracker = NoTracker()
    targets = job.targets
    with ExitStack() as stack:
        if rank > 0:  # one process writes, and speaks; of the others only failures are heard
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            targets = {key: folder / f"rank-{rank}" / key for key in job.targets}
            for target in targets.values():
                target.mkdir(parents=True)
        elif job.tracking_run is not None:
            tracker = MlflowTracker.joining(job.tracking_run, job.unsent)
        stack.enter_context(distributed.process_group())
        inputs, outputs = step.Inputs(**sources), step.Outputs(**targets)
        return step.run(parse(step.Config, job.config), inputs, outputs, Context(tracker, checkpoints, job.places))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
