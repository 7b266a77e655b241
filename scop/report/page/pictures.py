"""The plots of the results page as PNG, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.page import DETAILS, Page
from scop.report.plots import confusion_matrix, score_histograms
from scop.report.results import Result

# The page's palette (Okabe and Ito), with one marker per colour so that the plots stay readable in black and white.
_STYLES = list(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a"), "os^PXDv", strict=True)
)
_ACCURACY = "pruned_top1"
_CURVES = 6
_SOURCES = 200


@dataclass(frozen=True)
class Point:
    """Group of results that differ only in their seeds.

    Attributes:
        name: name of the first result.
        method: pruning method.
        x, y: means over the results.
        dx, dy: standard deviations; 0 for a single result.
    """

    name: str
    method: str
    x: float
    y: float
    dx: float
    dy: float


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Write the plots to a folder and return their paths.

    Each data set has plots of its own, and each device its own latency plot. The PNG text ``Description`` of each file
    lists the runs shown and the commands that repeat the measurements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, results in _on_one_dataset(page.results):
        known = {key for result in results for key in result.metrics}
        for across in ("pruned_macs", "pruned_params", *smallest_batch(known)[:1]):
            metric = describe(across)
            devices = sorted({r.device for r in results}) if metric.of_device else [""]
            for device in devices:
                own = [r for r in results if device in ("", r.device)]
                tail = _file_name(name, device if len(devices) > 1 else "")
                path = folder / f"accuracy-{_file_name(metric.title)}{tail and '-' + tail}.png"
                if _accuracy(own, metric, path, device):
                    written.append(path)
    details = _named(page)
    if details:
        some = dict(list(details.items())[:_CURVES])
        shown, metadata = {name: e for name, (_, e) in some.items()}, _sources([result for result, _ in some.values()])
        for draw, file in ((_kept_channels, "kept-channels.png"), (_learning_curves, "learning-curves.png")):
            draw(shown, folder / file, metadata)
            written.append(folder / file)
    for name, (result, evaluation) in details.items():
        path = folder / f"confusion-{_file_name(name)}.png"
        confusion_matrix(evaluation["confusion"], evaluation["classes"], path, _sources([result]))
        written.append(path)
    scored: list[tuple[str, Result, Any]] = []  # variants of one run share their scores
    for name, (result, evaluation) in details.items():
        if (scores := evaluation.get("scores")) and all(scores != other for _, _, other in scored):
            scored.append((name, result, scores))
    for name, result, scores in scored:
        path = folder / (f"scores-{_file_name(name)}.png" if len(scored) > 1 else "scores.png")
        score_histograms(scores, path, _sources([result]))
        written.append(path)
    return written


def _sources(results: Sequence[Result]) -> dict[str, str]:
    """Return the PNG metadata that lists the runs shown."""
    lines = [
        f"{result.name}: {'; '.join(filter(None, (result.run and f'run {result.run}', result.rerun)))}"
        for result in results[:_SOURCES]
    ]
    more = [f"and {len(results) - _SOURCES} more"] if len(results) > _SOURCES else []
    return {"Description": "\n".join(lines + more)}


def points(results: Sequence[Result], across: str, up: str = _ACCURACY) -> list[Point]:
    """Return one point per group of results that differ only in their seeds; results that lack a metric are skipped."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if across in result.metrics and up in result.metrics:
            groups.setdefault(result.identity, []).append(result)
    found = []
    for own in groups.values():
        xs, ys = ([result.metrics[key] for result in own] for key in (across, up))
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (xs, ys)]
        found.append(Point(own[0].name, str(own[0].params.get("method", "?")), fmean(xs), fmean(ys), *spread))
    return found


