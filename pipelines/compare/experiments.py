"""What MLflow remembers: the measured networks of experiments, what failed, and what it cost."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.errors import UserError, first_line, shown
from scop.report.results import Result, Value
from scop.system.cost import Spent, total
from scop.tracking.server import configure_mlflow
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

_SEARCH = "/api/2.0/mlflow/runs/search"
_PAGE = 1000  # runs; memory is bounded by it, for of each only a row is kept
_PARTS = 4  # of the time that is looked at, read side by side: MLflow's server has four workers by default
_OLDEST_FIRST = "attributes.start_time ASC"
_IS_A_RESULT = "tags.`scop.step` = 'evaluate' and attributes.status = 'FINISHED'"
_HAS_NOT_FINISHED = "attributes.status != 'FINISHED'"
_OURS = {"scop.step", "scop.run", KFP_TAG}
"""Tags of which a step's run or a pipeline's has one."""
_FAILED = ("FAILED", "KILLED")
_UNTOLD = {"FAILED": "it did not say why", "KILLED": "it was killed"}
_HAS_COST = f"tags.`{COST_TAG}` != ''"
_PATIENCE = "60"
"""Seconds for an answer: a server that shares a machine takes some for a thousand runs."""
_SILENCE = 8.0
"""Seconds, after which it is said what is waited for."""
_NAMES_SHOWN = 10
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")
_SPOKEN_OF = re.compile(r"\b(param|metric)(?:eter)?s?\.[`\"]?(\w+)")


@dataclass(frozen=True)
class Failure:
    """A step that failed, and that no later try made good, or a pipeline's run that failed without one.

    Attributes:
        name: of its run in MLflow, such as ``scop-0.45 finetune``.
        run: its id.
        error: what it said.
    """

    name: str
    run: str
    error: str


@dataclass(frozen=True)
class Memory:
    """What is known of some experiments.

    Attributes:
        results: of the networks that were measured, the newest first; of several tries the last one.
        failures: of steps.
        spent: by device.
    """

    results: list[Result]
    failures: list[Failure]
    spent: list[Spent]


@dataclass(frozen=True)
class _Run:
    """What is read of a run of MLflow's."""

    id: str
    name: str
    status: str
    started: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


