"""Results side by side: sorted, grouped over seeds, against a baseline; never of two data sets or devices unsaid."""

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
"""Shown unless others are asked for, as far as there are any, with latency and speed-up at the smallest batch size."""

_DENSE = "dense"
_RUN_SHOWN = 8  # characters of MLflow's ids, of which the first few tell them apart
_ENDLESS = 10_000
_ALWAYS = ("network",)  # results of two networks are never one group


@dataclass(frozen=True)
class Figure:
    """A metric of one or several results.

    Attributes:
        mean: over them.
        deviation: the standard deviation of a sample; None of one.
        n: so many.
        change: against the baseline: a difference of accuracies, a ratio of anything else; None without one.
    """

    mean: float
    deviation: float | None = None
    n: int = 1
    change: float | None = None


@dataclass(frozen=True)
class Row:
    """A result, or a group of them.

    Attributes:
        labels: what it is, by column.
        figures: by column; those it lacks are missing.
        runs: MLflow's ids.
    """

    labels: dict[str, Value]
    figures: dict[str, Figure]
    runs: list[str]

    @property
    def n(self) -> int:
        """Of how many results it is; a figure may be of fewer."""
        return max((figure.n for figure in self.figures.values()), default=0)


@dataclass(frozen=True)
class Table:
    """The results on one data set.

    Attributes:
        dataset: its name.
        content: its content hash.
        labels, figures: the columns.
        rows: sorted, the best first.
        metrics: the metric of each column of figures.
        notes: what a reader must know.
    """

    dataset: str
    content: str
    labels: list[str]
    figures: list[str]
    rows: list[Row]
    metrics: dict[str, Metric]
    notes: list[str] = field(default_factory=list)

    def best(self, column: str) -> float | None:
        """The best value of a column; None where there is no choice, or nobody knows which way is better."""
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
    """Put results side by side, those on each data set in a table of its own.

    Args:
        results: any number.
        metrics: the columns; the first is sorted by.
        group_by: parameters; results that agree in them, and in network, are one row: mean, deviation, n.
        baseline: ``dense``, or a variant's name: what changes are told against.

    Raises:
        UserError: a metric, a parameter or the baseline is none that any result has.
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
        raise UserError(f"{option} {value!r} is nothing that these results have ({hint})")


def _table(
    content: str, results: Sequence[Result], metrics: Sequence[str], group_by: Sequence[str], baseline: str | None
) -> Table:
    devices = list(dict.fromkeys(result.device for result in results))
    columns: dict[str, tuple[Metric, str | None]] = {}  # with the device that alone counts there
    for metric in map(describe, metrics):
        if len(devices) > 1 and metric.of_device:
            columns |= {f"{metric.key} on {device}": (metric, device) for device in devices}
        else:
            columns[metric.key] = (metric, None)
    labels = list(dict.fromkeys((*group_by, *_ALWAYS))) if group_by else _telling(results, metrics)
    groups: dict[tuple[Value, ...], list[Result]] = {}
    for number, result in enumerate(results):
        key = tuple(_label(result, label) for label in labels) if group_by else (number,)
        groups.setdefault(key, []).append(result)
    base = _baseline(results, baseline)
    rows = []
    for own in groups.values():
        figures = {}
        for column, (metric, device) in columns.items():
            fitting = [r for r in own if metric.key in r.metrics and device in (None, r.device)]
            if fitting:
                figures[column] = _figure(metric, fitting, base)
        rows.append(Row({label: _label(own[0], label) for label in labels}, figures, [r.run for r in own if r.run]))
    rows.sort(key=lambda row: [_sort_key(row, column, metric) for column, (metric, _) in columns.items()])
    names = list(dict.fromkeys(str(result.params.get("dataset", "")) for result in results))
    notes = ["times are told apart by device" if len(devices) > 1 else f"times on {devices[0] or 'an unknown device'}"]
    if any(metric.endswith("train_seconds") for metric in metrics):
        notes.append(f"trained on {', '.join(sorted({str(r.params.get('trained_on', 'unknown')) for r in results}))}")
    notes += _dense(results, metrics) + _mixed(list(groups.values()), labels)
    if base is not None and not any(figure.change is not None for row in rows for figure in row.figures.values()):
        notes.append(f"nothing here to compare with: no {baseline} on these data")
    shown = {column: metric for column, (metric, _) in columns.items()}
    return Table(" / ".join(names), content, labels, list(columns), rows, shown, notes)


def _dense(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """The figures of the dense network in words, where all results come from one."""
    figures = []
    for metric in map(describe, metrics):
        key = metric.key.replace("pruned_", "dense_")
        values = {result.metrics.get(key) for result in results}
        if key != metric.key and not metric.of_device and len(values) == 1 and (value := values.pop()) is not None:
            figures.append(f"{metric.title} {metric.shown(value)}")
    return [f"dense: {', '.join(figures)}"] if figures else []


def _telling(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """The columns by which single results are told apart: those in which they differ, and always their name."""
    wanted = ["network", "method", "prune_rate", "residual", "round_to", "finetune_epochs", "finetune_lr", "seed"]
    if any(metric.endswith("train_seconds") for metric in metrics):
        wanted.append("trained_on")
    labels = ["name", *(key for key in wanted if len({result.params.get(key) for result in results}) > 1)]
    told = {tuple(_label(result, label) for label in labels) for result in results}
    return labels if len(told) == len(results) else [*labels, "run"]


def _label(result: Result, key: str) -> Value:
    if key == "run":
        return result.run[:_RUN_SHOWN] if result.run else result.place or "-"
    return result.name if key == "name" else result.params.get(key, "-")


def _mixed(groups: Sequence[Sequence[Result]], labels: Sequence[str]) -> list[str]:
    """In what else than their seeds results of one group differ."""
    differing: dict[str, set[Value]] = {}
    for own in groups:
        for key in {key for result in own for key in result.params} - {*SEEDS, *labels, "recipe"}:
            if len(values := {result.params.get(key, "-") for result in own}) > 1:
                differing.setdefault(key, set()).update(values)
    if not differing and any(len({result.params.get("recipe") for result in own}) > 1 for own in groups):
        return ["rows hold results of several recipes"]
    some = [f"{key} ({', '.join(map(str, sorted(values, key=str)))})" for key, values in sorted(differing.items())]
    return [f"rows hold results that differ in {', '.join(some)}"] if some else []


def _baseline(results: Sequence[Result], name: str | None) -> Sequence[Result] | str | None:
    return name if name in (None, _DENSE) else [result for result in results if result.name == name]


def _figure(metric: Metric, results: Sequence[Result], base: Sequence[Result] | str | None) -> Figure:
    values = [result.metrics[metric.key] for result in results]
    changes = [c for result in results if (c := _change(metric, result, base)) is not None]
    return Figure(
        fmean(values), stdev(values) if len(values) > 1 else None, len(values), fmean(changes) if changes else None
    )


def _change(metric: Metric, result: Result, base: Sequence[Result] | str | None) -> float | None:
    """By how much a result's metric differs from its own dense network's, or from the mean of the baseline's."""
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
    """The best first, and what is missing last."""
    figure = row.figures.get(column)
    return (figure is None, 0.0 if figure is None else -figure.mean if metric.higher_is_better else figure.mean)


# -- as text -----------------------------------------------------------------------------------------------------------


def cell(metric: Metric, figure: Figure | None, n: int = 1) -> str:
    """A figure with its deviation and change, and of how many it is if not of `n`; a dash where it is missing."""
    if figure is None:
        return "-"
    text = metric.shown(figure.mean)
    if figure.deviation is not None:
        text += f" ± {metric.shown_deviation(figure.deviation)}"
    text += f" ({metric.shown_change(figure.change)})" if figure.change is not None else ""
    return text if figure.n == n else f"{text}, n {figure.n}"


def print_table(table: Table) -> None:
    """To the terminal, the best of each column in bold; as wide as it needs to be, and never cut."""
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
    # A terminal that is narrower lets lines run over: whoever reads it needs the figures, all of them.
    endless = Console(width=_ENDLESS)
    console = Console(width=max(Console().width, Measurement.get(endless, endless.options, view).maximum))
    print(f"{table.dataset or 'unknown data'} ({table.content[:12] or 'no hash'}); {'; '.join(table.notes)}")
    console.print(view)


def as_csv(found: Sequence[Table]) -> str:
    """All tables as one: raw values, a line for each row."""
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
    """The tables, raw values."""
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
