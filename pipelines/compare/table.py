"""Comparison tables of results: sorted, optionally grouped over seeds and compared with a baseline.

Each data set has a table of its own, and each device a latency column of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from scop.errors import UserError
from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.results import SEEDS, Result

METRICS = ("pruned_top1", "top1_drop", "pruned_macs", "pruned_params")
"""Default columns, if measured. Latency and speed-up at the smallest batch size are added to them."""

_DENSE = "dense"
_MISSING = "-"
_RUN_SHOWN = 8  # first characters of an MLflow run ID; enough to distinguish runs
_ENDLESS = 10_000


@dataclass(frozen=True)
class Table:
    """The results on one data set.

    The frames have one row per result or group of results, the best first. Those of figures have one column per metric,
    or per metric and device; NaN is a missing value.

    Attributes:
        dataset: name of the data set.
        content: content hash of the data set.
        labels: what distinguishes the rows, by parameter.
        runs: MLflow run IDs of each row.
        mean: means over the results of a row.
        deviation: sample standard deviations; NaN for a single result.
        n: numbers of results.
        change: changes from the baseline: a difference for accuracies, a ratio for other metrics.
        metrics: column -> its metric.
        notes: remarks for the reader, printed above the table.
    """

    dataset: str
    content: str
    labels: pd.DataFrame
    runs: pd.Series[Any]
    mean: pd.DataFrame
    deviation: pd.DataFrame
    n: pd.DataFrame
    change: pd.DataFrame
    metrics: Mapping[str, Metric]
    notes: list[str] = field(default_factory=list)

    @property
    def grouped(self) -> bool:
        """Whether a row combines several results."""
        return bool((self.n > 1).any(axis=None))

    def best(self, column: str) -> float | None:
        """Return the best value of a column; None for fewer than two values or a metric without a better direction."""
        values, higher = self.mean[column].dropna(), self.metrics[column].higher_is_better
        if len(values) < 2 or higher is None:
            return None
        return float(values.max() if higher else values.min())

    def cells(self, column: str) -> list[str]:
        """Format a column: means with deviations, changes and, if they differ from the row's, n; "-" if missing."""
        metric, rows = self.metrics[column], self.n.max(axis=1)
        figures = zip(self.mean[column], self.deviation[column], self.n[column], self.change[column], rows, strict=True)
        return [_cell(metric, *figure) for figure in figures]


def _cell(metric: Metric, mean: float, deviation: float, n: int, change: float, row_n: int) -> str:
    if n == 0:
        return _MISSING
    text = metric.shown(mean)
    text += f" ± {metric.shown_deviation(deviation)}" if pd.notna(deviation) else ""
    text += f" ({metric.shown_change(change)})" if pd.notna(change) else ""
    return text if n == row_n else f"{text}, n {n}"


def tables(
    results: Sequence[Result],
    metrics: Sequence[str] = (),
    group_by: Sequence[str] = (),
    baseline: str | None = None,
) -> list[Table]:
    """Build one table per data set.

    Args:
        results: results to compare, in any number.
        metrics: columns, in sort order: rows are sorted by the first one, ties by the next.
        group_by: parameters. Results that agree in them and in the network form one row: mean, deviation, n.
        baseline: ``dense`` or the name of a variant; figures then include the change from it.

    Raises:
        UserError: no result has the metric, the parameter or the baseline.
    """
    known = sorted({key for result in results for key in result.metrics})
    for metric in metrics:
        _check("--metric", metric, known)
    metrics = list(metrics) or [key for key in (*METRICS, *smallest_batch(known)) if key in known] or known[:1]
    parameters = sorted({key for result in results for key in result.params} | {"name"})
    for key in group_by:
        _check("--group-by", key, parameters)
    if baseline not in (None, _DENSE):
        _check("--baseline", str(baseline), [_DENSE, *sorted({result.name for result in results})])
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.dataset, []).append(result)
    return [_Results(own).table(metrics, group_by, baseline) for own in by_dataset.values()]


