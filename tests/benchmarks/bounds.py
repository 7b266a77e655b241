"""Figures of the speed benchmarks and the bounds that they must meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A ratio or a time in seconds, and its bound.

    Attributes:
        value: the figure.
        worst: the worst of several measurements, which counts; None if there is one.
        bound: largest value allowed, or smallest if not `at_most`.
        at_most: kind of the bound.
    """

    value: float
    worst: float | None
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        counts = self.value if self.worst is None else self.worst
        return counts <= self.bound if self.at_most else counts >= self.bound

    @property
    def limit(self) -> str:
        return "at most" if self.at_most else "at least"


def figures(results: dict[str, Any], prefix: str = "") -> dict[str, Figure]:
    """Return all figures with a bound inside nested results, by their keys joined by spaces."""
    found: dict[str, Figure] = {}
    for key, entry in results.items():
        if not isinstance(entry, dict):
            continue
        if "at_most" in entry or "at_least" in entry:
            value = float(entry["ratio"] if "ratio" in entry else entry["seconds"])
            bound = float(entry["at_most"] if "at_most" in entry else entry["at_least"])
            found[prefix + key] = Figure(value, entry.get("worst"), bound, "at_most" in entry)
        found |= figures(entry, f"{prefix}{key} ")
    return found