def pareto_front(found: Sequence[Point]) -> list[Point]:
    """Return the Pareto-optimal points (low x, high y), ordered by x."""
    front: list[Point] = []
    for point in sorted(found, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _on_one_dataset(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.dataset, []).append(result)
    for content, own in by_dataset.items():
        name = f"{own[0].params.get('dataset', 'data')} {content[:8]}" if len(by_dataset) > 1 else ""
        yield name, own


def _named(page: Page) -> dict[str, tuple[Result, Mapping[str, Any]]]:
    """Return the results with complete evaluations by name; duplicate names get a number."""
    found: dict[str, tuple[Result, Mapping[str, Any]]] = {}
    for number, evaluation in page.details.items():
        if not all(key in evaluation for key in DETAILS):
            continue
        name, count = page.results[number].name.replace("$", r"\$"), 1  # $ starts matplotlib's math mode
        while (title := name if count == 1 else f"{name} {count}") in found:
            count += 1
        found[title] = page.results[number], evaluation
    return found


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.]+", "-", " ".join(filter(None, parts)).lower()).strip("-")


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _accuracy(results: Sequence[Result], metric: Metric, path: Path, device: str) -> bool:
    """Plot accuracy against a cost. Return False if there is nothing to plot."""
    found = points(results, metric.key)
    if not found:
        return False
    figure, axes = _figure(4.4)
    methods = list(dict.fromkeys(point.method for point in found))
    for number, method in enumerate(methods):
        colour, marker = _STYLES[number % len(_STYLES)]
        own = [point for point in found if point.method == method]
        columns = [[getattr(p, key) for p in own] for key in ("x", "y", "dx", "dy")]
        style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 6, "elinewidth": 1, "capsize": 2}
        axes.errorbar(columns[0], columns[1], xerr=columns[2], yerr=columns[3], label=method, **style)
    front = pareto_front(found)
    line = {"color": "#8a8a8a", "linestyle": ":", "linewidth": 1.2, "zorder": 1}
    axes.plot([point.x for point in front], [point.y for point in front], label="Pareto front", **line)
    own_dense = (metric.key.replace("pruned_", "dense_"), "dense_top1")
    dense: dict[tuple[float, float], list[float]] = {}
    for r in results:
        if all(key in r.metrics for key in (*own_dense, "dense_params")):
            identity = (r.metrics["dense_params"], r.metrics["dense_top1"])
            dense.setdefault(identity, []).append(r.metrics[own_dense[0]])
    if dense:  # median, because latencies of one dense network vary between results
        coordinates = zip(*((median(across), top1) for (_, top1), across in dense.items()), strict=True)
        axes.scatter(*coordinates, marker="D", facecolors="none", edgecolors="#566270", label="dense")
    axes.set_xlim(left=0)
    axes.set_xlabel(
        metric.title + (", ms" if metric.kind == "milliseconds" else "") + (f", {device}" if device else "")
    )
    axes.set_ylabel("top-1 on the test split")
    axes.yaxis.set_major_formatter(_percent())
    axes.xaxis.set_major_formatter(_prefixed())
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata=_sources(results))
    return True


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _prefixed() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ")


def _kept_channels(evaluations: Mapping[str, Mapping[str, Any]], path: Path, metadata: Mapping[str, str]) -> None:
    channels: dict[str, int] = {}
    for evaluation in evaluations.values():
        channels |= evaluation["channels"]
    figure, axes = _figure(1.2 + 0.22 * len(channels))
    height = 0.8 / len(evaluations)
    for number, (name, evaluation) in enumerate(evaluations.items()):
        shares = [evaluation["kept"].get(layer, count) / count for layer, count in channels.items()]
        centres = [row + (number - (len(evaluations) - 1) / 2) * height for row in range(len(channels))]
        unsure = [evaluation["unsure"].get(layer, {"kept": [], "removed": []}) for layer in channels]
        reach = [
            [len(own[part]) / count for own, count in zip(unsure, channels.values(), strict=True)]
            for part in ("kept", "removed")
        ]
        whiskers = {"xerr": reach, "error_kw": {"elinewidth": 1.0}} if any(map(any, reach)) else {}
        axes.barh(centres, shares, height, label=name, color=_STYLES[number % len(_STYLES)][0], alpha=0.75, **whiskers)
    axes.set_yticks(range(len(channels)), list(channels), fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(_percent())
    axes.set_xlabel("share of channels kept")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata=metadata)


def _learning_curves(evaluations: Mapping[str, Mapping[str, Any]], path: Path, metadata: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(4.0)
    first = next(iter(evaluations.values()))
    curves = [("dense", first.get("dense_history") or [], "#7a8594")]
    for number, (name, evaluation) in enumerate(evaluations.items()):
        curves.append((name, evaluation["history"], _STYLES[number % len(_STYLES)][0]))
    for name, history, colour in curves:
        validated = all(record.get("validation_top1") is not None for record in history)
        key, kind = ("validation_top1", "") if validated else ("top1", " (training)")
        if history:
            epochs = [record["epoch"] for record in history]
            axes.plot(epochs, [record[key] for record in history], marker=".", color=colour, label=name + kind)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 on the validation split")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_percent())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata=metadata)
