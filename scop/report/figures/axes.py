"""Axes, colours and markers of the plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scop.report.metrics import Metric
from scop.report.results import Result


@dataclass(frozen=True)
class Style:
    """Colour and marker of a series.

    Attributes:
        colour: hexadecimal.
        symbol: marker, in Plotly's name.
        marker: the same marker in matplotlib's.
    """

    colour: str
    symbol: str
    marker: str


# Okabe and Ito's palette, safe for colour-blind readers, without its yellow, which is too light on white. Each colour
# has a marker of its own, so that the plots stay readable in black and white.
STYLES = (
    Style("#0072B2", "circle", "o"),
    Style("#D55E00", "square", "s"),
    Style("#009E73", "triangle-up", "^"),
    Style("#CC79A7", "cross", "P"),
    Style("#E69F00", "x", "X"),
    Style("#56B4E9", "star", "*"),
    Style("#8a8a8a", "pentagon", "p"),
)
DENSE = Style("#7a8594", "diamond-open", "D")
FRONT_COLOUR = "#8a8a8a"


@dataclass(frozen=True)
class Axis:
    """An axis of a plot.

    Attributes:
        title: title, with the unit.
        tickformat: format of the ticks: ``~s`` for metric prefixes; other formats are valid in Python and in d3; empty
            for the drawing library's own.
        low, high: fixed limits; None for automatic limits.
        share: whether the values are accuracies, whose automatic limits `share_limits` computes.
    """

    title: str = ""
    tickformat: str = ""
    low: float | None = None
    high: float | None = None
    share: bool = False


AXES = {
    "kept": (Axis("share of channels kept", ".0%", 0, 1.04), Axis("")),
    "curves": (Axis("epoch"), Axis("top-1", ".0%", share=True)),
    "confusion": (Axis("predicted"), Axis("true")),
}
"""Plot -> its x axis and y axis, if they do not depend on the data."""

SHARE_LIMITS = {"low": -0.002, "high": 1.002, "margin": 0.01, "relative_margin": 0.08}
"""Limits and margins of an automatic axis of accuracies: automatic limits of both libraries can be too narrow."""


def share_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis of accuracies. The page computes the same for the rows that match its filter."""
    low, high = min(values), max(values)
    margin = max(SHARE_LIMITS["margin"], SHARE_LIMITS["relative_margin"] * (high - low))
    return max(SHARE_LIMITS["low"], low - margin), min(SHARE_LIMITS["high"], high + margin)


def axis_of(metric: Metric, *, is_cost: bool = False) -> Axis:
    """Return the axis of a metric; the axis of a cost starts at 0."""
    tickformat = {"share": ".1%", "difference": "+.1%", "count": "~s", "bytes": "~s"}.get(metric.kind, "")
    unit = {"bytes": ", bytes", "milliseconds": ", ms", "seconds": ", s"}.get(metric.kind, "")
    return Axis(metric.title + unit, tickformat, low=0 if is_cost else None, share=metric.kind == "share")


def method_of(result: Result) -> str:
    """Return the pruning method; "?" if it is unknown."""
    return str(result.params.get("method", "?"))


def method_styles(results: Iterable[Result]) -> dict[str, Style]:
    """Return the style of each pruning method."""
    methods = dict.fromkeys(method_of(result) for result in results)
    return {method: STYLES[number % len(STYLES)] for number, method in enumerate(methods)}
