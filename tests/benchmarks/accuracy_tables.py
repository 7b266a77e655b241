"""Sections of docs/results.md about accuracy: what pruning costs after fine-tuning, and what brings it back."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.report.formatting import human
from tests.benchmarks.cells import (
    differences,
    group_by_seed,
    group_by_variant,
    lead,
    lead_interval,
    percents,
    provenance,
    remark,
    speed_of,
)
from tests.benchmarks.work import LATENCY_BATCH

_TARGETS = {
    "resnet20": ("55.8 % of the MACs removed", "about 1.5", 0.8),
    "resnet56": (
        "56 % of the MACs removed",
        "0.06 (SCOP); a gain of 0.24 at 53 %, of 0.11 at 61 % (Torch-Pruning)",
        0.0,
    ),
    "resnet50": (
        "at most 10,587,835 parameters",
        "0.5 in its tutorial, 1.5 by its README (Golden Stick, at 224x224 pixels)",
        0.0,
    ),
}
"""Budget, published drop of top-1 in points, and the drop to reach, by network."""


@dataclass(frozen=True)
class _Drop:
    """What a network's pruning costs: in points on average, its interval, both in words, and in how many epochs."""

    mean: float
    low: float | None
    high: float | None
    text: str
    epochs: int

    def against(self, most: float) -> str:
        """Whether it is as small as that, claiming no more than its interval does."""
        word = "missed" if self.mean > most else "reached"
        if self.low is None or self.high is None:
            return f"{word} once"
        return f"{word} on average" if self.low <= most < self.high else word


def _drop(path: Path) -> _Drop | None:
    """By a file of `make bench-accuracy`, where there is one and it holds both networks."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    by_variant = group_by_variant(content["variants"])
    none, scop = by_variant.get("none", {}), by_variant.get("scop", {})
    if not (drops := differences(none, scop)):
        return None
    text = f"{lead(none, scop)}, {len(drops)} seed{'s' * (len(drops) > 1)}"
    return _Drop(statistics.fmean(drops), *lead_interval(none, scop), text, content["settings"]["finetune"]["epochs"])


def figures_section(folder: Path) -> str:
    """What pruning is to cost at most, and what it costs, as far as the folder's results tell."""
    rows = []
    for network, (budget, published, most) in _TARGETS.items():
        cells = [network, budget, published, f"at most {most:g}", "not measured", "open"]
        if drop := _drop(folder / f"accuracy-{network}.json"):
            cells[-2:] = [drop.text, drop.against(most)]
        elif drop := _drop(folder / f"accuracy-{network}-short.json"):
            cells[-2:] = [f"[in {drop.epochs} epochs](#{network}-short-cifar-10-jpeg-q75) {drop.text}", "open"]
        rows.append(f"| {' | '.join(cells)} |")
    return f"""## The figures to reach

CIFAR-10 (JPEG q75). The drop is the top-1 of `none`, the network that is not pruned and fine-tuned just as long, less
that of the pruned one, in points: the mean over seeds, with its 95 % interval for other seeds and other test images.
`reached` without more is said where the whole interval is, `on average` where only the mean is. Details are in the
networks' own tables.

| network | budget | published drop | to reach | drop | |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

`to reach` is this project's own aim. The published drops (Tang et al., 2020; Fang et al., 2023; Golden Stick's pages)
are no like-for-like comparison: they are on the lossless CIFAR-10, against the dense network as it was, and without a
teacher, and SCOP's for ResNet-20 removes 56 % of the parameters as well, where a global selection here removes 37 %.

Two cores carry ResNet-20, and ResNet-56 for a few epochs; `make bench-gpu` measures the others in parts, on a GPU.
"""


