"""The progress and the outcome of a run on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.server import Server, UnavailableError
from scop.runtime.registry import STEPS

ENDED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
_TOLERATED_FAILURES = 8


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        state: KFP's state: SUCCEEDED, FAILED, SKIPPED or CANCELED.
        error: the failed task and its message, or None.
    """

    state: str
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        return self.state == "SUCCEEDED"


def follow(server: Server, identity: str, report: Callable[[str], None], every: float) -> Outcome:
    """Wait until a run ends.

    Args:
        server: server of the run.
        identity: KFP's run ID.
        report: called with one line for each change of a task's state.
        every: polling interval in seconds.

    Raises:
        UserError: the server can no longer be reached, or refuses.
    """
    reported: dict[str, str] = {}
    failures = 0
    while True:
        try:
            with server.errors("read the run"):
                run = server.client.get_run(identity)
            failures = 0
        except UnavailableError:
            failures += 1
            if failures > _TOLERATED_FAILURES:
                raise
            time.sleep(every)
            continue
        tasks = (run.run_details and run.run_details.task_details) or []
        for task in _steps_of(tasks):
            if reported.get(task.task_id) != task.state:
                reported[task.task_id] = task.state
                report(f"{_title(task, tasks)}: {task.state.lower()}")
        if run.state in ENDED:
            return Outcome(run.state, None if run.state == "SUCCEEDED" else _error_of(run, tasks))
        time.sleep(every)


def _steps_of(tasks: list[Any]) -> list[Any]:
    """Return the tasks that are steps; KFP also lists drivers, executors, loops and iterations."""
    steps = {step.replace("_", "-") for step in STEPS}
    return [task for task in tasks if task.state and task.display_name in steps]


def _title(task: Any, tasks: list[Any]) -> str:
    """Return the step's name, with the index of its variant if it has one."""
    by_id = {other.task_id: other for other in tasks}
    name, above = task.display_name, task
    while (above := by_id.get(above.parent_task_id)) is not None:
        label = above.display_name or ""
        if "iteration" in label:
            return f"variant {label.rpartition('-')[2]} {name}"
    return str(name)


def _error_of(run: Any, tasks: list[Any]) -> str:
    failed = [task for task in _steps_of(tasks) if task.state == "FAILED"]
    for task in failed:
        message = task.error.message if task.error else None
        pod = f" (pod {task.pod_name})" if task.pod_name else ""
        return f"step {_title(task, tasks)} failed{pod}: {message or 'KFP has no message; see the log'}"
    return (run.error.message if run.error else None) or f"the run ended as {run.state}"