def _check(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{option} {value!r} is not in these results ({hint})")


class _Results:
    """The results on one data set as frames with one row per result."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._content = results[0].dataset
        self._runs = pd.Series([result.run for result in results], dtype=object)
        self._devices = pd.Series([result.device for result in results], dtype=object)
        self._measured = pd.DataFrame([dict(result.metrics) for result in results], dtype=float)
        # Of type object, so that numbers and texts stay what they are.
        own = [{**result.params, "name": result.name, "run": _shown_run(result)} for result in results]
        self._params = pd.DataFrame(own, dtype=object).fillna(_MISSING)
        for key in ("network", "dataset"):
            if key not in self._params:
                self._params[key] = _MISSING

    def table(self, metrics: Sequence[str], group_by: Sequence[str], baseline: str | None) -> Table:
        """Return the table; the arguments are those of `tables`."""
        columns, values = self._columns(metrics)
        # Results of different networks are never grouped.
        keys = list(dict.fromkeys((*group_by, "network"))) if group_by else self._distinguishing(metrics)
        labels = self._params[keys]
        by = labels.groupby(keys, sort=False).ngroup() if group_by else labels.index.to_series()
        changes = self._changes(columns, values, baseline)
        mean = values.groupby(by).mean()
        ascending = [not metric.higher_is_better for metric in columns.values()]
        order = mean.sort_values(list(columns), ascending=ascending, kind="stable").index
        return Table(
            " / ".join(dict.fromkeys(map(str, self._params["dataset"]))),
            self._content,
            labels.groupby(by).first().loc[order],
            self._runs.groupby(by).agg(lambda runs: list(runs.dropna())).loc[order],
            mean.loc[order],
            values.groupby(by).std().loc[order],
            values.groupby(by).count().loc[order],
            changes.groupby(by).mean().loc[order],
            columns,
            [
                *self._notes(metrics),
                *self._mixed(by, labels),
                *([_no_changes(baseline)] if baseline and changes.isna().all(axis=None) else []),
            ],
        )

    def _columns(self, metrics: Sequence[str]) -> tuple[dict[str, Metric], pd.DataFrame]:
        """Return the metric and the values of each column."""
        devices = self._devices.unique()
        columns, values = {}, {}
        for metric in map(describe, metrics):
            measured = self._measured.get(metric.key, pd.Series(float("nan"), self._measured.index))
            if len(devices) > 1 and metric.of_device:
                for device in devices:
                    columns[f"{metric.key} on {device}"] = metric
                    values[f"{metric.key} on {device}"] = measured.where(self._devices == device)
            else:
                columns[metric.key], values[metric.key] = metric, measured
        return columns, pd.DataFrame(values)

    def _changes(self, columns: Mapping[str, Metric], values: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
        """Return the changes from each result's own dense network, or from the baseline's mean for the same network."""
        before = pd.DataFrame(float("nan"), values.index, values.columns)
        if baseline == _DENSE:
            for column, metric in columns.items():
                dense = metric.key.replace("pruned_", "dense_")
                if dense != metric.key and dense in self._measured:
                    before[column] = self._measured[dense]
        elif baseline is not None:
            networks = self._params["network"]
            same = self._params["name"] == baseline
            before = values[same].groupby(networks[same]).mean().reindex(networks).set_axis(values.index)
        return pd.DataFrame(
            {column: metric.change(values[column], before[column]) for column, metric in columns.items()}
        )

    def _distinguishing(self, metrics: Sequence[str]) -> list[str]:
        """Return the labels of single results: the name, parameters that differ, and the run if still ambiguous."""
        wanted = ["network", "method", "prune_rate", "residual", "round_to", "finetune_epochs", "finetune_lr", "seed"]
        if any(metric.endswith("train_seconds") for metric in metrics):
            wanted.append("trained_on")
        labels = ["name", *(key for key in wanted if key in self._params and self._params[key].nunique() > 1)]
        return [*labels, "run"] if self._params[labels].duplicated().any() else labels

    def _notes(self, metrics: Sequence[str]) -> list[str]:
        """Return where times were measured, and the dense network's metrics as far as all results agree in them."""
        devices = self._devices.unique()
        notes = ["times are listed per device" if len(devices) > 1 else f"times on {devices[0] or 'an unknown device'}"]
        if any(metric.endswith("train_seconds") for metric in metrics):
            trained_on = self._params.get("trained_on", pd.Series([_MISSING])).replace(_MISSING, "unknown")
            notes.append(f"trained on {', '.join(sorted(map(str, trained_on.unique())))}")
        figures = []
        for metric in map(describe, metrics):
            key = metric.key.replace("pruned_", "dense_")
            if key != metric.key and key in self._measured and not metric.of_device:
                values = self._measured[key]
                if values.nunique(dropna=False) == 1:
                    figures.append(f"{metric.title} {metric.shown(values.iloc[0])}")
        return [*notes, f"dense: {', '.join(figures)}"] if figures else notes

    def _mixed(self, by: pd.Series[int], labels: pd.DataFrame) -> list[str]:
        """Return a note on settings other than seeds that differ within a row; empty if there are none."""
        differs = self._params.groupby(by).nunique() > 1
        some = []
        for key in sorted(set(differs) - {*SEEDS, *labels, "recipe", "name", "run"}):
            if differs[key].any():
                values = self._params[key][by.map(differs[key])].unique()
                some.append(f"{key} ({', '.join(sorted(map(str, values)))})")
        if some:
            return [f"some rows combine results that differ in {', '.join(some)}"]
        recipes = "recipe" in differs and differs["recipe"].any()
        return ["some rows combine results of several recipes"] if recipes else []


def _shown_run(result: Result) -> str:
    return result.run[:_RUN_SHOWN] if result.run else result.uri or _MISSING


def _no_changes(baseline: str) -> str:
    return f"no changes shown: baseline {baseline} has no comparable result on this data set"


# -- as text -----------------------------------------------------------------------------------------------------------


def print_table(table: Table) -> None:
    """Print a table to the terminal, with the best value of each column in bold. Values are never truncated."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    view = RichTable(box=None, pad_edge=False, header_style="bold")
    for label in table.labels:
        view.add_column(Text(label), no_wrap=True)
    if table.grouped:
        view.add_column("n", justify="right")
    for column, metric in table.metrics.items():
        view.add_column(Text(column.replace(metric.key, metric.title)), justify="right", no_wrap=True)
    columns = [[Text(str(value)) for value in table.labels[label]] for label in table.labels]
    if table.grouped:
        columns.append([Text(str(n)) for n in table.n.max(axis=1)])
    for column in table.metrics:
        best = table.best(column)
        styles = ["bold" if mean == best else "" for mean in table.mean[column]]
        columns.append([Text(*cell) for cell in zip(table.cells(column), styles, strict=True)])
    for row in zip(*columns, strict=True):
        view.add_row(*row)
    # In a narrower terminal, lines wrap: rich would truncate the values.
    endless = Console(width=_ENDLESS)
    console = Console(width=max(Console().width, Measurement.get(endless, endless.options, view).maximum))
    print(f"{table.dataset or 'unknown data'} ({table.content[:12] or 'no hash'}); {'; '.join(table.notes)}")
    console.print(view)


def as_csv(found: Sequence[Table]) -> str:
    """Return all tables as one CSV text: raw values, one line per row."""
    grouped = any(table.grouped for table in found)
    changes = any(table.change.notna().any(axis=None) for table in found)
    frames = []
    for table in found:
        frame = table.labels.copy()
        frame.insert(0, "dataset", table.dataset)
        frame.insert(1, "dataset_content", table.content)
        for column in table.metrics:
            frame[column] = table.mean[column]
            if grouped:
                frame[f"{column} deviation"] = table.deviation[column]
                frame[f"{column} n"] = table.n[column].where(table.n[column] > 0).astype("Int64")
            if changes:
                frame[f"{column} change"] = table.change[column]
        frames.append(frame.assign(runs=table.runs.map(" ".join)))
    return str(pd.concat(frames).to_csv(index=False, lineterminator="\n"))


def as_json(found: Sequence[Table]) -> list[dict[str, Any]]:
    """Return the tables as JSON-compatible objects with raw values."""
    return [
        {
            "dataset": table.dataset,
            "dataset_content": table.content,
            "notes": table.notes,
            "rows": [
                {"labels": labels, "runs": runs, "figures": figures}
                for labels, runs, figures in zip(
                    table.labels.to_dict("records"), table.runs, _figures(table), strict=True
                )
            ],
        }
        for table in found
    ]


def _figures(table: Table) -> list[dict[str, dict[str, float | int | None]]]:
    """Return the figures of each row as JSON-compatible values; None replaces NaN."""
    parts = {"mean": table.mean, "deviation": table.deviation, "n": table.n, "change": table.change}
    rows: list[dict[str, dict[str, float | int | None]]] = [{} for _ in table.runs]
    for column in table.metrics:
        for row, values in zip(
            rows, zip(*(frame[column].tolist() for frame in parts.values()), strict=True), strict=True
        ):
            figure = dict(zip(parts, (None if pd.isna(value) else value for value in values), strict=True))
            if figure["n"]:
                row[column] = figure
    return rows
