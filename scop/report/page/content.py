"""The data of the results page, which its script draws: columns, rows, points and networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from scop.report.figures import axes, networks, points
from scop.report.figures.networks import Network
from scop.report.figures.points import Point
from scop.report.metrics import Metric, describe
from scop.report.page import traces
from scop.report.results import Result

_RUNS_IN_HOVER = 4
# Parameters that get a column if they differ between results.
_LABELS = (
    "network",
    "method",
    "prune_rate",
    "residual",
    "round_to",
    "finetune_epochs",
    "finetune_lr",
    "trained_on",
    "seed",
)


def content(results: Sequence[Result], details: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the data of the page as JSON-compatible objects and dataclasses.

    Args:
        results: results to show.
        details: index of a result -> its evaluation, for some of the results.
    """
    metrics = [describe(key) for key in points.columns(results)]
    costs, accuracies = points.costs(results), points.accuracies(results)
    labels = [key for key in _LABELS if len({result.params.get(key) for result in results}) > 1]
    found = networks.networks(results, details)
    network_of = {network.index: _network(network) for network in found}
    rows = [_row(i, results[i], labels, metrics) | {"plots": network_of.get(i)} for i in points.ranked(results)]
    keys = list(dict.fromkeys([*costs, *accuracies, *(metric.key for metric in metrics)]))
    return {
        "columns": [
            _column("name", "name", "name", sorter="string", frozen=True),
            *(_label_column(key, rows) for key in labels),
            *map(_metric_column, metrics),
            _column("code", "run", "run", headerSort=False),
            _column("code", "rerun", "rerun command", headerSort=False),
        ],
        "scopes": {"dataset": _datasets(results), "device": _devices(results)},
        "rows": rows,
        "costs": [_axis(describe(key), is_cost=True) for key in costs],
        "accuracies": [_axis(describe(key), is_cost=False) for key in accuracies],
        **_points(results, keys, labels, metrics),
        "methods": {method: traces.markers(method, style) for method, style in axes.method_styles(results).items()},
        "denseMarkers": traces.markers("dense", axes.DENSE),
        "front": traces.front(),
        "layouts": traces.layouts(),
        "config": traces.CONFIG,
        "shareLimits": axes.SHARE_LIMITS,
        "together": networks.SHOWN_TOGETHER,
        "severalScores": len(networks.with_own_scores(found)) > 1,
    }


# -- table -------------------------------------------------------------------------------------------------------------


