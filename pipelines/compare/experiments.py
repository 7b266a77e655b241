"""The results, failures and costs of experiments, read from MLflow."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
import sys
import tempfile
import threading
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scop.errors import UserError, first_line, redact
from scop.report.results import Result, Value
from scop.system.cost import Spent, total
from scop.tracking.server import make_client
from scop.tracking.tags import (
    COST_TAG,
    DATASET_TAG,
    DEVICE_TAG,
    ERROR_TAG,
    KFP_TAG,
    MEASURED_TAG,
    PARENT_TAG,
    RIGHT_TAG,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

_PAGE = 1000
"""Runs per request."""
_PARALLEL = 4
"""Requests at a time: MLflow's server has four workers by default."""
_OLDEST_FIRST = "attributes.start_time ASC"
_IS_A_RESULT = "tags.`scop.step` = 'evaluate' and attributes.status = 'FINISHED'"
_HAS_NOT_FINISHED = "attributes.status != 'FINISHED'"
_OURS = {"scop.step", "scop.run", KFP_TAG}
"""Each run of a step or of a pipeline has one of these tags."""
_FAILED = ("FAILED", "KILLED")
_NO_REASON = {"FAILED": "no reason was recorded", "KILLED": "it was killed"}
_HAS_COST = f"tags.`{COST_TAG}` != ''"
_TIMEOUT = 60
"""Timeout of a request in seconds; a busy server takes several for a thousand runs."""
_SILENT_SECONDS = 8.0
"""Seconds after which a message says that MLflow is being waited for."""
_NAMES_SHOWN = 10
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")
_MENTIONED = re.compile(r"\b(param|metric)(?:eter)?s?\.[`\"]?(\w+)")


@dataclass(frozen=True)
class Failure:
    """A step that failed without a later success, or a pipeline run that failed without a failed step.

    Attributes:
        name: name of its MLflow run, such as ``scop-0.45 finetune``.
        run: ID of the run.
        error: the reason.
    """

    name: str
    run: str
    error: str


@dataclass(frozen=True)
class Memory:
    """Results, failures and costs of experiments, read from MLflow.

    Attributes:
        results: measured networks, newest first; the last of several attempts.
        failures: steps that failed.
        spent: cost, by device.
    """

    results: list[Result]
    failures: list[Failure]
    spent: list[Spent]


@dataclass(frozen=True)
class Source:
    """Location of the results.

    Attributes:
        runs: folder or URI of the runs.
        tracking_uri: MLflow's URI, if the user has set one; by default the database beside the runs.
    """

    runs: str
    tracking_uri: str | None = None


