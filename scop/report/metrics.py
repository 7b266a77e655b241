"""The metrics of a result: titles, units, and whether higher is better."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scop.report.formatting import human

if TYPE_CHECKING:
    from pandas import Series

Kind = Literal["share", "difference", "count", "bytes", "milliseconds", "seconds", "ratio", "number"]

_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "macs": "MACs",
    "params": "parameters",
    "bytes": "file size",
    "loss": "loss",
}
_KINDS: dict[str, Kind] = {"top1": "share", "top5": "share", "macs": "count", "params": "count", "bytes": "bytes"}
_OTHERS: dict[str, tuple[str, Kind]] = {
    "train_seconds": ("training", "seconds"),
    "device_seconds": ("evaluation", "seconds"),
}
_LATENCY = re.compile(r"latency_ms_batch(\d+)_(p\d+)")
_SPEEDUP = re.compile(r"speedup_batch(\d+)")


@dataclass(frozen=True)
class Metric:
    """A metric of a `scop.report.results.Result`.

    Attributes:
        key: name in `Result.metrics`.
        title: name for display.
        kind: kind of value, which sets its unit and format. Shares are fractions in [0, 1], differences are
            differences of shares.
        higher_is_better: whether a higher value is better; None if unknown.
        of_device: whether the value depends on the device that latency was measured on.
    """

    key: str
    title: str
    kind: Kind
    higher_is_better: bool | None = False
    of_device: bool = False

    def shown(self, value: float) -> str:
        """Format a value with its unit."""
        match self.kind:
            case "share":
                return f"{value:.2%}"
            case "difference":
                return f"{_unsigned_zero(100 * value):+.2f} points"
            case "count":
                return human(value)
            case "bytes":
                return human(value, "B")
            case "milliseconds":
                return f"{value:.2f} ms"
            case "seconds":
                return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"
            case "ratio":
                return f"{value:.2f}x"
        return f"{value:.4g}"

    def shown_deviation(self, value: float) -> str:
        """Format a standard deviation: of shares in percentage points, of other kinds in the metric's unit."""
        return f"{100 * value:.2f}" if self.kind in ("share", "difference") else self.shown(value)

    def change(self, values: Series[float], before: Series[float]) -> Series[float]:
        """Return the differences for shares, the ratios for other kinds; NaN for a ratio to 0."""
        if self.kind in ("share", "difference"):
            return values - before
        return values / before.where(before != 0)

    def shown_change(self, change: float) -> str:
        """Format a value that `change` returned."""
        return f"{_unsigned_zero(100 * change):+.2f}" if self.kind in ("share", "difference") else f"{change:.2f}x"


def _unsigned_zero(value: float) -> float:
    return round(value, 2) + 0.0


def describe(key: str) -> Metric:
    """Return the description of a metric; `higher_is_better` is None for an unknown one."""
    if key in _OTHERS:
        title, kind = _OTHERS[key]
        return Metric(key, title, kind, of_device=True)
    if key == "top1_drop":
        return Metric(key, "drop", "difference")
    network, _, rest = key.partition("_")
    if (base := key.removesuffix("_removed")) != key:
        return Metric(key, f"{_NAMES.get(base, base)} removed", "share", higher_is_better=True)
    if found := _SPEEDUP.fullmatch(key):
        return Metric(key, f"speed-up, batch {found[1]}", "ratio", higher_is_better=True, of_device=True)
    if key == "prune_rate":
        return Metric(key, "prune rate", "number", higher_is_better=None)
    if network not in ("dense", "pruned"):
        return Metric(key, key, "number", higher_is_better=None)
    prefix = "dense " if network == "dense" else ""
    if found := _LATENCY.fullmatch(rest):
        quantile = "" if found[2] == "p50" else f", {found[2]}"
        return Metric(key, f"{prefix}latency, batch {found[1]}{quantile}", "milliseconds", of_device=True)
    if rest in _OTHERS:  # not `of_device`: training may run on another device, see parameter trained_on
        title, kind = _OTHERS[rest]
        return Metric(key, prefix + title, kind)
    kind = _KINDS.get(rest, "number")
    better = kind == "share" if rest in _NAMES else None
    return Metric(key, prefix + _NAMES.get(rest, rest), kind, better)


def smallest_batch(keys: Iterable[str]) -> list[str]:
    """Return the keys of median latency and speed-up at the smallest measured batch size; empty if there are none."""
    sizes = sorted(int(found[1]) for key in keys if (found := _SPEEDUP.fullmatch(key)))
    return [f"pruned_latency_ms_batch{sizes[0]}_p50", f"speedup_batch{sizes[0]}"] if sizes else []
