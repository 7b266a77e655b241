"""Comparison tables of results: sorted, optionally grouped over seeds and compared with a baseline.

Each data set has a table of its own, and each device a latency column of its own.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from scop.errors import UserError
from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.results import SEEDS, Result, Value

METRICS = ("pruned_top1", "top1_drop", "pruned_macs", "pruned_params")
"""Default columns, if measured. Latency and speed-up at the smallest batch size are added to them."""

_DENSE = "dense"
_RUN_SHOWN = 8  # first characters of an MLflow run ID; enough to distinguish runs
_ENDLESS = 10_000
_ALWAYS = ("network",)  # results of different networks are never grouped


@dataclass(frozen=True)
class Figure:
    """A metric of one result or of a group of results.

    Attributes:
        mean: mean over the results.
        deviation: sample standard deviation; None for a single result.
        n: number of results.
        change: change from the baseline: a difference for accuracies, a ratio for other metrics; None without baseline.
    """

    mean: float
    deviation: float | None = None
    n: int = 1
    change: float | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table: a result or a group of results.

    Attributes:
        labels: column -> label.
        figures: column -> figure; a column without a value is missing.
        runs: MLflow run IDs.
    """

    labels: dict[str, Value]
    figures: dict[str, Figure]
    runs: list[str]

    @property
    def n(self) -> int:
        """Number of results in the row; a single figure may cover fewer."""
        return max((figure.n for figure in self.figures.values()), default=0)


@dataclass(frozen=True)
class Table:
    """The results on one data set.

    Attributes:
        dataset: name of the data set.
        content: content hash of the data set.
        labels, figures: names of the columns.
        rows: rows, best first.
        metrics: column in `figures` -> its metric.
        notes: remarks for the reader, printed above the table.
    """

    dataset: str
    content: str
    labels: list[str]
    figures: list[str]
    rows: list[Row]
    metrics: dict[str, Metric]
    notes: list[str] = field(default_factory=list)

    def best(self, column: str) -> float | None:
        """Return the best value of a column; None for fewer than two values or a metric without a better direction."""
        values = [row.figures[column].mean for row in self.rows if column in row.figures]
        higher = self.metrics[column].higher_is_better
        if len(values) < 2 or higher is None:
            return None
        return max(values) if higher else min(values)


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
    names = sorted({result.name for result in results})
    if baseline not in (None, _DENSE):
        _check("--baseline", str(baseline), [_DENSE, *names])
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.dataset, []).append(result)
    return [_table(content, own, metrics, group_by, baseline) for content, own in by_dataset.items()]


