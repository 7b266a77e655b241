"""Tables of accuracy after fine-tuning, from finished runs of the pipeline."""

from __future__ import annotations

from typing import Any

from scop.config.parsing import merged
from tests.benchmarks.cells import Figures, Lead, Table, by_variant, describe

_TARGETS = {"resnet20": 0.8, "resnet56": 0.0, "resnet50": 0.0}
"""Maximum drop of top-1, in points, by network."""
_RECOVERY = {
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
_SIZES = ("parameters", "MACs")
Content = dict[str, Any]
"""A JSON file of results."""


def accuracy(contents: list[Content]) -> Table:
    """Full fine-tuning: each method against `none` with the same recipe.

    A variant is named METHOD or METHOD-RECIPE, and the table's runs NETWORK or NETWORK-RECIPE.
    """
    rows = []
    for content in contents:
        groups = by_variant(content["variants"])
        for name, found in groups.items():
            method, _, recipe = name.partition("-")
            if method != "none":
                none = groups.get(name.replace(method, "none", 1), {})
                finetune = _finetuning(content, name)
                row = {"run": "-".join(filter(None, [_network(content), recipe])), "method": method}
                row |= {"epochs": str(finetune["epochs"]), **_distillation(finetune)}
                row |= describe(found, "seeds", "dense") | {"`none`": _top1(none) or "not measured"}
                row |= describe(found, "before", "after") | {"drop": str(Lead.of(none, found))}
                rows.append(row | describe(found, *_SIZES, shares=True))
    return sorted(rows, key=lambda row: row["run"])


def _network(content: Content) -> str:
    return str(content["config"]["dense"]["model"]).rpartition(":")[2]


def _finetuning(content: Content, name: str) -> Content:
    """Return the fine-tuning settings of a variant."""
    config = content["config"]
    variant = next(v for v in config["variants"] if str(v["name"]).partition("-seed")[0] == name)
    return merged(config["finetune"], variant["finetune"])


def _distillation(finetune: Content) -> dict[str, str]:
    distillation = finetune["distillation"]
    mirror = "yes" if distillation.get("mirror") else "no"
    return {"attention": f"{distillation.get('attention_until', 1):.0%}", "mirror": mirror}


def targets(contents: list[Content]) -> Table:
    """The target for each network, and the drop measured by `make bench-accuracy` or `make bench-gpu`."""
    return [_target(contents, network, most) for network, most in _TARGETS.items()]


def _target(contents: list[Content], network: str, most: float) -> dict[str, str]:
    row = {"network": network, "target": f"at most {most:g}", "drop": "not measured"}
    row |= {"seeds": "", "epochs": "", "status": "open"}
    # A shortened run is shown until there is a full one; it does not decide whether the target is met.
    for recipe in ("", "-short"):
        for content in contents:
            groups = by_variant(content["variants"])
            drop = Lead.of(groups.get(f"none{recipe}", {}), groups.get(f"scop{recipe}", {}))
            if _network(content) == network and drop.points:
                epochs = str(_finetuning(content, f"scop{recipe}")["epochs"])
                row |= {"drop": str(drop), "seeds": str(len(drop.points)), "epochs": epochs}
                return row if recipe else row | {"status": _status(drop, most)}
    return row


def _status(drop: Lead, most: float) -> str:
    """Return whether the target is reached, claiming no more than the interval supports."""
    word = "missed" if drop.mean > most else "reached"
    if drop.low is None or drop.high is None:
        return f"{word} once"
    return f"{word} on average" if drop.low <= most < drop.high else word


def rules(content: Content) -> Table:
    """Residual rules at equal MACs and at equal latency. A variant is named RULE-BUDGET."""
    groups, rows = by_variant(content["variants"]), []
    for name, found in groups.items():
        rule, _, budget = name.partition("-")
        if budget in ("macs", "latency"):
            lead = "" if rule == "scatter" else str(Lead.of(found, groups[f"scatter-{budget}"]))
            row = {"rule": rule, "budget": budget}
            row |= describe(found, *_SIZES, "speed", "seeds", "before", "after")
            rows.append(row | {"after minus `scatter`": lead})
    return rows


def methods(content: Content) -> Table:
    """SCOP and its controls at equal MACs, under rule `scatter`. A variant is named METHOD-SELECTION."""
    groups, rows = by_variant(content["variants"]), []
    groups = {"scop-global" if name == "scatter-macs" else name: found for name, found in groups.items()}
    for name, found in groups.items():
        method, _, selection = name.partition("-")
        if selection in ("uniform", "global", ""):
            lead = "" if method in ("scop", "none") else str(Lead.of(groups[f"scop-{selection}"], found))
            row = {"method": method, "selection": selection}
            row |= describe(found, *_SIZES, "seeds", "before", "after")
            rows.append(row | {"SCOP minus method": lead})
    return rows


def recovery(content: Content) -> Table:
    """The effect of each part of fine-tuning, one changed at a time."""
    groups, rows = by_variant(content["variants"]), []
    for name, label in _RECOVERY.items():
        found = groups[name]
        lead = "" if name == "usual" else str(Lead.of(found, groups["usual"]))
        row = {"change": label, **describe(found, "seeds"), "top-1": _top1(found)}
        rows.append(row | {"minus reference": lead} | describe(found, *_SIZES))
    return rows


def run(content: Content) -> Table:
    """A finished run of a preset."""
    groups = by_variant(content["variants"])
    none = next(found for found in groups.values() if next(iter(found.values()))["method"] == "none")
    dense = {seed: {**figures, "pruned": figures["dense"]} for seed, figures in none.items()}
    rows = []
    for name, found in {"dense": dense, **groups}.items():
        drop = "" if name == "dense" or found is none else str(Lead.of(none, found))
        rows.append({"network": name, "top-1": _top1(found), **describe(found, *_SIZES), "drop": drop})
    return rows


def _top1(found: Figures) -> str:
    return describe(found, "after")["after"] if found else ""
