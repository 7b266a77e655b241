"""Tables of measured results and their cells: means, deviations and intervals over seeds and test images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scop.report.paired_comparison import interval, share_right


@dataclass(frozen=True)
class Table:
    """A table for a Markdown document.

    Attributes:
        headings: one per column.
        rows: cells by row; the first cell of a row, or the first two together, identify it.
    """

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown, without a final newline."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)

    def cell(self, row: str, heading: str) -> str:
        """Return a cell. Raises KeyError if the row or the heading does not exist or is not unique."""
        found = [cells for cells in self.rows if row in (cells[0], " ".join(cells[:2]))]
        if len(found) != 1 or self.headings.count(heading) != 1:
            raise KeyError(f"{row} / {heading}: {len(found)} rows and {self.headings.count(heading)} columns")
        return found[0][self.headings.index(heading)]


def group_by_variant(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Group figures by VARIANT-SEED as variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, figures in rows.items():
        variant, _, seed = key.rpartition("-")
        groups.setdefault(variant, {})[seed] = figures
    return groups


def group_by_seed(variants: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Group the variants of a run's summary as variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        name, _, seed = variant["name"].partition("-seed")
        groups.setdefault(name, {})[seed] = variant["pruned"]
    return groups


def differences(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> list[float]:
    """Return the top-1 of one network minus that of the other, in points, for each seed that both have."""
    return [100 * (theirs[seed]["top1"] - own["top1"]) for seed, own in ours.items() if seed in theirs]


def lead_interval(
    theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean difference, or None twice.

    It covers other seeds and, if the correctness of each answer was stored, other test images.
    """
    known = [seed for seed, row in ours.items() if "right" in row and "right" in theirs.get(seed, {})]
    shares = [share_right([rows[seed]["right"] for seed in known]) for rows in (theirs, ours) if known]
    low, high = interval(differences(theirs, ours), 100 * (shares[0] - shares[1]) if shares else None)
    # Equal differences for all seeds are no certainty: they are rounded to the same image.
    return (low, high) if low is not None and high is not None and low < high else (None, None)


def lead(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> str:
    """Format the mean difference, in points, with its interval."""
    points = differences(theirs, ours)
    if not points:
        return ""
    low, high = lead_interval(theirs, ours)
    return f"{statistics.fmean(points):+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")


def speed_of(found: dict[str, dict[str, Any]]) -> str:
    """Format the mean speedup over the seeds for which it was measured."""
    known = [figures["speedup"] for figures in found.values() if figures["speedup"] is not None]
    return f"{statistics.fmean(known):.2f}x" if known else ""


def percents(by_seed: dict[str, dict[str, Any]], key: str) -> str:
    """Format the mean and standard deviation of a share over seeds, in percent."""
    return percent([figures[key] for figures in by_seed.values()], 2)


def percent(values: list[float], digits: int = 1) -> str:
    """Format the mean and standard deviation of shares, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.{digits}f}{deviation}"