class Mlflow:
    """An MLflow server or database, read only.

    Args:
        root: where the database of local runs is, for where MLFLOW_TRACKING_URI names none.
        purpose: what there would be nothing to do, without one.

    Raises:
        UserError: there is none, or MLFLOW_TRACKING_URI is of no kind that keeps runs.
    """

    def __init__(self, root: str, purpose: str = "compare") -> None:
        own = Path(root) / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (f"sqlite:///{own.absolute()}" if own.is_file() else None)
        if uri is None:
            raise UserError(
                f"there is nothing to {purpose}: MLFLOW_TRACKING_URI is not set, and {root} has no runs; set it, or "
                "name another folder by --runs"
            )
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise UserError(f"there is no database at MLFLOW_TRACKING_URI {uri}; it would be made empty")
        scheme = uri.partition("://")[0].partition("+")[0]
        if scheme not in _SCHEMES:
            raise UserError(
                f"MLFLOW_TRACKING_URI {shown(uri)!r} is no server or database; such as http://HOST:5000 or "
                "sqlite:///runs/mlflow.db (MLflow keeps no runs in plain folders any more)"
            )
        self.uri, self._shown = uri, shown(uri)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _PATIENCE)
        configure_mlflow()
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(uri)

    def read(self, names: Sequence[str], where: str | None = None) -> Memory:
        """What is known of experiments, of all by default.

        Args:
            names: of the experiments.
            where: in MLflow's filter language; what it says holds for the runs of step evaluate.

        Raises:
            UserError: MLflow cannot be reached, refuses, knows no such experiment, or cannot read `where`.
        """
        with self.asking(where):
            ids = self._ids(names)
            latest: dict[tuple[str, str], Result] = {}
            for parent, result in self._results(ids, _IS_A_RESULT):
                latest.setdefault((parent, result.name), result)
            if where:  # of the last tries: an earlier one, that it fits, counts no more
                fitting = {result.run for _, result in self._results(ids, f"{_IS_A_RESULT} and {where}")}
                if not fitting:
                    _check_names(where, list(latest.values()))
                latest = {key: result for key, result in latest.items() if result.run in fitting}
            parents = {parent for parent, _ in latest} if where else None
            costs = [run for run in self._search(ids, _HAS_COST) if parents is None or run.id in parents]
            return Memory(list(latest.values()), list(self._failures(ids, parents)), _spent(costs))

    @contextlib.contextmanager
    def asking(self, where: str | None = None) -> Iterator[None]:
        """Within, what a server or a network can do is a UserError of one line."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        waiting = threading.Timer(_SILENCE, self._say_that_it_waits)
        waiting.daemon = True
        waiting.start()
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:  # requests' errors are of OSError
            raise self._explained(error, where) from error
        finally:
            waiting.cancel()

    def _say_that_it_waits(self) -> None:
        print(f"scop: waiting for MLflow at {self._shown} ...", file=sys.stderr, flush=True)

    def details(self, result: Result) -> dict[str, Any]:
        """What was measured of a result, with the scores of its run's knockoff phase.

        Raises:
            UserError: MLflow cannot be reached, or it is gone: deleted, or where only the cluster gets at.
        """
        assert result.run is not None
        with self.asking():
            evaluation = self._fetched(result.run, "evaluation.json")
            own = self.client.get_run(result.run)
            parent, experiment = own.data.tags.get(PARENT_TAG), own.info.experiment_id
            same = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`scop.step` = 'train_knockoff'"
            scoring = self._first([experiment], f"{same} and attributes.status = 'FINISHED'") if parent else None
            scores = self._fetched(scoring.id, "scores.json") if scoring else {}
        return evaluation | {"scores": {layer: entry["score"] for layer, entry in scores.items()}}

    def _fetched(self, run: str, file: str) -> dict[str, Any]:
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
            raise UserError(f"{name!r} is no run, and no experiment of MLflow at {self._shown} ({hint})")
        return [e.experiment_id for e in found.values() if e is not None] or list(self._experiments().values())

    def _experiments(self) -> dict[str, str]:
        """Ids by name, of all."""
        known: dict[str, str] = {}
        token: str | None = ""
        while token is not None:
            page = self.client.search_experiments(page_token=token or None)
            known |= {experiment.name: experiment.experiment_id for experiment in page}
            token = page.token or None
        return known

    def _results(self, ids: list[str], where: str) -> list[tuple[str, Result]]:
        """Parents and what was measured below them, the newest first.

        The server takes most of the time, so that it is asked for several stretches of time at once.
        """
        newest, oldest = self._first(ids, where), self._first(ids, where, _OLDEST_FIRST)
        if newest is None or oldest is None:
            return []
        length = (newest.started - oldest.started) // _PARTS + 1
        ends = [newest.started + 1 - part * length for part in range(_PARTS)]

        def stretch(end: int) -> list[tuple[str, Result]]:
            inside = f"attributes.start_time >= {end - length} and attributes.start_time < {end}"
            return [
                (run.tags.get(PARENT_TAG, run.id), _result(run)) for run in self._search(ids, f"{where} and {inside}")
            ]

        with ThreadPoolExecutor(_PARTS) as pool:
            return [one for part in pool.map(stretch, ends) for one in part]

    def _first(self, ids: list[str], where: str, order: str | None = None) -> _Run | None:
        return next(self._search(ids, where, order, 1), None)

    def _search(self, ids: list[str], where: str, order: str | None = None, size: int = _PAGE) -> Iterator[_Run]:
        """Runs, the newest first, in pages."""
        page: Callable[..., tuple[list[_Run], str | None]]
        page = self._page_as_json if self.uri.startswith("http") else self._page
        token: str | None = ""
        while ids and token is not None:
            runs, token = page(ids, where, order, size, token)
            yield from runs

    def _page(
        self, ids: list[str], where: str, order: str | None, size: int, token: str
    ) -> tuple[list[_Run], str | None]:
        found = self.client.search_runs(
            ids, where, order_by=[order] if order else None, max_results=size, page_token=token or None
        )
        runs = [
            _Run(r.info.run_id, r.info.run_name, r.info.status, r.info.start_time, *_read(r.data.to_dictionary()))
            for r in found
        ]
        return runs, found.token or None

    def _page_as_json(
        self, ids: list[str], where: str, order: str | None, size: int, token: str
    ) -> tuple[list[_Run], str | None]:
        """The same from the server's own answer.

        MLflow's client makes a message and then an object of every entry: half as long again as the server takes.
        """
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request_safe

        asked: dict[str, Any] = {"experiment_ids": ids, "filter": where, "max_results": size}
        asked |= ({"order_by": [order]} if order else {}) | ({"page_token": token} if token else {})
        credentials = get_default_host_creds(self.uri)  # type: ignore[no-untyped-call]
        answer = http_request_safe(credentials, _SEARCH, "POST", json=asked).json()  # type: ignore[no-untyped-call]
        runs = []
        for run in answer.get("runs", []):
            info, lists = run["info"], run.get("data", {})
            data = {kind: {e["key"]: e["value"] for e in lists.get(kind, [])} for kind in ("params", "metrics", "tags")}
            name = info.get("run_name", "")
            runs.append(_Run(info["run_id"], name, info["status"], int(info.get("start_time", 0)), *_read(data)))
        return runs, answer.get("next_page_token")

    def _failures(self, ids: list[str], of: Container[str] | None) -> Iterator[Failure]:
        """Of each pipeline run, or of those only, the steps whose last try failed; itself, if it failed without one."""
        unfinished = self._search(ids, _HAS_NOT_FINISHED)
        failed = {run.id: run for run in unfinished if run.status in _FAILED and _OURS & run.tags.keys()}
        # A step by itself has no steps below it, just as a pipeline's run that failed by itself.
        parents = dict.fromkeys(run.tags.get(PARENT_TAG, run.id) for run in failed.values())

        def last_tries(parent: str) -> list[_Run]:
            tries = self._search(ids, f"tags.`{PARENT_TAG}` = '{parent}'")
            last = {run.name: run for run in sorted(tries, key=lambda run: run.started)}.values()
            itself = [failed[parent]] if parent in failed else []
            return [run for run in last if run.status in _FAILED] or itself

        asked = [parent for parent in parents if of is None or parent in of]
        with ThreadPoolExecutor(_PARTS) as pool:
            ended = dict(zip(asked, pool.map(last_tries, asked), strict=True))
        for parent, runs in ended.items():
            # A killed step could not say why; if no other one failed, what the whole run says is of it.
            all_killed = parent in failed and all(run.status == "KILLED" for run in runs)
            told = failed[parent].tags.get(ERROR_TAG) if all_killed else None
            for run in runs:
                yield Failure(run.name, run.id, run.tags.get(ERROR_TAG) or told or _UNTOLD[run.status])

    def _explained(self, error: Exception, where: str | None) -> UserError:
        code, message = str(getattr(error, "error_code", "")), first_line(error)
        if code == "INVALID_PARAMETER_VALUE" and where:
            return UserError(
                f"--where {where!r} is not in MLflow's filter language ({message}); such as: params.method = 'scop' "
                "and metrics.top1_drop < 0.01; parameters are text, to be compared by = and != with quoted values"
            )
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in message or "code 403" in message:
            return UserError(
                f"MLflow at {self._shown} refuses access ({message}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        remedy = "check MLFLOW_TRACKING_URI"
        if message == "no answer in time":
            remedy += f", or set MLFLOW_HTTP_REQUEST_TIMEOUT above {os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT']} seconds"
        return UserError(f"MLflow at {self._shown} cannot be read ({message}); {remedy}")


def _check_names(where: str, results: Sequence[Result]) -> None:
    """Raise UserError where a filter that nothing fits speaks of what no result has."""
    known = {"param": {k for r in results for k in r.params}, "metric": {k for r in results for k in r.metrics}}
    for kind, name in _SPOKEN_OF.findall(where):
        if results and name not in known[kind]:
            near = difflib.get_close_matches(name, known[kind], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they have {', '.join(sorted(known[kind]))}"
            raise UserError(f"--where {where!r}: no result has a {kind} {name!r} ({hint})")


def _read(data: Mapping[str, Any]) -> tuple[Mapping[str, str], Mapping[str, float], Mapping[str, str]]:
    # In JSON what is no number is a word: NaN, Infinity.
    return data["params"], {key: float(value) for key, value in data["metrics"].items()}, data["tags"]


def _result(run: _Run) -> Result:
    tags = run.tags
    return Result(
        name=tags.get("scop.variant", run.name),
        params={key: _typed(value) for key, value in run.params.items() if "." not in key},
        metrics={k: v for k, v in run.metrics.items() if math.isfinite(v) and not k.startswith("system/")},
        dataset=tags.get(DATASET_TAG, ""),
        device=tags.get(MEASURED_TAG) or tags.get(DEVICE_TAG, ""),
        run=run.id,
        place=tags.get("scop.place"),
        right=tags.get(RIGHT_TAG),
    )


def _typed(text: str) -> Value:
    """MLflow keeps parameters as text; a number is one that JSON has."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and math.isfinite(value) else text


def _spent(parents: Sequence[_Run]) -> list[Spent]:
    entries = [Spent(**entry) for run in parents for entry in json.loads(run.tags[COST_TAG])]
    return total(entries, f"{len(parents)} run{'s' * (len(parents) != 1)}")
