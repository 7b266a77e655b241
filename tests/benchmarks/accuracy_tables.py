"""Tables of accuracy after fine-tuning."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from scop.report.formatting import human
from tests.benchmarks.cells import (
    Table,
    differences,
    group_by_seed,
    group_by_variant,
    lead,
    lead_interval,
    percents,
    speed_of,
)

_TARGETS = {"resnet20": 0.8, "resnet56": 0.0, "resnet50": 0.0}
"""Maximum drop of top-1, in points, by network."""

WAYS = {
    "usual": "reference",
    "none": "nothing removed",
    "uniform": "uniform selection",
    "labels-only": "no distillation",
    "answers-only": "no attention maps",
    "no-average": "no weight averaging",
    "two-rounds": "2 rounds, 1 + 2 epochs",
    "twice-as-long": "6 epochs",
}
"""Label of each variant of `make bench-recovery`."""


def targets(folder: Path) -> Table:
    """The target for each network, and the drop measured by `make bench-accuracy` or `make bench-gpu`."""
    rows = []
    for network, most in _TARGETS.items():
        row = [network, f"at most {most:g}", "not measured", "", "", "open"]
        for name in (network, f"{network}-short"):
            if (path := folder / f"accuracy-{name}.json").exists():
                content = json.loads(path.read_text())
                groups = group_by_variant(content["variants"])
                none, scop = groups.get("none", {}), groups.get("scop", {})
                if drops := differences(none, scop):
                    epochs = content["settings"]["finetune"]["epochs"]
                    row[2:5] = [lead(none, scop), str(len(drops)), str(epochs)]
                    row[5] = _status(statistics.fmean(drops), *lead_interval(none, scop), most)
                    if name != network:
                        row[5] = "open"
                    break
        rows.append(row)
    return Table(["network", "target", "drop", "seeds", "epochs", "status"], rows)


def _status(mean: float, low: float | None, high: float | None, most: float) -> str:
    """Return whether the target is reached, claiming no more than the interval supports."""
    word = "missed" if mean > most else "reached"
    if low is None or high is None:
        return f"{word} once"
    return f"{word} on average" if low <= most < high else word


def accuracy(contents: list[dict[str, Any]]) -> Table:
    """The runs of `make bench-accuracy` and `make bench-gpu`: each measured method against `none`."""
    rows = []
    for content in contents:
        dense, groups = content["dense"], group_by_variant(content["variants"])
        finetune, none = content["settings"]["finetune"], groups.get("none", {})
        lesson = finetune["distillation"]
        settings = [
            str(finetune["epochs"]),
            f"{lesson.get('attention_until', 1):.0%}",
            "yes" if lesson.get("mirror") else "no",
        ]
        for name in (name for name in content["settings"]["variants"] if name != "none" and name in groups):
            found = groups[name]
            sizes = [_shared(next(iter(found.values()))[key], dense[key]) for key in ("params", "macs")]
            top1 = [
                f"{100 * dense['top1']:.2f}",
                percents(none, "top1") if none else "not measured",
                percents(found, "recalibrated_top1"),
                percents(found, "top1"),
            ]
            rows.append([content["network"], name, *settings, str(len(found)), *top1, lead(none, found), *sizes])
    headings = ["run", "method", "epochs", "attention", "mirror", "seeds", "dense", "`none`", "before", "after", "drop"]
    return Table([*headings, "parameters", "MACs"], rows)


def _shared(value: float, whole: float) -> str:
    return f"{human(value)} ({value / whole:.0%})"


def rules(content: dict[str, Any]) -> Table:
    """Residual rules at equal MACs and at equal latency."""
    groups, rows = group_by_variant(content["variants"]), []
    for name, variant in content["settings"]["variants"].items():
        if "residual" in variant and (found := groups.get(name)):
            rule, _, budget = name.partition("-")
            against = "" if rule == "scatter" else lead(found, groups.get(f"scatter-{budget}", {}))
            rows.append([rule, budget, *_sizes(found), speed_of(found), *_top1(found), against])
    headings = ["rule", "budget", "parameters", "MACs", "speed", "seeds", "before", "after", "after minus `scatter`"]
    return Table(headings, rows)


def methods(content: dict[str, Any]) -> Table:
    """SCOP and its controls at equal MACs, under rule `scatter`."""
    groups, rows = group_by_variant(content["variants"]), []
    for name, variant in content["settings"]["variants"].items():
        if (found := groups.get(name)) and (name == "scatter-macs" or "residual" not in variant):
            selection, method = variant.get("selection", "uniform"), variant.get("method", "scop")
            ours = groups.get("scatter-macs" if selection == "global" else "scop-uniform", {})
            against = "" if method in ("scop", "none") else lead(ours, found)
            rows.append([method, "" if method == "none" else selection, *_sizes(found), *_top1(found), against])
    return Table(["method", "selection", "parameters", "MACs", "seeds", "before", "after", "SCOP minus method"], rows)


def _sizes(found: dict[str, dict[str, Any]]) -> list[str]:
    return [human(next(iter(found.values()))[key]) for key in ("params", "macs")]


def _top1(found: dict[str, dict[str, Any]]) -> list[str]:
    return [str(len(found)), *(percents(found, key) for key in ("recalibrated_top1", "top1"))]


def recovery(content: dict[str, Any]) -> Table:
    """The effect of each part of fine-tuning, one changed at a time."""
    by_way, rows = group_by_seed(content["variants"]), []
    for way, label in WAYS.items():
        found = by_way[way]
        against = "" if way == "usual" else lead(found, by_way["usual"])
        rows.append([label, str(len(found)), percents(found, "top1"), against, *_sizes(found)])
    return Table(["change", "seeds", "top-1", "minus reference", "parameters", "MACs"], rows)


def run(content: dict[str, Any]) -> Table:
    """A finished run of the pipeline."""
    groups = group_by_seed(content["variants"])
    none = next((v["name"].partition("-seed")[0] for v in content["variants"] if v["method"] == "none"), "")
    named = {"dense": {"": content["variants"][0]["dense"]}} | groups
    rows = [
        [name, percents(found, "top1"), *_sizes(found), "" if name in ("dense", none) else lead(groups[none], found)]
        for name, found in named.items()
    ]
    return Table(["network", "top-1", "parameters", "MACs", "drop"], rows)