def accuracy_section(content: dict[str, Any]) -> str:
    """A network of `make bench-accuracy`: each variant over its seeds, against `none`."""
    dense, finetune = content["dense"], content["settings"]["finetune"]
    by_variant = group_by_variant(content["variants"])
    reference = by_variant.get("none", {})
    rows = [f"| dense | | | {dense['top1']:.2%} | | {human(dense['params'])} | {human(dense['macs'])} | |"]
    for name in content["settings"]["variants"]:
        found = by_variant.get(name, {})
        if not found:
            rows.append(f"| {name} | | | not measured | | | | |")
            continue
        first = next(iter(found.values()))
        cells = [name, str(len(found)), *(percents(found, key) for key in ("recalibrated_top1", "top1"))]
        cells += [
            "" if name == "none" else lead(reference, found),
            human(first["params"]),
            human(first["macs"]),
        ]
        cells.append(speed_of(found))
        rows.append(f"| {' | '.join(cells)} |")
    ((what, limit),) = content["settings"]["variants"]["scop"]["budget"].items()
    name = {"macs": "MACs", "params": "parameters"}[what]
    share = f"{limit:.1%} of the {name}" if limit <= 1 else f"{limit:,.0f} {name}"
    compared = reference and any(name != "none" for name in by_variant)
    lesson = finetune["distillation"]
    until = lesson.get("attention_until", 1.0)
    attention = f"attention {lesson['attention']:g}" + (f" in the first {until:.0%} of the epochs" if until < 1 else "")
    asked = "dense network's mean answer to image and mirror image" if lesson.get("mirror") else "dense network"
    chosen = ["that selection is global"] + (["that attention ends"] if until < 1 else [])
    chosen += ["that the mirror image is asked about"] if lesson.get("mirror") else []
    how = f"By this split it was chosen\n{', '.join(chosen)}, and for how many epochs to train ([how](knockoffs.md))."
    if content["network"] == "resnet56-short":
        how = "The recipe is that of ResNet-20,\nfor as many epochs as two cores carry."
    besides = ", `none` just as long" if reference else ""
    drop = (
        f"""
The drop is that of `none` less that of the variant, seed by seed, with its 95 % interval
{_for_whom(content).strip()}."""
        if compared
        else ""
    )
    return f"""## {content["network"]}, CIFAR-10 (JPEG q75)

At most {share} stay, selection global, rule scatter. Fine-tuned for {finetune["epochs"]} epochs{besides}:
batch {finetune["batch_size"]}, {finetune["optimizer"]} with peak rate {finetune["lr"]}, {finetune["schedule"]},
weight decay {finetune["weight_decay"]:g},
distillation from the {asked}
({lesson["weight"]}, temperature {lesson["temperature"]:g}, {attention}), moving average ({finetune["ema"]}).
Top-1 on the test split: before fine-tuning, with batch norms recalibrated, and after it;
mean and standard deviation over seeds. {how}{drop}
Speed is that of batches of {LATENCY_BATCH}.

| network | seeds | before | after | drop | parameters | MACs | speed |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{provenance(content["command"], content["variants"].values())}
{_how_trained(content)}"""


def _how_trained(content: dict[str, Any]) -> str:
    """What the command alone does not say."""
    rows = content["variants"]
    compiled = [name for name, row in rows.items() if row.get("compile")]
    if not compiled:
        return ""
    which = "All" if len(compiled) == len(rows) else ", ".join(compiled)
    return f"{which} trained through torch.compile (`--steps compiled`), which is faster and not another recipe.\n"


def _for_whom(content: dict[str, Any]) -> str:
    """What the intervals of a table hold for."""
    if all("right" in row for row in content["variants"].values()):
        return " for other seeds and other test images"
    return " for other seeds on these test images (none where they agree to the image)"


def variants_section(content: dict[str, Any]) -> str:
    """Residual rules at equal MACs and at equal latency, and SCOP against its controls."""
    settings = content["settings"]["variants"]
    by_variant = group_by_variant(content["variants"])
    rules, methods = [], []
    for name, found in ((name, by_variant[name]) for name in settings if name in by_variant):
        first, figures = name.partition("-")[0], next(iter(found.values()))
        sizes = [human(figures["params"]), human(figures["macs"])]
        accuracy = [str(len(found)), *(percents(found, key) for key in ("recalibrated_top1", "top1"))]
        speed = speed_of(found)
        if "residual" in settings[name]:
            same = name.partition("-")[2]
            against = "" if first == "scatter" else lead(found, by_variant.get(f"scatter-{same}", {}))
            rules.append([first, same, *sizes, speed, *accuracy, against])
        if name == "scatter-macs" or "residual" not in settings[name]:
            selection = settings[name].get("selection", "uniform")
            method = settings[name].get("method", "scop")
            against = (
                ""
                if method in ("scop", "none")
                else lead(by_variant.get("scatter-macs" if selection == "global" else "scop-uniform", {}), found)
            )
            methods.append([method, "" if method == "none" else selection, *sizes, *accuracy, against])
    (latency,) = {v["budget"]["latency_ms"] for v in settings.values() if "latency_ms" in v.get("budget", {})}
    then = f", and then at the same latency ({latency:g} ms for a batch of {LATENCY_BATCH}, measured while\nselecting)"
    if not any(what == "latency" for _, what, *_ in rules):
        then = ""
    finetune, images = content["settings"]["finetune"], content["training_images"]
    return f"""## Short fine-tuning: {content["network"]}, CIFAR-10 (JPEG q75)

Networks of one budget, trained for {finetune["epochs"]} epoch of {images:,} images (batch {finetune["batch_size"]},
peak rate {finetune["lr"]}, distillation from the dense network {finetune["distillation"]["weight"]}): enough to tell
good selections from bad ones, and not what they come to in the end. Top-1 on the test split after recalibration of the
batch norms, and after fine-tuning; mean and standard deviation over seeds, of which each has scores of its own.

### Residual rules

Each rule at the same MACs{then}, selection global. Speed is that of batches of {LATENCY_BATCH} against
the dense network's, by turns, after fine-tuning. The last column is a rule's top-1 less that of scatter, seed by seed,
with its 95 % interval{_for_whom(content)}.

| rule | same | parameters | MACs | speed | seeds | before | after | against scatter |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rules)}

### Methods

Rule scatter. The last column is SCOP's top-1 less the control's by the same selection, seed by seed, with its 95 %
interval{_for_whom(content)}: only where that leaves out 0 is there a difference.

| method | selection | parameters | MACs | seeds | before | after | SCOP's lead |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in methods)}

{remark(content)}{provenance(content["command"], content["variants"].values())}
"""


