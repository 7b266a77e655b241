"""Cells of the tables in docs/results.md: means, deviations and intervals over seeds, and over test images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from scop.report.paired_comparison import interval, share_right


def provenance(command: str, rows: Iterable[dict[str, Any]]) -> str:
    """By which command, on which machines: rows may be of several."""
    machines = [row["machine"] for row in rows]

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(machine[key]) for machine in machines))

    return f"""Command: `{command}`. Machine: {every("device")}, Python {every("python")}, torch {every("torch")};
revision {every("revision")}; {every("date")}."""


def remark(content: dict[str, Any]) -> str:
    return f"{content['remark']}\n\n" if "remark" in content else ""


def group_by_variant(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by VARIANT-SEED -> variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, figures in rows.items():
        variant, _, seed = key.rpartition("-")
        groups.setdefault(variant, {})[seed] = figures
    return groups


def speed_of(found: dict[str, dict[str, Any]]) -> str:
    """The mean over those seeds by which it was measured."""
    known = [figures["speedup"] for figures in found.values() if figures["speedup"] is not None]
    return f"{statistics.fmean(known):.2f}x" if known else ""


def group_by_seed(variants: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        name, _, seed = variant["name"].partition("-seed")
        groups.setdefault(name, {})[seed] = variant["pruned"]
    return groups


def differences(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> list[float]:
    """Top-1 of the one less that of the other in points, for each seed that both have."""
    return [100 * (theirs[seed]["top1"] - own["top1"]) for seed, own in ours.items() if seed in theirs]


def lead_interval(
    theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]
) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean difference: for other test images too, where the answers to these are known."""
    known = [seed for seed, row in ours.items() if "right" in row and "right" in theirs.get(seed, {})]
    shares = [share_right([rows[seed]["right"] for seed in known]) for rows in (theirs, ours) if known]
    low, high = interval(differences(theirs, ours), 100 * (shares[0] - shares[1]) if shares else None)
    # Equal differences by each seed are no certainty, but rounded to the same image.
    return (low, high) if low is not None and high is not None and low < high else (None, None)


def lead(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> str:
    """The mean difference, in points, and its interval."""
    points = differences(theirs, ours)
    if not points:
        return ""
    low, high = lead_interval(theirs, ours)
    return f"{statistics.fmean(points):+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")


def percents(by_seed: dict[str, dict[str, Any]], key: str) -> str:
    return percent([figures[key] for figures in by_seed.values()], 2)


def percent(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.{digits}f}{deviation}"