def _label_column(key: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [row[key] for row in rows if key in row]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    return _column("label", key, _spaced(key), sorter="number" if numbers else "string")


def _metric_column(metric: Metric) -> dict[str, Any]:
    best = None if metric.higher_is_better is None else "max" if metric.higher_is_better else "min"
    first = "desc" if metric.higher_is_better else "asc"
    options = {"sorter": "number", "headerSortStartingDir": first, "hozAlign": "right", "headerHozAlign": "right"}
    return _column("metric", metric.key, metric.title, **options) | {"best": best}


def _column(kind: str, field: str, title: str, **options: Any) -> dict[str, Any]:
    """Return a column: how the script formats its cells, and its options in Tabulator."""
    return {"kind": kind, "options": {"field": field, "title": title, **options}}


def _row(index: int, result: Result, labels: Sequence[str], metrics: Sequence[Metric]) -> dict[str, Any]:
    texts = {}
    for metric in metrics:
        if (value := result.metrics.get(metric.key)) is not None:
            before = result.metrics.get(metric.key.replace("pruned_", "dense_"))
            of_dense = "" if before is None or not metric.key.startswith("pruned_") else f"of {metric.shown(before)}"
            texts[metric.key] = (metric.shown(value), of_dense)
    return {
        "index": index,
        "name": result.name,
        "dataset": result.dataset,
        "device": result.device,
        "words": " ".join(map(str, (result.name, result.run, *result.params.values()))).lower(),
        **{key: result.params[key] for key in labels if key in result.params},
        **{metric.key: result.metrics[metric.key] for metric in metrics if metric.key in result.metrics},
        "texts": texts,
        "run": result.run,
        "rerun": result.rerun,
        "source": "; ".join(_source(result)),
    }


def _source(result: Result) -> list[str]:
    """Return the result's run and the command that repeats the measurement."""
    return [text for text in (result.run and f"run {result.run}", result.rerun) if text]


def _datasets(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Return content hash and name of each data set."""
    first = {result.dataset: result for result in reversed(results)}
    order = dict.fromkeys(result.dataset for result in results)
    return [(key, f"{first[key].params.get('dataset', 'unknown')} ({key[:8] or 'no hash'})") for key in order]


def _devices(results: Sequence[Result]) -> list[tuple[str, str]]:
    return [(device, device or "an unknown device") for device in dict.fromkeys(result.device for result in results)]


def _spaced(key: str) -> str:
    return key.replace("_", " ")


# -- plots -------------------------------------------------------------------------------------------------------------


def _axis(metric: Metric, *, is_cost: bool) -> dict[str, Any]:
    axis = axes.axis_of(metric, is_cost=is_cost)
    choice = {"key": metric.key, "label": metric.title, "higher": bool(metric.higher_is_better), "share": axis.share}
    return choice | {"axis": traces.axis(axis)}


def _points(
    results: Sequence[Result], keys: Sequence[str], labels: Sequence[str], metrics: Sequence[Metric]
) -> dict[str, Any]:
    """Return single results, means over seeds (None if every result is alone) and dense networks as points.

    A point never mixes devices, because the page shows one device at a time.
    """
    scopes: dict[tuple[str, str], dict[int, Result]] = {}
    for index, result in enumerate(results):
        scopes.setdefault((result.dataset, result.device), {})[index] = result
    single, grouped, dense = [], [], []
    for own in scopes.values():
        single += points.points(own, keys, over_seeds=False)
        grouped += points.points(own, keys)
        dense += points.dense_points(own, keys)

    def lines(point: Point) -> list[str]:
        return _lines(point, [results[index] for index in point.results], labels, metrics)

    return {
        "single": [_values(point) | {"lines": lines(point)} for point in single],
        "grouped": None
        if len(grouped) == len(single)
        else [_values(point) | {"lines": lines(point)} for point in grouped],
        "dense": [_values(point) for point in dense],
    }


def _values(point: Point) -> dict[str, Any]:
    """Return a point with the text of each mean."""
    values = {key: (*value, describe(key).shown(value[0])) for key, value in point.values.items()}
    return asdict(point) | {"values": values}


def _lines(point: Point, results: Sequence[Result], labels: Sequence[str], metrics: Sequence[Metric]) -> list[str]:
    """Return the lines that the page shows at a point."""
    several, params = len(results) > 1, results[0].params
    lines = [f"{point.name} ({len(results)} runs)" if several else point.name]
    lines += [f"{_spaced(k)} {params[k]}" for k in labels if k in params and not (several and k == "seed")]
    lines += [f"{m.title} {m.shown(point.values[m.key][0])}" for m in metrics if m.key in point.values]
    lines += [text for result in results[:_RUNS_IN_HOVER] for text in _source(result)]
    return lines + (["..."] if len(results) > _RUNS_IN_HOVER else [])


def _network(network: Network) -> dict[str, Any]:
    """Return the data of a network's plots and, for screen readers, what they show."""
    kept, matrix = network.kept, network.confusion
    says = {"kept": "", "curves": "", "confusion": f"{len(matrix.classes)} classes. No image is misclassified."}
    if kept.layers:
        least, layer = min(zip(kept.shares, kept.layers, strict=True), key=lambda pair: pair[0])
        says["kept"] = f"{network.name} keeps the smallest share in {layer}: {least:.0%}"
    if network.curve:
        says["curves"] = f"{network.name} ends at {network.curve.top1[-1]:.2%} on the {network.curve.split} split"
    if worst := matrix.worst():
        true, predicted, count = worst
        says["confusion"] = (
            f"{len(matrix.classes)} classes. Most frequent error: {true} classified as {predicted} (count: {count})."
        )
    histograms = network.scores and {
        "trace": traces.histogram(network.scores),
        "axis": traces.axis(network.scores.axis, zeroline=True),
    }
    return {
        "name": network.name,
        "index": network.index,
        "kept": traces.bars(network.name, network.colour, kept),
        "curve": network.curve and traces.line(network.name, network.colour, network.curve),
        "denseCurve": network.dense_curve and traces.line("dense", axes.DENSE.colour, network.dense_curve),
        "confusion": traces.matrix(matrix),
        "scores": histograms,
        "says": says,
    }