WAYS = {
    "none": "nothing removed",
    "usual": "as the preset had it then: global selection, distillation, attention in all epochs, moving average",
    "uniform": "the same share removed from each layer",
    "labels-only": "without distillation",
    "answers-only": "without attention",
    "no-average": "without the moving average of weights",
    "two-rounds": "in two rounds, of 1 and 2 epochs",
    "twice-as-long": "6 epochs",
}
LESS = ("uniform", "labels-only", "answers-only", "no-average")
"""Ways that leave something out."""


def recovery_section(content: dict[str, Any]) -> str:
    """What brings accuracy back, one thing changed at a time."""
    by_way, rows = group_by_seed(content["variants"]), []
    for way, changed in WAYS.items():
        found = by_way[way]
        against = "" if way == "usual" else lead(found, by_way["usual"])
        sizes = [human(next(iter(found.values()))[key]) for key in ("params", "macs")]
        rows.append([changed, str(len(found)), percents(found, "top1"), against, *sizes])
    finetune, validation = content["config"]["finetune"], content["config"]["data"]["validation"]
    return f"""## What brings accuracy back: resnet20, {content["data"]}

At most 44.2% of the MACs stay, but for the first row. Fine-tuned for {finetune["epochs"]} epochs of
{1 - validation:.0%} of the training images, batch {finetune["batch_size"]}, peak rate {finetune["lr"]}; each row
differs from the second by what it says. Top-1 on the test split, mean and standard deviation over seeds; then the
difference to the second row, seed by seed, with its 95 % interval for other seeds on these test images: where that
holds 0, nothing is to be told. (The preset's weight decay was 5e-4, its average's decay is 0.99 here, for 3 epochs.)

| way | seeds | top-1 | against the second | parameters | MACs |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}

{provenance(content["command"], [content])}
"""


def run_section(name: str, content: dict[str, Any]) -> str:
    groups = group_by_seed(content["variants"])
    none = {v["name"].partition("-seed")[0] for v in content["variants"] if v["method"] == "none"}
    reference = groups[none.pop()] if none else {}
    config, device = content["config"], content["machine"]
    finetune, epochs = config["finetune"], config["knockoff"].get("epochs")
    # A configuration that holds none is of the time when there was but the published score.
    phase = f"by score {config['knockoff'].get('score', 'published')}" + (f", {epochs} epochs" if epochs else "")
    rules = sorted({variant["residual"] for variant in config["variants"] if variant["method"] != "none"})
    dense = "dense, as given" if config["dense"].get("weights") else "dense"
    first = content["variants"][0]["dense"]
    rows = [_row(dense, {"": first}, {}), *(_row(*item, reference) for item in groups.items())]
    titles = ["network", "seeds", "top-1", "top-5", "parameters", "MACs"]
    titles += [*(f"ms, batch {batch}" for batch in first["latency_ms"]), "against `none`"]
    return f"""## {name}: {content["data"]}

{config["dense"]["model"]}; knockoff phase {phase}; fine-tuning of {finetune["epochs"]}
epochs, batch {finetune["batch_size"]}, {finetune["optimizer"]} with peak rate {finetune["lr"]}, {finetune["schedule"]};
residual rule {", ".join(rules)}. Top-1 is the mean over seeds with its standard deviation. The last column compares
with `none`, nothing removed and fine-tuned just as long, seed by seed: the mean difference and its 95 % interval.

| {" | ".join(titles)} |
|{" --- |" * len(titles)}
{chr(10).join(rows)}

{remark(content)}Command: `{content["command"]}` ({content["seconds"] / 60:.0f} minutes, not alone on the machine).
Machine:
{device["device"]}, Python {device["python"]}, torch {device["torch"]}, revision {device["revision"]}, {device["date"]}.
"""


def _row(name: str, by_seed: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]]) -> str:
    found = list(by_seed.values())
    cells = [
        name,
        str(len(found)) if any(by_seed) else "",
        *(percents(by_seed, key) for key in ("top1", "top5")),
        human(found[0]["params"]),
        human(found[0]["macs"]),
    ]
    for batch in found[0]["latency_ms"]:
        cells.append(f"{statistics.fmean(figures['latency_ms'][batch]['p50'] for figures in found):.2f}")
    return f"| {' | '.join([*cells, '' if by_seed == reference else lead(by_seed, reference)])} |"
