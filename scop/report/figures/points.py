"""The plot of accuracy against cost: its metrics, points and Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from scop.report.figures.axes import method_of
from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.results import Result

_COLUMNS = ("pruned_top1", "top1_drop", "pruned_macs", "pruned_params", "pruned_bytes")
_DENSE_SHOWN = 50


def columns(results: Sequence[Result]) -> list[str]:
    """Return the metrics that the page's table shows, the most important first."""
    known = _known(results)
    return [key for key in (*_COLUMNS, *smallest_batch(known)) if key in known] or sorted(known)[:1]


def costs(results: Sequence[Result]) -> list[str]:
    """Return the metrics to choose from for the x axis."""
    known = _known(results)
    latencies = sorted(key for key in known if key.startswith("pruned_latency_ms") and key.endswith("_p50"))
    keys = ("pruned_macs", "pruned_params", "pruned_bytes", *latencies, "pruned_train_seconds")
    return [key for key in keys if key in known] or columns(results)


def accuracies(results: Sequence[Result]) -> list[str]:
    """Return the metrics to choose from for the y axis."""
    known = _known(results)
    return [k for k in ("pruned_top1", "pruned_top5", "top1_drop", "pruned_loss") if k in known] or columns(results)


def _known(results: Iterable[Result]) -> set[str]:
    return {key for result in results for key in result.metrics}


def ranked(results: Sequence[Result]) -> list[int]:
    """Return the indices of the results, best first: by the first column, ties by the next; missing values last."""
    metrics = [describe(key) for key in columns(results)]

    def rank(index: int) -> list[tuple[bool, float]]:
        values = [(metric, results[index].metrics.get(metric.key)) for metric in metrics]
        return [(v is None, 0.0 if v is None else -v if m.higher_is_better else v) for m, v in values]

    return sorted(range(len(results)), key=rank)


@dataclass(frozen=True)
class Point:
    """A point of the plot of accuracy against cost: results that differ only in their seeds, or a dense network.

    Attributes:
        name: name of the first result.
        method: pruning method.
        results: indices of the results.
        values: metric -> mean and sample standard deviation, which is 0 for a single value. Of a dense network, the
            median and 0, by the name of the pruned network's metric.
    """

    name: str
    method: str
    results: tuple[int, ...]
    values: Mapping[str, tuple[float, float]]


def points(results: Mapping[int, Result], keys: Sequence[str], *, over_seeds: bool = True) -> list[Point]:
    """Return one point per group of results that differ only in their seeds, or one per result.

    Args:
        results: results by index, all on one data set.
        keys: metrics to average; a point lacks a metric that none of its results has.
        over_seeds: whether to group the results.
    """
    groups: dict[Any, list[int]] = {}
    for index, result in results.items():
        groups.setdefault(result.identity if over_seeds else index, []).append(index)
    found = []
    for own in groups.values():
        first, values = results[own[0]], {}
        for key in keys:
            if known := [results[i].metrics[key] for i in own if key in results[i].metrics]:
                values[key] = (fmean(known), stdev(known) if len(known) > 1 else 0.0)
        found.append(Point(first.name, method_of(first), tuple(own), values))
    return found


def dense_points(results: Mapping[int, Result], keys: Sequence[str]) -> list[Point]:
    """Return one point per dense network, with the medians of its values: latencies vary between results."""
    groups: dict[Any, list[int]] = {}
    for index, result in results.items():
        groups.setdefault((result.metrics.get("dense_top1"), result.metrics.get("dense_params")), []).append(index)
    found = []
    for own in list(groups.values())[:_DENSE_SHOWN]:
        values = {}
        for key in (key for key in keys if key.startswith("pruned_")):
            of_dense = key.replace("pruned_", "dense_")
            if known := [results[i].metrics[of_dense] for i in own if of_dense in results[i].metrics]:
                values[key] = (median(known), 0.0)
        found.append(Point("dense", "dense", tuple(own), values))
    return found


def pareto_front(found: Sequence[Point], x: Metric, y: Metric) -> list[Point]:
    """Return the Pareto-optimal points that have both metrics, the best x first."""
    across, up = (-1 if metric.higher_is_better else 1 for metric in (x, y))
    front: list[Point] = []
    both = [point for point in found if x.key in point.values and y.key in point.values]
    for point in sorted(both, key=lambda p: (across * p.values[x.key][0], up * p.values[y.key][0])):
        if not front or up * point.values[y.key][0] < up * front[-1].values[y.key][0]:
            front.append(point)
    return front