def _check(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{option} {value!r} is not in these results ({hint})")


def _table(
    content: str, results: Sequence[Result], metrics: Sequence[str], group_by: Sequence[str], baseline: str | None
) -> Table:
    devices = list(dict.fromkeys(result.device for result in results))
    columns: dict[str, tuple[Metric, str | None]] = {}  # with the only device whose results count; None: all
    for metric in map(describe, metrics):
        if len(devices) > 1 and metric.of_device:
            columns |= {f"{metric.key} on {device}": (metric, device) for device in devices}
        else:
            columns[metric.key] = (metric, None)
    labels = list(dict.fromkeys((*group_by, *_ALWAYS))) if group_by else _distinguishing_labels(results, metrics)
    groups: dict[tuple[Value, ...], list[Result]] = {}
    for number, result in enumerate(results):
        key = tuple(_label(result, label) for label in labels) if group_by else (number,)
        groups.setdefault(key, []).append(result)
    base = _baseline(results, baseline)
    rows = []
    for own in groups.values():
        figures = {}
        for column, (metric, device) in columns.items():
            measured = [r for r in own if metric.key in r.metrics and device in (None, r.device)]
            if measured:
                figures[column] = _figure(metric, measured, base)
        rows.append(Row({label: _label(own[0], label) for label in labels}, figures, [r.run for r in own if r.run]))
    rows.sort(key=lambda row: [_sort_key(row, column, metric) for column, (metric, _) in columns.items()])
    names = list(dict.fromkeys(str(result.params.get("dataset", "")) for result in results))
    notes = ["times are listed per device" if len(devices) > 1 else f"times on {devices[0] or 'an unknown device'}"]
    if any(metric.endswith("train_seconds") for metric in metrics):
        notes.append(f"trained on {', '.join(sorted({str(r.params.get('trained_on', 'unknown')) for r in results}))}")
    notes += _dense(results, metrics) + _mixed(list(groups.values()), labels)
    if base is not None and not any(figure.change is not None for row in rows for figure in row.figures.values()):
        notes.append(f"no changes shown: baseline {baseline} has no comparable result on this data set")
    shown = {column: metric for column, (metric, _) in columns.items()}
    return Table(" / ".join(names), content, labels, list(columns), rows, shown, notes)


def _dense(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """Return a note with the dense network's metrics, as far as they are the same for all results."""
    figures = []
    for metric in map(describe, metrics):
        key = metric.key.replace("pruned_", "dense_")
        values = {result.metrics.get(key) for result in results}
        if key != metric.key and not metric.of_device and len(values) == 1 and (value := values.pop()) is not None:
            figures.append(f"{metric.title} {metric.shown(value)}")
    return [f"dense: {', '.join(figures)}"] if figures else []


def _distinguishing_labels(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """Return the label columns for single results: the name, parameters that differ, and the run if still ambiguous."""
    wanted = ["network", "method", "prune_rate", "residual", "round_to", "finetune_epochs", "finetune_lr", "seed"]
    if any(metric.endswith("train_seconds") for metric in metrics):
        wanted.append("trained_on")
    labels = ["name", *(key for key in wanted if len({result.params.get(key) for result in results}) > 1)]
    distinct = {tuple(_label(result, label) for label in labels) for result in results}
    return labels if len(distinct) == len(results) else [*labels, "run"]


def _label(result: Result, key: str) -> Value:
    if key == "run":
        return result.run[:_RUN_SHOWN] if result.run else result.uri or "-"
    return result.name if key == "name" else result.params.get(key, "-")


def _mixed(groups: Sequence[Sequence[Result]], labels: Sequence[str]) -> list[str]:
    """Return a note on settings other than seeds that differ within a row; empty if there are none."""
    differing: dict[str, set[Value]] = {}
    for own in groups:
        for key in {key for result in own for key in result.params} - {*SEEDS, *labels, "recipe"}:
            if len(values := {result.params.get(key, "-") for result in own}) > 1:
                differing.setdefault(key, set()).update(values)
    if not differing and any(len({result.params.get("recipe") for result in own}) > 1 for own in groups):
        return ["some rows combine results of several recipes"]
    some = [f"{key} ({', '.join(map(str, sorted(values, key=str)))})" for key, values in sorted(differing.items())]
    return [f"some rows combine results that differ in {', '.join(some)}"] if some else []


def _baseline(results: Sequence[Result], name: str | None) -> Sequence[Result] | str | None:
    return name if name in (None, _DENSE) else [result for result in results if result.name == name]


def _figure(metric: Metric, results: Sequence[Result], base: Sequence[Result] | str | None) -> Figure:
    values = [result.metrics[metric.key] for result in results]
    changes = [c for result in results if (c := _change(metric, result, base)) is not None]
    return Figure(
        fmean(values), stdev(values) if len(values) > 1 else None, len(values), fmean(changes) if changes else None
    )


def _change(metric: Metric, result: Result, base: Sequence[Result] | str | None) -> float | None:
    """Return the change of a metric from the result's own dense network, or from the mean of the baseline's results."""
    if base is None:
        return None
    if isinstance(base, str):
        before = [result.metrics.get(metric.key.replace("pruned_", "dense_"))] if "pruned_" in metric.key else []
    else:
        same = [other for other in base if other.params.get("network") == result.params.get("network")]
        same = [other for other in same if other.device == result.device or not metric.of_device]
        before = [other.metrics.get(metric.key) for other in same]
    known = [value for value in before if value is not None]
    return metric.change(result.metrics[metric.key], fmean(known)) if known else None


def _sort_key(row: Row, column: str, metric: Metric) -> tuple[bool, float]:
    """Sort the best value first and missing values last."""
    figure = row.figures.get(column)
    return (figure is None, 0.0 if figure is None else -figure.mean if metric.higher_is_better else figure.mean)


# -- as text -----------------------------------------------------------------------------------------------------------


def cell(metric: Metric, figure: Figure | None, n: int = 1) -> str:
    """Format a figure with its deviation, its change and, if it differs from `n`, its n; "-" if it is missing."""
    if figure is None:
        return "-"
    text = metric.shown(figure.mean)
    if figure.deviation is not None:
        text += f" ± {metric.shown_deviation(figure.deviation)}"
    text += f" ({metric.shown_change(figure.change)})" if figure.change is not None else ""
    return text if figure.n == n else f"{text}, n {figure.n}"


def print_table(table: Table) -> None:
    """Print a table to the terminal, with the best value of each column in bold. Values are never truncated."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    grouped = any(figure.n > 1 for row in table.rows for figure in row.figures.values())
    view = RichTable(box=None, pad_edge=False, header_style="bold")
    for label in table.labels:
        view.add_column(Text(label), no_wrap=True)
    if grouped:
        view.add_column("n", justify="right")
    for column in table.figures:
        metric = table.metrics[column]
        view.add_column(Text(column.replace(metric.key, metric.title)), justify="right", no_wrap=True)
    best = {column: table.best(column) for column in table.figures}
    for row in table.rows:
        cells = [Text(str(row.labels[label])) for label in table.labels]
        if grouped:
            cells.append(Text(str(row.n)))
        for column in table.figures:
            figure = row.figures.get(column)
            style = "bold" if figure is not None and figure.mean == best[column] else ""
            cells.append(Text(cell(table.metrics[column], figure, row.n), style))
        view.add_row(*cells)
    # In a narrower terminal, lines wrap: rich would truncate the values.
    endless = Console(width=_ENDLESS)
    console = Console(width=max(Console().width, Measurement.get(endless, endless.options, view).maximum))
    print(f"{table.dataset or 'unknown data'} ({table.content[:12] or 'no hash'}); {'; '.join(table.notes)}")
    console.print(view)


def as_csv(found: Sequence[Table]) -> str:
    """Return all tables as one CSV text: raw values, one line per row."""
    labels = list(dict.fromkeys(label for table in found for label in table.labels))
    columns = list(dict.fromkeys(column for table in found for column in table.figures))
    grouped = any(f.n > 1 for table in found for row in table.rows for f in row.figures.values())
    changes = any(f.change is not None for table in found for row in table.rows for f in row.figures.values())
    parts = ["", *([" deviation", " n"] if grouped else []), *([" change"] if changes else [])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "dataset_content", *labels, *(c + part for c in columns for part in parts), "runs"])
    for table, row in _rows(found):
        values: list[Any] = [table.dataset, table.content, *(row.labels.get(label, "") for label in labels)]
        for column in columns:
            figure = row.figures.get(column)
            known = {} if figure is None else _plain(figure) | {"": figure.mean}
            values += [known.get(part.strip(), "") for part in parts]
        writer.writerow([*values, " ".join(row.runs)])
    return text.getvalue()


def as_json(found: Sequence[Table]) -> list[dict[str, Any]]:
    """Return the tables as JSON-compatible objects with raw values."""
    return [
        {
            "dataset": table.dataset,
            "dataset_content": table.content,
            "notes": table.notes,
            "rows": [
                {"labels": row.labels, "runs": row.runs, "figures": {c: _plain(f) for c, f in row.figures.items()}}
                for row in table.rows
            ],
        }
        for table in found
    ]


def _plain(figure: Figure) -> dict[str, float | int | None]:
    return {"mean": figure.mean, "deviation": figure.deviation, "n": figure.n, "change": figure.change}


def _rows(found: Sequence[Table]) -> Iterator[tuple[Table, Row]]:
    for table in found:
        for row in table.rows:
            yield table, row
