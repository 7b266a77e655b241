"""The MLflow run of a whole pipeline run, under which its steps are tracked.

On one machine `scop run` opens and closes it. On a cluster nobody does but the steps: each finds it by the id of KFP's
run or creates it. MLflow offers nothing by which two that create it at once could agree, so they mend it afterwards:
whoever sees two takes the older one, moves the other's children there and deletes it, at a step's start and at its end.
The last step to end sees all, so one is left.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scop.errors import UserError, first_line, shown
from scop.system.cost import Spent, total
from scop.tracking.server import artifact_root, configure_mlflow, find_experiment
from scop.tracking.tags import COST_TAG, DEVICE_TAG, ENERGY, ERROR_TAG, KFP_TAG, PARENT_TAG, SECONDS

_PAGE = 1000
_OLDEST_FIRST = ["attributes.start_time ASC"]


def start_parent(experiment: str, run_name: str, tags: Mapping[str, str], resumed: bool = False) -> str:
    """Open the run under which a pipeline's steps are tracked, and return its id; `resumed`, the one of that name.

    Raises:
        UserError: MLflow cannot be reached or refuses access.
    """
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient()
        experiment_id = find_experiment(client, experiment, artifact_root())
        if resumed:
            earlier = client.search_runs(
                [experiment_id], f"tags.`scop.run` = '{tags['scop.run']}'", order_by=_OLDEST_FIRST
            )
            for run in earlier:
                if PARENT_TAG not in run.data.tags:
                    _begin_again(client, experiment_id, run)
                    return str(run.info.run_id)
        return str(client.create_run(experiment_id, run_name=run_name, tags=dict(tags)).info.run_id)
    except Exception as error:
        raise UserError(
            f"MLflow at {shown(os.environ.get('MLFLOW_TRACKING_URI', ''))} cannot be used ({first_line(error)}); "
            "check MLFLOW_TRACKING_URI and its credentials, or unset it for a local database"
        ) from error


def _begin_again(client: Any, experiment_id: str, parent: Any) -> None:
    """What an earlier try left undone, since it was killed, is closed; its error holds no more."""
    _close_children(client, experiment_id, parent.info.run_id)
    if ERROR_TAG in parent.data.tags:
        client.delete_tag(parent.info.run_id, ERROR_TAG)
    client.update_run(parent.info.run_id, status="RUNNING")


def end_parent(
    run_id: str,
    succeeded: bool,
    metrics: Mapping[str, float],
    files: list[Path],
    error: str | None = None,
    alone: bool = False,
) -> None:
    """Close a pipeline's run; a server that fails now is only reported.

    Args:
        run_id: MLflow's id.
        succeeded: whether all steps did.
        metrics: headline figures.
        files: to keep with it.
        error: why it failed, where no step has said so.
        alone: whether no step can be at work any more. Those that have not closed their runs were killed; where all
            succeeded, they could not reach MLflow.
    """
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient()
        parent = client.get_run(run_id)
        if alone:
            _close_children(client, parent.info.experiment_id, run_id, "FINISHED" if succeeded else "KILLED")
        log_cost(client, parent.info.experiment_id, run_id)
        for key, value in metrics.items():
            client.log_metric(run_id, key, value)
        if succeeded and ERROR_TAG in parent.data.tags:
            client.delete_tag(run_id, ERROR_TAG)  # of a try that was made good
        if error and ERROR_TAG not in parent.data.tags:
            client.set_tag(run_id, ERROR_TAG, error)
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")
        for path in files:  # last, since these have a store of their own, which may fail
            client.log_artifact(run_id, str(path))
    except Exception as error:
        print(f"tracking: the run could not be closed in MLflow ({first_line(error)})", flush=True)


def join_parent(client: Any, experiment_id: str, kfp_run: str, tags: Mapping[str, str], name: str) -> str:
    """The run of a KFP run, found or created, for a step of this name that begins.

    It is running then, unless another step's last try has failed: some variants go on, but the run has failed.
    """
    found = _parents(client, experiment_id, kfp_run)
    if not found:
        client.create_run(experiment_id, run_name=kfp_run, tags={**tags, KFP_TAG: kfp_run})
        found = _parents(client, experiment_id, kfp_run)
    parent = _merged(client, experiment_id, found)
    if parent.info.status != "RUNNING":  # an earlier try failed
        tries = sorted(_children(client, experiment_id, parent.info.run_id), key=lambda run: run.info.start_time)
        last = {run.info.run_name: run.info.status for run in tries}
        if "FAILED" not in [status for other, status in last.items() if other != name]:
            client.update_run(parent.info.run_id, status="RUNNING")
    return str(parent.info.run_id)


def rejoin_parent(client: Any, experiment_id: str, kfp_run: str, child: str) -> str | None:
    """The run of a KFP run, with the child below it; for a step that ends. None where there is none any more."""
    found = _parents(client, experiment_id, kfp_run)
    if not found:
        return None
    parent: str = _merged(client, experiment_id, found).info.run_id
    if client.get_run(child).data.tags.get(PARENT_TAG) != parent:
        client.set_tag(child, PARENT_TAG, parent)
    return parent


def close_parent(experiment: str, kfp_run: str, succeeded: bool, error: str | None = None) -> str | None:
    """Close the run of a KFP run that ended without a step to say so, and its open children; None if there is none.

    A pod that is killed closes nothing: the command line, which learns of the end from KFP, does.
    """
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    client, status = MlflowClient(), "FINISHED" if succeeded else "FAILED"
    known = client.get_experiment_by_name(experiment)
    if known is None or not (found := _parents(client, known.experiment_id, kfp_run)):
        return None
    parent = _merged(client, known.experiment_id, found)
    _close_children(client, known.experiment_id, parent.info.run_id)
    log_cost(client, known.experiment_id, parent.info.run_id)
    if error:
        client.set_tag(parent.info.run_id, ERROR_TAG, error)
    if parent.info.status != status:
        client.set_terminated(parent.info.run_id, status)
    return str(parent.info.run_id)


def _parents(client: Any, experiment_id: str, kfp_run: str) -> list[Any]:
    """The runs that stand for a KFP run, the oldest first: one, but for moments."""
    found = client.search_runs([experiment_id], f"tags.`{KFP_TAG}` = '{kfp_run}'")
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def _children(client: Any, experiment_id: str, parent: str) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_runs(
            [experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'", max_results=_PAGE, page_token=token
        )
        found += page
        if not (token := page.token):
            return found


def _close_children(client: Any, experiment_id: str, parent: str, status: str = "KILLED") -> None:
    """Close the runs of steps that have not done so themselves."""
    for child in _children(client, experiment_id, parent):
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, status)


def log_cost(client: Any, experiment_id: str, parent: str) -> None:
    """The sums of what the steps cost, each try of them; what killed ones cost is not known."""
    children = _children(client, experiment_id, parent)
    spent = [
        Spent(
            run.info.run_name,
            run.data.tags.get(DEVICE_TAG, ""),
            run.data.metrics["device_seconds"],
            run.data.metrics.get("energy_joules"),
        )
        for run in children
        if "device_seconds" in run.data.metrics
    ]
    if not spent:
        return
    killed = any(run.info.status == "KILLED" and "device_seconds" not in run.data.metrics for run in children)
    sums = [replace(entry, at_least=killed) for entry in total(spent, "1 run")]
    client.set_tag(parent, COST_TAG, json.dumps([asdict(entry) for entry in sums]))
    client.log_metric(parent, SECONDS, sum(entry.seconds for entry in sums))
    if told := [entry.joules for entry in sums if entry.joules is not None]:
        client.log_metric(parent, ENERGY, sum(told))


def _merged(client: Any, experiment_id: str, found: list[Any]) -> Any:
    """The oldest of several runs, with the others' children; the others are deleted."""
    from mlflow.exceptions import MlflowException

    oldest, *others = found
    for other in others:
        for child in _children(client, experiment_id, other.info.run_id):
            client.set_tag(child.info.run_id, PARENT_TAG, oldest.info.run_id)
        with contextlib.suppress(MlflowException):  # another step was quicker
            client.delete_run(other.info.run_id)
    return oldest
