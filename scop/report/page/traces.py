"""Traces and layouts of the page's plots in Plotly's format.

``var(--NAME)`` stands for a colour of the style sheet. The script inserts it, because it depends on light or dark mode.
"""

from __future__ import annotations

from html import escape
from typing import Any

from scop.report.figures.axes import AXES, DENSE, FRONT_COLOUR, Axis, Style
from scop.report.figures.networks import Confusion, Curve, Histograms, KeptChannels

_TRANSPARENT = "rgba(0,0,0,0)"
_WITH_NUMBERS = 12  # maximum number of classes of a confusion matrix with counts in its cells
_SCALE = [[0, "var(--least)"], [1, "var(--most)"]]
CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"]}


def plain(text: str) -> str:
    """Escape a text, because Plotly interprets it as markup."""
    return escape(text, quote=False)


# -- layouts -----------------------------------------------------------------------------------------------------------


def axis(own: Axis, **more: Any) -> dict[str, Any]:
    """Return an axis with Plotly's options `more`."""
    limits: dict[str, Any] = {"rangemode": "tozero"} if own.low == 0 else {}
    if own.low is not None and own.high is not None:
        limits = {"range": [own.low, own.high]}
    lines = {f"{name}color": "var(--line)" for name in ("grid", "zeroline", "line")}
    return {"title": {"text": own.title}, "tickformat": own.tickformat, "automargin": True, **lines, **limits, **more}


def layouts() -> dict[str, dict[str, Any]]:
    """Return the layout of each plot, by the ID of its element."""
    layers = axis(AXES["kept"][1], autorange="reversed", tickfont={"size": 10})
    classes = {"type": "category", "showgrid": False}
    return {
        "pareto": _layout({}, {}, 460),
        "kept-channels": _layout(axis(AXES["kept"][0], dtick=0.25), layers) | {"barmode": "group"},
        "scores": _layout({}, layers | {"showgrid": False}),
        "learning-curves": _layout(axis(AXES["curves"][0]), axis(AXES["curves"][1]), 420),
        "confusion": _layout(
            axis(AXES["confusion"][0], **classes), axis(AXES["confusion"][1], **classes, autorange="reversed"), 460
        ),
    }


def _layout(x: dict[str, Any], y: dict[str, Any], height: int | None = None) -> dict[str, Any]:
    return {
        "template": {},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--text)"},
        "margin": {"l": 64, "r": 16, "t": 12, "b": 48},
        "paper_bgcolor": _TRANSPARENT,
        "plot_bgcolor": _TRANSPARENT,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--band)", "font": {"color": "var(--text)"}, "align": "left"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "modebar": {"bgcolor": _TRANSPARENT, "color": "var(--soft)", "activecolor": "var(--text)"},
        "xaxis": x,
        "yaxis": y,
        "height": height,
    }


# -- traces ------------------------------------------------------------------------------------------------------------


def front() -> dict[str, Any]:
    """Return the trace of the Pareto front, without its points."""
    line = {"color": FRONT_COLOUR, "width": 1.5, "dash": "dot"}
    return {"type": "scatter", "mode": "lines", "name": "Pareto front", "line": line, "hoverinfo": "skip"}


def markers(name: str, style: Style) -> dict[str, Any]:
    """Return the trace of a method or of the dense networks, without its points."""
    outline = {"width": 2} if style == DENSE else {"width": 1, "color": "var(--text)"}
    marker = {"size": 11, "color": style.colour, "symbol": style.symbol, "line": outline}
    return {"mode": "markers", "name": plain(name), "marker": marker, "hovertemplate": "%{text}<extra></extra>"}


def bars(name: str, colour: str, kept: KeptChannels) -> dict[str, Any]:
    """Return the trace of the kept channels of a network."""
    reach = {"array": kept.above, "arrayminus": kept.below, "visible": any((*kept.above, *kept.below))}
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(name),
        "x": kept.shares,
        "y": kept.layers,
        "marker": {"color": colour, "opacity": 0.75},
        "error_x": {"symmetric": False, "thickness": 1.5, "width": 2, "color": "var(--text)", **reach},
        "hovertext": [text.replace("\n", "<br>") for text in kept.texts],
        "hovertemplate": "%{y}: %{hovertext}<extra>%{fullData.name}</extra>",
    }


def line(name: str, colour: str, curve: Curve) -> dict[str, Any]:
    """Return the trace of a learning curve."""
    label = plain(curve.label(name))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": curve.epochs,
        "y": curve.top1,
        "line": {"color": colour, "width": 2},
        "marker": {"size": 5},
        "hovertemplate": f"epoch %{{x}}: {curve.split} top-1 %{{y:.2%}}<extra>{label}</extra>",
    }


def matrix(own: Confusion) -> dict[str, Any]:
    """Return the trace of a confusion matrix."""
    classes = [plain(name) for name in own.classes]
    numbers = {"text": own.counts, "texttemplate": "%{text}"} if len(classes) <= _WITH_NUMBERS else {}
    hover = "%{y} classified as %{x}: %{customdata}<extra></extra>"
    return {**_heatmap(classes, classes, own.shares, own.counts, hover, ygap=1), "zmin": 0, "zmax": 1, **numbers}


def histogram(own: Histograms) -> dict[str, Any]:
    """Return the trace of the histograms of scores."""
    hover = "%{y}: %{customdata} channels near %{x:.2f}<extra></extra>"
    return _heatmap(own.centres, own.layers, own.shares, own.counts, hover, ygap=3)


def _heatmap(x: Any, y: Any, shares: Any, counts: Any, hover: str, ygap: int) -> dict[str, Any]:
    look = {"colorscale": _SCALE, "showscale": False, "xgap": 1, "ygap": ygap, "hovertemplate": hover}
    return {"type": "heatmap", "x": x, "y": y, "z": shares, "customdata": counts, **look}
