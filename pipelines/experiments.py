"""What MLflow remembers: the measured networks of experiments, what failed, and what it cost."""

from __future__ import annotations

import difflib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.cost import Spent
from scop.errors import UserError
from scop.mlflow_server import configure_mlflow, first_line, shown
from scop.parents import DEVICE_TAG, ENERGY, PARENT_TAG, SECONDS
from scop.results import Result, Value

_SEARCH = "/api/2.0/mlflow/runs/search"
_PAGE = 1000  # runs; memory is bounded by it, for of each only a row is kept
_PARTS = 4  # of the time that is looked at, read side by side: MLflow's server has four workers by default
_OLDEST_FIRST = "attributes.start_time ASC"
_IS_A_RESULT = "tags.`scop.step` = 'evaluate' and attributes.status = 'FINISHED'"
_HAS_FAILED = "tags.`scop.step` != '' and attributes.status = 'FAILED'"
_HAS_COST = f"metrics.`{SECONDS}` >= 0"


@dataclass(frozen=True)
class Failure:
    """A step that failed, and that no later try made good.

    Attributes:
        name: of the step's run in MLflow, such as ``scop-0.45 finetune``.
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

    Raises:
        UserError: there is none.
    """

    def __init__(self, root: str) -> None:
        own = Path(root) / "mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (f"sqlite:///{own.absolute()}" if own.is_file() else None)
        if uri is None:
            raise UserError(
                f"there is nothing to compare: MLFLOW_TRACKING_URI is not set, and {root} has no runs; set it, or name "
                "another folder by --runs"
            )
        self._uri, self._shown = uri, shown(uri)
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
        try:
            ids = self._ids(names)
            latest: dict[tuple[str, str], Result] = {}
            parents: set[str] = set()
            for parent, result in self._results(ids, f"{_IS_A_RESULT} and {where}" if where else _IS_A_RESULT):
                latest.setdefault((parent, result.name), result)
                parents.add(parent)
            costs = [run for run in self._search(ids, _HAS_COST) if not where or run.id in parents]
            return Memory(list(latest.values()), list(self._failures(ids)), _spent(costs))
        except UserError:
            raise
        except Exception as error:  # whatever a server or a network can do
            raise self._explained(error, where) from error

    def details(self, result: Result) -> dict[str, Any] | None:
        """What was measured of a result, with the scores of its run's knockoff phase; None where it is gone."""
        assert result.run is not None
        evaluation = self._fetched(result.run, "evaluation.json")
        if evaluation is None:
            return None
        own = self.client.get_run(result.run)
        parent, experiment = own.data.tags.get(PARENT_TAG), own.info.experiment_id
        same = f"tags.`{PARENT_TAG}` = '{parent}' and tags.`scop.step` = 'train_knockoff'"
        scoring = self._first([experiment], f"{same} and attributes.status = 'FINISHED'") if parent else None
        scores = self._fetched(scoring.id, "scores.json") if scoring else None
        return evaluation | {"scores": {layer: entry["score"] for layer, entry in (scores or {}).items()}}

    def _fetched(self, run: str, file: str) -> dict[str, Any] | None:
        """A run's file of JSON, or None: it was deleted, or lies where only the cluster gets at."""
        with tempfile.TemporaryDirectory(prefix="scop-") as folder:
            try:
                path = self.client.download_artifacts(run, file, folder)
                content: dict[str, Any] = json.loads(Path(path).read_text())
            except Exception:  # whatever a store can do; the page does without
                return None
        return content

    def _ids(self, names: Sequence[str]) -> list[str]:
        known = {e.name: e.experiment_id for e in self.client.search_experiments()}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}"
                raise UserError(f"{name!r} is no run, and no experiment of MLflow at {self._shown} ({hint})")
        return [known[name] for name in names or known]

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
        page = self._page_as_json if self._uri.startswith("http") else self._page
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
        credentials = get_default_host_creds(self._uri)  # type: ignore[no-untyped-call]
        answer = http_request_safe(credentials, _SEARCH, "POST", json=asked).json()  # type: ignore[no-untyped-call]
        runs = []
        for run in answer.get("runs", []):
            info, lists = run["info"], run.get("data", {})
            data = {kind: {e["key"]: e["value"] for e in lists.get(kind, [])} for kind in ("params", "metrics", "tags")}
            name = info.get("run_name", "")
            runs.append(_Run(info["run_id"], name, info["status"], int(info.get("start_time", 0)), *_read(data)))
        return runs, answer.get("next_page_token")

    def _failures(self, ids: list[str]) -> Iterator[Failure]:
        """Those of each pipeline run's steps whose last try failed; a later one is of the same name and parent."""
        seen = set()
        for run in self._search(ids, _HAS_FAILED):
            parent, name = run.tags.get(PARENT_TAG), run.name
            if (parent, name) in seen:
                continue
            seen.add((parent, name))
            same = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.run_name = '{name}'"
            tries = self._search(ids, same) if parent else iter([run])
            if max(tries, key=lambda one: one.started).status == "FAILED":
                yield Failure(name, run.id, run.tags.get("scop.error", "it did not say why"))

    def _explained(self, error: Exception, where: str | None) -> UserError:
        code, message = str(getattr(error, "error_code", "")), first_line(error)
        if code == "INVALID_PARAMETER_VALUE" and where:
            return UserError(
                f"--where {where!r} is not in MLflow's filter language ({message}); such as: params.method = 'scop' "
                "and metrics.top1_drop < 0.01"
            )
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in message or "code 403" in message:
            return UserError(
                f"MLflow at {self._shown} refuses access ({message}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return UserError(f"MLflow at {self._shown} cannot be read ({message}); check MLFLOW_TRACKING_URI")


def _read(data: Mapping[str, Any]) -> tuple[Mapping[str, str], Mapping[str, float], Mapping[str, str]]:
    # In JSON what is no number is a word: NaN, Infinity.
    return data["params"], {key: float(value) for key, value in data["metrics"].items()}, data["tags"]


def _result(run: _Run) -> Result:
    tags = run.tags
    return Result(
        name=tags.get("scop.variant", run.name),
        params={key: _typed(value) for key, value in run.params.items() if "." not in key},
        metrics={k: v for k, v in run.metrics.items() if math.isfinite(v) and not k.startswith("system/")},
        dataset=tags.get("scop.dataset", ""),
        device=tags.get(DEVICE_TAG, ""),
        run=run.id,
        place=tags.get("scop.place"),
    )


def _typed(text: str) -> Value:
    """MLflow keeps parameters as text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _spent(parents: Sequence[_Run]) -> list[Spent]:
    by_device: dict[str, list[Mapping[str, float]]] = {}
    for run in parents:
        by_device.setdefault(run.tags.get(DEVICE_TAG, "an unknown device"), []).append(run.metrics)
    return [
        Spent(
            f"{len(costs)} run{'s' * (len(costs) != 1)}",
            device,
            sum(cost[SECONDS] for cost in costs),
            sum(cost.get(ENERGY, 0.0) for cost in costs) if any(ENERGY in cost for cost in costs) else None,
        )
        for device, costs in by_device.items()
    ]
