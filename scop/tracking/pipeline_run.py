"""The MLflow run of a whole pipeline run, under which its steps are tracked.

On one machine, `scop run` opens and closes it. On a cluster, only the steps can: each step finds it by the ID of the
KFP run, or creates it. MLflow has no operation by which two steps could agree on one run, so duplicates are merged
later: a step that finds two, when it starts or ends, keeps the older one, moves the children of the other to it and
deletes the other. The last step to end finds all of them, so one remains.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scop.errors import UserError, first_line, redact
from scop.system.cost import Spent, total
from scop.tracking.server import find_or_create_experiment, make_client
from scop.tracking.tags import COST_TAG, DEVICE_TAG, ENERGY, ERROR_TAG, KFP_TAG, PARENT_TAG, SECONDS

logger = logging.getLogger(__name__)

_PAGE = 1000
_OLDEST_FIRST = ["attributes.start_time ASC"]


def start_parent(
    tracking_uri: str,
    experiment: str,
    run_name: str,
    tags: Mapping[str, str],
    artifact_root: str | None = None,
    resumed: bool = False,
) -> str:
    """Open the run under which a pipeline's steps are tracked, and return its ID.

    Args:
        tracking_uri: URI of MLflow.
        experiment: name of the experiment, created if it does not exist.
        run_name: name of the run.
        tags: tags of the run; ``scop.run`` identifies it.
        artifact_root: artifact root of a new experiment.
        resumed: whether to reopen the run with the same ``scop.run``, if there is one.

    Raises:
        UserError: MLflow cannot be reached or refuses access.
    """
    try:
        client = make_client(tracking_uri)
        experiment_id = find_or_create_experiment(client, experiment, artifact_root)
        if resumed:
            earlier = client.search_runs(
                [experiment_id], f"tags.`scop.run` = '{tags['scop.run']}'", order_by=_OLDEST_FIRST
            )
            for run in earlier:
                if PARENT_TAG not in run.data.tags:
                    _reopen(client, experiment_id, run)
                    return str(run.info.run_id)
        return str(client.create_run(experiment_id, run_name=run_name, tags=dict(tags)).info.run_id)
    except Exception as error:
        raise UserError(
            f"MLflow at {redact(tracking_uri)} cannot be used ({first_line(error)}); check MLFLOW_TRACKING_URI and its "
            "credentials, or unset it for a local database"
        ) from error


def _reopen(client: Any, experiment_id: str, parent: Any) -> None:
    """Close runs that an earlier, killed attempt left open, and remove its error."""
    _close_children(client, experiment_id, parent.info.run_id)
    if ERROR_TAG in parent.data.tags:
        client.delete_tag(parent.info.run_id, ERROR_TAG)
    client.update_run(parent.info.run_id, status="RUNNING")


def end_parent(
    client: Any,
    run_id: str,
    succeeded: bool,
    metrics: Mapping[str, float],
    files: list[Path],
    error: str | None = None,
    alone: bool = False,
) -> None:
    """Close a pipeline run; if the server fails, this is only logged.

    Args:
        client: an MLflow client.
        run_id: MLflow ID of the run.
        succeeded: whether all steps succeeded.
        metrics: headline metrics.
        files: files to store with the run.
        error: reason of the failure, unless a step has recorded one.
        alone: whether no step can still be running. Open runs of steps are then closed: these steps were killed or, if
            the pipeline succeeded, could not reach MLflow.
    """
    try:
        parent = client.get_run(run_id)
        if alone:
            _close_children(client, parent.info.experiment_id, run_id, "FINISHED" if succeeded else "KILLED")
        log_cost(client, parent.info.experiment_id, run_id)
        for key, value in metrics.items():
            client.log_metric(run_id, key, value)
        if succeeded and ERROR_TAG in parent.data.tags:
            client.delete_tag(run_id, ERROR_TAG)  # of an earlier attempt
        if error and ERROR_TAG not in parent.data.tags:
            client.set_tag(run_id, ERROR_TAG, error)
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")
        for path in files:  # last, since the artifact store may fail separately
            client.log_artifact(run_id, str(path))
    except Exception as failure:
        logger.warning("tracking: the run could not be closed in MLflow (%s)", first_line(failure))


def join_parent(client: Any, experiment_id: str, kfp_run: str, tags: Mapping[str, str], name: str) -> str:
    """Find or create the MLflow run of a KFP run when a step with this name starts; return its ID.

    Its status is then RUNNING, unless the last attempt of another step has failed: other variants continue, but the
    pipeline run has failed.
    """
    found = _parents(client, experiment_id, kfp_run)
    if not found:
        client.create_run(experiment_id, run_name=kfp_run, tags={**tags, KFP_TAG: kfp_run})
        found = _parents(client, experiment_id, kfp_run)
    parent = _merged(client, experiment_id, found)
    if parent.info.status != "RUNNING":  # an earlier attempt failed
        attempts = sorted(_children(client, experiment_id, parent.info.run_id), key=lambda run: run.info.start_time)
        last = {run.info.run_name: run.info.status for run in attempts}
        if "FAILED" not in [status for other, status in last.items() if other != name]:
            client.update_run(parent.info.run_id, status="RUNNING")
    return str(parent.info.run_id)


def rejoin_parent(client: Any, experiment_id: str, kfp_run: str, child: str) -> str | None:
    """Return the MLflow run of a KFP run when a step ends, and make the step's run its child; None if there is none."""
    found = _parents(client, experiment_id, kfp_run)
    if not found:
        return None
    parent: str = _merged(client, experiment_id, found).info.run_id
    if client.get_run(child).data.tags.get(PARENT_TAG) != parent:
        client.set_tag(child, PARENT_TAG, parent)
    return parent


def close_parent(
    tracking_uri: str, experiment: str, kfp_run: str, succeeded: bool, error: str | None = None
) -> str | None:
    """Close the MLflow run of a KFP run and its open children, after an end that no step could report.

    A killed pod closes nothing, so the command line, which gets the state from KFP, does. Returns None if there is no
    such run.
    """
    client, status = make_client(tracking_uri), "FINISHED" if succeeded else "FAILED"
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
    """Return the MLflow runs of a KFP run, oldest first; there is briefly more than one."""
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
    """Close the runs of steps that did not close them."""
    for child in _children(client, experiment_id, parent):
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, status)


def log_cost(client: Any, experiment_id: str, parent: str) -> None:
    """Log the total cost of all steps and attempts; the cost of killed ones is unknown."""
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
    if joules := [entry.joules for entry in sums if entry.joules is not None]:
        client.log_metric(parent, ENERGY, sum(joules))


def _merged(client: Any, experiment_id: str, found: list[Any]) -> Any:
    """Return the oldest of several runs, with the others' children; the others are deleted."""
    from mlflow.exceptions import MlflowException

    oldest, *others = found
    for other in others:
        for child in _children(client, experiment_id, other.info.run_id):
            client.set_tag(child.info.run_id, PARENT_TAG, oldest.info.run_id)
        with contextlib.suppress(MlflowException):  # another step was faster
            client.delete_run(other.info.run_id)
    return oldest
