"""The plots of the results page as PNG, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scop.report.figures.axes import AXES, DENSE, FRONT_COLOUR, Axis, Style, axis_of, method_styles, share_limits
from scop.report.figures.networks import SHOWN_TOGETHER, Network, networks, with_own_scores
from scop.report.figures.points import Point, dense_points, pareto_front, points
from scop.report.metrics import Metric, describe, smallest_batch
from scop.report.page import Page
from scop.report.plots import draw_confusion, draw_histograms
from scop.report.results import Result

_ACCURACY = describe("pruned_top1")
_SOURCES = 200


def write_pictures(page: Page, folder: Path) -> list[Path]:
    """Write the plots to a folder and return their paths.

    Each data set has plots of its own, and each device its own latency plot. The PNG text ``Description`` of each file
    lists the runs shown and the commands that repeat the measurements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    styles = method_styles(page.results)
    for name, results in _on_one_dataset(page.results):
        known = {key for result in results for key in result.metrics}
        for cost in map(describe, ("pruned_macs", "pruned_params", *smallest_batch(known)[:1])):
            devices = sorted({r.device for r in results}) if cost.of_device else [""]
            for device in devices:
                own = [r for r in results if device in ("", r.device)]
                tail = _file_name(name, device if len(devices) > 1 else "")
                path = folder / f"accuracy-{_file_name(cost.title)}{tail and '-' + tail}.png"
                if _accuracy(own, cost, styles, path, device):
                    written.append(path)
    found = networks(page.results, page.details)
    if together := found[:SHOWN_TOGETHER]:
        metadata = _sources([page.results[network.index] for network in together])
        for draw, file in ((_kept_channels, "kept-channels.png"), (_learning_curves, "learning-curves.png")):
            draw(together, folder / file, metadata)
            written.append(folder / file)
    for network in found:
        path = folder / f"confusion-{_file_name(network.name)}.png"
        draw_confusion(network.confusion, path, _sources([page.results[network.index]]))
        written.append(path)
    scored = with_own_scores(found)
    for network in scored:
        path = folder / (f"scores-{_file_name(network.name)}.png" if len(scored) > 1 else "scores.png")
        if network.scores:
            draw_histograms(network.scores, path, _sources([page.results[network.index]]))
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


def _on_one_dataset(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.dataset, []).append(result)
    for content, own in by_dataset.items():
        name = f"{own[0].params.get('dataset', 'data')} {content[:8]}" if len(by_dataset) > 1 else ""
        yield name, own


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.]+", "-", " ".join(filter(None, parts)).lower()).strip("-")


def _figure(height: float, x: Axis, y: Axis) -> tuple[Any, Any]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a network may be named $a$
    figure = Figure(figsize=(7.2, height), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ed", linewidth=0.8)
    axes.set_axisbelow(True)
    for own, line in ((x, axes.xaxis), (y, axes.yaxis)):
        line.set_label_text(own.title)
        if own.tickformat:
            line.set_major_formatter(_formatter(own.tickformat))
    return figure, axes


def _formatter(tickformat: str) -> Any:
    from matplotlib.ticker import EngFormatter, FuncFormatter

    if tickformat == "~s":
        return EngFormatter(sep=" ")
    return FuncFormatter(lambda value, _: format(value, tickformat))


def _limit(axes: Any, x: Axis, y: Axis, ups: Sequence[float]) -> None:
    """Set the limits of the axes after everything is drawn."""
    axes.set_xlim(x.low, x.high)
    if y.share and ups:
        axes.set_ylim(*share_limits(ups))


def _accuracy(results: Sequence[Result], cost: Metric, styles: Mapping[str, Style], path: Path, device: str) -> bool:
    """Plot accuracy against a cost. Return False if there is nothing to plot."""
    keys, by_index = (cost.key, _ACCURACY.key), dict(enumerate(results))

    def drawable(found: Sequence[Point]) -> list[Point]:
        return [point for point in found if all(key in point.values for key in keys)]

    found, dense = drawable(points(by_index, keys)), drawable(dense_points(by_index, keys))
    if not found:
        return False
    x, y = axis_of(cost, is_cost=True), axis_of(_ACCURACY)
    figure, axes = _figure(4.4, x, y)
    if device:
        axes.set_xlabel(f"{x.title}, {device}")
    for method, style in styles.items():
        if own := [point for point in found if point.method == method]:
            (xs, dx), (ys, dy) = ([[p.values[key][part] for p in own] for part in (0, 1)] for key in keys)
            look = {"color": style.colour, "marker": style.marker, "linestyle": "none", "markersize": 6}
            axes.errorbar(xs, ys, xerr=dx, yerr=dy, label=method, elinewidth=1, capsize=2, **look)
    front = [[point.values[key][0] for point in pareto_front(found, cost, _ACCURACY)] for key in keys]
    axes.plot(*front, label="Pareto front", color=FRONT_COLOUR, linestyle=":", linewidth=1.2, zorder=1)
    if dense:
        centres = [[point.values[key][0] for point in dense] for key in keys]
        axes.scatter(*centres, marker=DENSE.marker, facecolors="none", edgecolors=DENSE.colour, label="dense")
    ends = [(point.values[_ACCURACY.key][0], point.values[_ACCURACY.key][1]) for point in (*found, *dense)]
    _limit(axes, x, y, [mean + sign * deviation for mean, deviation in ends for sign in (-1, 1)])
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata=_sources(results))
    return True


def _kept_channels(together: Sequence[Network], path: Path, metadata: Mapping[str, str]) -> None:
    layers = list(dict.fromkeys(layer for network in together for layer in network.kept.layers))
    x, y = AXES["kept"]
    figure, axes = _figure(1.2 + 0.22 * len(layers), x, y)
    height = 0.8 / len(together)
    for number, network in enumerate(together):
        kept, shift = network.kept, (number - (len(together) - 1) / 2) * height
        centres = [layers.index(layer) + shift for layer in kept.layers]
        reach = [list(kept.below), list(kept.above)]
        bars = {"xerr": reach, "error_kw": {"elinewidth": 1.0}} if any(map(any, reach)) else {}
        axes.barh(centres, kept.shares, height, label=network.name, color=network.colour, alpha=0.75, **bars)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.invert_yaxis()
    _limit(axes, x, y, [])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata=metadata)


def _learning_curves(together: Sequence[Network], path: Path, metadata: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    x, y = AXES["curves"]
    figure, axes = _figure(4.0, x, y)
    curves = [("dense", DENSE.colour, together[0].dense_curve)]
    curves += [(network.name, network.colour, network.curve) for network in together]
    drawn = [(name, colour, curve) for name, colour, curve in curves if curve]
    for name, colour, curve in drawn:
        axes.plot(curve.epochs, curve.top1, marker=".", color=colour, label=curve.label(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _limit(axes, x, y, [top1 for _, _, curve in drawn for top1 in curve.top1])
    if drawn:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata=metadata)
