"""Tables of measured results and their cells: means, deviations and intervals over seeds and test images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scop.report.formatting import human
from scop.report.paired_comparison import interval, share_right

Table = list[dict[str, str]]
"""Rows of cells by heading; the first cell of a row, or the first two together, identify it."""
Figures = dict[str, dict[str, Any]]
"""A variant's figures by seed, each as in a run's summary."""


def markdown(table: Table) -> str:
    """Return a table as Markdown, without a final newline."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)


def cell_of(table: Table, row: str, heading: str) -> str:
    """Return a cell. Raises KeyError if the row or the heading does not exist, or if the row is not unique."""
    found = [cells for cells in table if row in ((names := list(cells.values()))[0], " ".join(names[:2]))]
    if len(found) != 1 or heading not in found[0]:
        raise KeyError(f"{row} / {heading}: {len(found)} rows; columns: {', '.join(table[0])}")
    return found[0][heading]


def by_variant(variants: Iterable[dict[str, Any]]) -> dict[str, Figures]:
    """Group the variants of a run by their names without the seeds."""
    groups: dict[str, Figures] = {}
    for variant in variants:
        name, _, seed = variant["name"].partition("-seed")
        groups.setdefault(name, {})[seed] = variant
    return groups


def describe(found: Figures, *headings: str, shares: bool = False) -> dict[str, str]:
    """Return a variant's cells under these headings; sizes with their shares of the dense network's if `shares`."""
    rows = list(found.values())
    pruned, dense = rows[0]["pruned"], rows[0]["dense"]
    speedups = [row["speedup"] for row in rows if row.get("speedup")]
    cells = {
        "seeds": str(len(rows)),
        "dense": f"{100 * dense['top1']:.2f}",
        "before": percent([row["before"] for row in rows if "before" in row], 2),
        "after": percent([row["pruned"]["top1"] for row in rows], 2),
        "speed": f"{fmean(speedups):.2f}x" if speedups else "",
    }
    for heading, key in (("parameters", "params"), ("MACs", "macs")):
        cells[heading] = human(pruned[key]) + (f" ({pruned[key] / dense[key]:.0%})" if shares else "")
    return {heading: cells[heading] for heading in headings}


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Format the mean and standard deviation of shares, in percent; empty if there are none."""
    deviation = f" ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.{digits}f}{deviation}" if values else ""


@dataclass(frozen=True)
class Lead:
    """Top-1 of one variant minus that of another, in points.

    Attributes:
        points: differences, for the seeds that both have.
        low, high: 95 % interval of their mean, or None. It covers other seeds and, if the correctness of each answer
            was stored, other test images.
    """

    points: list[float]
    low: float | None
    high: float | None

    @classmethod
    def of(cls, theirs: Figures, ours: Figures) -> Lead:
        """Return the lead of the first variant over the second."""
        pairs = [(theirs[seed]["pruned"], figures["pruned"]) for seed, figures in ours.items() if seed in theirs]
        points = [100 * (first["top1"] - second["top1"]) for first, second in pairs]
        right = [[one["right"] for one in pair] for pair in pairs if all("right" in one for one in pair)]
        shares = [share_right(answers) for answers in zip(*right, strict=True)]
        low, high = interval(points, 100 * (shares[0] - shares[1]) if shares else None)
        # Equal differences for all seeds are no certainty: they are rounded to the same image.
        certain = low is None or high is None or low >= high
        return cls(points, None, None) if certain else cls(points, low, high)

    @property
    def mean(self) -> float:
        return fmean(self.points)

    def __str__(self) -> str:
        if not self.points:
            return ""
        return f"{self.mean:+.2f}" + ("" if self.low is None else f" ({self.low:+.2f} to {self.high:+.2f})")