class Mlflow:
    """An MLflow server or database, for reading.

    Args:
        source: location of the server or database.
        purpose: the action that needs it, for the message.

    Raises:
        UserError: there is none, or the tracking URI is of a kind that stores no runs.
    """

    def __init__(self, source: Source, purpose: str = "compare") -> None:
        own = Path(source.runs) / "mlflow.db"
        uri = source.tracking_uri or (f"sqlite:///{own.absolute()}" if own.is_file() else None)
        if uri is None:
            raise UserError(
                f"there is nothing to {purpose}: MLFLOW_TRACKING_URI is not set, and {source.runs} has no runs; "
                "set it, or set another folder with --runs"
            )
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise UserError(f"there is no database at MLFLOW_TRACKING_URI {uri}; opening it would create an empty one")
        scheme = uri.partition("://")[0].partition("+")[0]
        if scheme not in _SCHEMES:
            raise UserError(
                f"MLFLOW_TRACKING_URI {redact(uri)!r} is neither a server nor a database, such as http://HOST:5000 or "
                "sqlite:///runs/mlflow.db (MLflow no longer stores runs in plain folders)"
            )
        self.uri, self._shown = uri, redact(uri)
        self.client = make_client(uri, timeout=_TIMEOUT)

    def read(self, names: Sequence[str], where: str | None = None) -> Memory:
        """Read experiments, all by default.

        Args:
            names: of the experiments.
            where: a condition on runs of step evaluate, in MLflow's filter language.

        Raises:
            UserError: MLflow cannot be reached or refuses, there is no such experiment, or `where` is invalid.
        """
        with self.asking(where):
            ids = self._ids(names)
            latest: dict[tuple[str, str], Result] = {}
            for parent, result in self._results(ids, _IS_A_RESULT):
                latest.setdefault((parent, result.name), result)
            if where:  # among last attempts: an earlier attempt that matches no longer counts
                fitting = {result.run for _, result in self._results(ids, f"{_IS_A_RESULT} and {where}")}
                if not fitting:
                    _check_names(where, list(latest.values()))
                latest = {key: result for key, result in latest.items() if result.run in fitting}
            parents = {parent for parent, _ in latest} if where else None
            costs = [run for run in self._search(ids, _HAS_COST) if parents is None or run.info.run_id in parents]
            return Memory(list(latest.values()), list(self._failures(ids, parents)), _spent(costs))

    @contextlib.contextmanager
    def asking(self, where: str | None = None) -> Iterator[None]:
        """Turn errors of the server or the network into a UserError of one line."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        waiting = threading.Timer(_SILENT_SECONDS, self._report_waiting)
        waiting.daemon = True
        waiting.start()
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:  # errors of requests are OSErrors
            raise self._explain(error, where) from error
        finally:
            waiting.cancel()

    def _report_waiting(self) -> None:
        print(f"scop: waiting for MLflow at {self._shown} ...", file=sys.stderr, flush=True)

    def details(self, result: Result) -> dict[str, Any]:
        """Return a result's evaluation, with the scores of its run's knockoff phase.

        Raises:
            UserError: MLflow cannot be reached, or the artifact was deleted or is accessible to the cluster only.
        """
        assert result.run is not None
        with self.asking():
            evaluation = self._download(result.run, "evaluation.json")
            own = self.client.get_run(result.run)
            parent, experiment = own.data.tags.get(PARENT_TAG), own.info.experiment_id
            same = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`scop.step` = 'train_knockoff'"
            scoring = self._first([experiment], f"{same} and attributes.status = 'FINISHED'") if parent else None
            scores = self._download(scoring.info.run_id, "scores.json") if scoring else {}
        return evaluation | {"scores": {layer: entry["score"] for layer, entry in scores.items()}}

    def _download(self, run: str, file: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="scop-") as folder:
            content: dict[str, Any] = json.loads(Path(self.client.download_artifacts(run, file, folder)).read_text())
        return content

    def _ids(self, names: Sequence[str]) -> list[str]:
        found = {name: self.client.get_experiment_by_name(name) for name in names}
        for name in (name for name, experiment in found.items() if experiment is None):
            known = list(self._experiments())
            near = difflib.get_close_matches(name, known, n=1)
            some = ", ".join(known[:_NAMES_SHOWN]) + ", ..." * (len(known) > _NAMES_SHOWN)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {some or 'none'}"
            raise UserError(f"{name!r} is neither a run nor an experiment of MLflow at {self._shown} ({hint})")
        return [e.experiment_id for e in found.values() if e is not None] or list(self._experiments().values())

    def _experiments(self) -> dict[str, str]:
        """Return the ids of all experiments by name."""
        known: dict[str, str] = {}
        token: str | None = ""
        while token is not None:
            page = self.client.search_experiments(page_token=token or None)
            known |= {experiment.name: experiment.experiment_id for experiment in page}
            token = page.token or None
        return known

    def _results(self, ids: list[str], where: str) -> list[tuple[str, Result]]:
        """Return results with the ids of their parents, the newest first.

        The server takes most of the time, so several intervals of start times are requested in parallel.
        """
        newest, oldest = self._first(ids, where), self._first(ids, where, _OLDEST_FIRST)
        if newest is None or oldest is None:
            return []
        length = (newest.info.start_time - oldest.info.start_time) // _PARALLEL + 1
        ends = [newest.info.start_time + 1 - part * length for part in range(_PARALLEL)]

        def interval(end: int) -> list[tuple[str, Result]]:
            inside = f"attributes.start_time >= {end - length} and attributes.start_time < {end}"
            return [
                (run.data.tags.get(PARENT_TAG, run.info.run_id), _result(run))
                for run in self._search(ids, f"{where} and {inside}")
            ]

        with ThreadPoolExecutor(_PARALLEL) as pool:
            return [one for part in pool.map(interval, ends) for one in part]

    def _first(self, ids: list[str], where: str, order: str | None = None) -> Run | None:
        return next(self._search(ids, where, order, 1), None)

    def _search(self, ids: list[str], where: str, order: str | None = None, size: int = _PAGE) -> Iterator[Run]:
        """Yield runs, the newest first, page by page."""
        by = [order] if order else None
        token: str | None = ""
        while ids and token is not None:
            page = self.client.search_runs(ids, where, order_by=by, max_results=size, page_token=token or None)
            yield from page
            token = page.token or None

    def _failures(self, ids: list[str], of: Container[str] | None) -> Iterator[Failure]:
        """Yield the steps whose last attempt failed, or the pipeline run itself if it failed without one.

        Args:
            ids: of the experiments.
            of: ids of pipeline runs; all by default.
        """
        unfinished = self._search(ids, _HAS_NOT_FINISHED)
        failed = {
            run.info.run_id: run for run in unfinished if run.info.status in _FAILED and _OURS & run.data.tags.keys()
        }
        # A step that was run alone has no children, like a pipeline run that failed without a failed step.
        parents = dict.fromkeys(run.data.tags.get(PARENT_TAG, run_id) for run_id, run in failed.items())

        def last_attempts(parent: str) -> list[Run]:
            attempts = self._search(ids, f"tags.`{PARENT_TAG}` = '{parent}'")
            last = {run.info.run_name: run for run in sorted(attempts, key=lambda run: run.info.start_time)}.values()
            itself = [failed[parent]] if parent in failed else []
            return [run for run in last if run.info.status in _FAILED] or itself

        asked = [parent for parent in parents if of is None or parent in of]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            ended = dict(zip(asked, pool.map(last_attempts, asked), strict=True))
        for parent, runs in ended.items():
            # A killed step records no reason; if no other step failed, the pipeline run's reason is about it.
            all_killed = parent in failed and all(run.info.status == "KILLED" for run in runs)
            reason = failed[parent].data.tags.get(ERROR_TAG) if all_killed else None
            for run in runs:
                error = run.data.tags.get(ERROR_TAG) or reason or _NO_REASON[run.info.status]
                yield Failure(run.info.run_name, run.info.run_id, error)

    def _explain(self, error: Exception, where: str | None) -> UserError:
        code, message = str(getattr(error, "error_code", "")), first_line(error)
        if code == "INVALID_PARAMETER_VALUE" and where:
            return UserError(
                f"--where {where!r} is not in MLflow's filter language ({message}); example: params.method = 'scop' "
                "and metrics.top1_drop < 0.01; parameters are text: compare them by = or != with a quoted value"
            )
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in message or "code 403" in message:
            return UserError(
                f"MLflow at {self._shown} refuses access ({message}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        remedy = "check MLFLOW_TRACKING_URI"
        if message == "no answer in time":
            from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

            seconds = TIMEOUT.get()  # type: ignore[no-untyped-call]
            remedy += f", or set {TIMEOUT.name} above {seconds} seconds"
        return UserError(f"MLflow at {self._shown} cannot be read ({message}); {remedy}")


def _check_names(where: str, results: Sequence[Result]) -> None:
    """Raise UserError if a filter without matches mentions something that no result has."""
    known = {"param": {k for r in results for k in r.params}, "metric": {k for r in results for k in r.metrics}}
    for kind, name in _MENTIONED.findall(where):
        if results and name not in known[kind]:
            near = difflib.get_close_matches(name, known[kind], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they have {', '.join(sorted(known[kind]))}"
            raise UserError(f"--where {where!r}: no result has a {kind} {name!r} ({hint})")


def _result(run: Run) -> Result:
    tags = run.data.tags
    return Result(
        name=tags.get("scop.variant", run.info.run_name),
        params={key: _typed(value) for key, value in run.data.params.items() if "." not in key},
        metrics={k: v for k, v in run.data.metrics.items() if math.isfinite(v) and not k.startswith("system/")},
        dataset=tags.get(DATASET_TAG, ""),
        device=tags.get(MEASURED_TAG) or tags.get(DEVICE_TAG, ""),
        run=run.info.run_id,
        uri=tags.get("scop.uri"),
        right=tags.get(RIGHT_TAG),
    )


def _typed(text: str) -> Value:
    """Convert a parameter, which MLflow stores as text, to a number if it is one in JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and math.isfinite(value) else text


def _spent(parents: Sequence[Run]) -> list[Spent]:
    entries = [Spent(**entry) for run in parents for entry in json.loads(run.data.tags[COST_TAG])]
    return total(entries, f"{len(parents)} run{'s' * (len(parents) != 1)}")
