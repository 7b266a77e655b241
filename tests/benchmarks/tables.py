"""`make results`: docs/results.md, made from the JSON files in tests/benchmarks/results.

    python -m tests.benchmarks.tables add NAME runs/RUN "COMMAND" "DATA"

takes a finished run in: its summary, its configuration and the machine; DATA is what the tables call its images.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from scop.paired import interval
from scop.text import human
from tests.benchmarks.measure import machine, settings_hash
from tests.benchmarks.remedies import REMEDIES
from tests.benchmarks.scores import SETTINGS
from tests.benchmarks.work import LATENCY_BATCH

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
_TARGETS = {
    "resnet20": ("55.8 % of the MACs removed", "about 1.5", 0.8),
    "resnet56": ("56 % of the MACs removed", "0.06 (SCOP), a gain of 0.24 (Torch-Pruning)", 0.0),
    "resnet50": ("at most 10,587,835 parameters", "0.5 claimed, 1.4 in its README (Golden Stick)", 0.0),
}
"""Budget, published drop of top-1 in points, and the drop to reach, by network."""
_INTRODUCTION = """# Results

Every table is made by `make results` from the JSON files in
[tests/benchmarks/results](../tests/benchmarks/results), which hold configuration, machine, versions and command.
"""


def add(name: str, folder: Path, command: str, data: str) -> None:
    """Take a finished run into the results."""
    summary = json.loads((folder / "summary.json").read_text())
    for variant in summary["variants"]:
        del variant["model"], variant["onnx"]  # paths of the machine that it ran on
    record = next(json.loads(path.read_text()) for path in sorted(folder.rglob("step.json")))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    content = {
        "command": command,
        "data": data,
        "machine": machine() | {"torch": record["torch"], "revision": record["revision"]},
        "settings_hash": settings_hash(config),
        "config": config,
        "seconds": summary["seconds"],
        "variants": summary["variants"],
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def render() -> str:
    """The page, as Markdown."""
    sections: dict[str, list[str]] = {
        kind: [] for kind in ("accuracy", "variants", "recovery", "run", "scores", "quality", "speed")
    }
    for path in sorted(FOLDER.glob("*.json")):
        kind, _, name = path.stem.partition("-")
        content = json.loads(path.read_text())
        match kind:
            case "accuracy" | "variants" if not content["variants"]:  # its dense network is ready, and no more
                pass
            case "accuracy":
                sections[kind].append(_accuracy(content))
            case "variants":
                sections[kind].append(_variants(content))
            case "recovery":
                sections[kind].append(_recovery(content))
            case "quality":
                sections[kind].append(_quality(content))
            case "scores":
                sections[kind].append(_scores(name, content))
            case "speed":
                sections[kind].append(_speed(content))
            case _:
                sections["run"].append(_run(path.stem, content))
    tables = (section for kind in sections.values() for section in kind)
    return "\n".join([_INTRODUCTION, _figures(), *tables, _failures()])


def _figures() -> str:
    """What pruning is to cost at most, and what it costs, as far as that is known."""
    rows = []
    for network, (budget, published, most) in _TARGETS.items():
        path = FOLDER / f"accuracy-{network}.json"
        by_variant = _by_variant(json.loads(path.read_text())["variants"]) if path.exists() else {}
        drops = _differences(by_variant.get("none", {}), by_variant.get("scop", {}))
        cells = [network, budget, published, f"at most {most:g}", "not measured", ""]
        if drops:
            reached = "reached" if statistics.fmean(drops) <= most else "missed"
            cells[-2:] = [f"{_with_interval(drops)}, {len(drops)} seeds", reached]
        rows.append(f"| {' | '.join(cells)} |")
    return f"""## The figures to reach

CIFAR-10 (JPEG q75). The drop is the top-1 of `none`, the network that is not pruned and fine-tuned just as long, less
that of the pruned one, in points: the mean over seeds, with its 95 % interval. Details are in the networks' own tables.

| network | budget | published drop | to reach | drop | |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Two cores carry ResNet-20; `make bench-gpu` measures the others in parts, on a GPU.
"""


def _accuracy(content: dict[str, Any]) -> str:
    """A network of `make bench-accuracy`: each variant over its seeds, against `none`."""
    dense, finetune = content["dense"], content["settings"]["finetune"]
    by_variant = _by_variant(content["variants"])
    reference = by_variant.get("none", {})
    rows = [f"| dense | | | {dense['top1']:.2%} | | {human(dense['params'])} | {human(dense['macs'])} | |"]
    for name in content["settings"]["variants"]:
        found = by_variant.get(name, {})
        if not found:
            continue
        first, drops = next(iter(found.values())), _differences(reference, found)
        cells = [name, str(len(found)), *(_percents(found, key) for key in ("recalibrated_top1", "top1"))]
        cells += [
            "" if name == "none" or not drops else _with_interval(drops),
            human(first["params"]),
            human(first["macs"]),
        ]
        cells.append(_speed_of(found))
        rows.append(f"| {' | '.join(cells)} |")
    ((what, limit),) = content["settings"]["variants"]["scop"]["budget"].items()
    name = {"macs": "MACs", "params": "parameters"}[what]
    share = f"{limit:.1%} of the {name}" if limit <= 1 else f"{limit:,.0f} {name}"
    lesson = finetune["distillation"]
    until = lesson.get("attention_until", 1.0)
    attention = f"attention {lesson['attention']:g}" + (f" in the first {until:.0%} of the epochs" if until < 1 else "")
    return f"""## {content["network"]}, CIFAR-10 (JPEG q75)

At most {share} stay, selection global, rule scatter. Fine-tuned for {finetune["epochs"]} epochs, `none` just as long:
batch {finetune["batch_size"]}, {finetune["optimizer"]} with peak rate {finetune["lr"]}, {finetune["schedule"]},
weight decay {finetune["weight_decay"]:g},
distillation from the dense network ({lesson["weight"]}, temperature {lesson["temperature"]:g}, {attention}), moving
average ({finetune["ema"]}). Top-1 on the test split: before fine-tuning, with batch norms recalibrated, and after it;
mean and standard deviation over seeds. By this split it was chosen that selection is global and that attention ends
([how](knockoffs.md)), and nothing else. The drop is that of `none` less that of the variant, seed by seed, with its
95 % interval. Speed is that of batches of {LATENCY_BATCH}.

| network | seeds | before | after | drop | parameters | MACs | speed |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{_provenance(content["command"], content["variants"].values())}
"""


def _variants(content: dict[str, Any]) -> str:
    """Residual rules at equal MACs and at equal latency, and SCOP against its controls."""
    settings = content["settings"]["variants"]
    by_variant = _by_variant(content["variants"])
    rules, methods = [], []
    for name, found in ((name, by_variant[name]) for name in settings if name in by_variant):
        first, figures = name.partition("-")[0], next(iter(found.values()))
        sizes = [human(figures["params"]), human(figures["macs"])]
        accuracy = [str(len(found)), *(_percents(found, key) for key in ("recalibrated_top1", "top1"))]
        speed = _speed_of(found)
        if "residual" in settings[name]:
            rules.append([first, name.partition("-")[2], *sizes, speed, *accuracy])
        if name == "scatter-macs" or "residual" not in settings[name]:
            selection = settings[name].get("selection", "uniform")
            method = settings[name].get("method", "scop")
            against = (
                ""
                if method in ("scop", "none")
                else _with_interval(
                    _differences(by_variant.get("scatter-macs" if selection == "global" else "scop-uniform", {}), found)
                )
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
the dense network's, by turns, after fine-tuning.

| rule | same | parameters | MACs | speed | seeds | before | after |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rules)}

### Methods

Rule scatter. The last column is SCOP's top-1 less the control's by the same selection, seed by seed, with its 95 %
interval: only where that leaves out 0 is there a difference.

| method | selection | parameters | MACs | seeds | before | after | SCOP's lead |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in methods)}

{_remark(content)}{_provenance(content["command"], content["variants"].values())}
"""


_WAYS = {
    "none": "nothing removed",
    "usual": "as the presets have it, but for attention in all epochs: global selection, distillation, moving average",
    "uniform": "the same share removed from each layer",
    "labels-only": "without distillation",
    "answers-only": "without attention",
    "no-average": "without the moving average of weights",
    "two-rounds": "in two rounds, of 1 and 2 epochs",
    "twice-as-long": "6 epochs",
}


def _recovery(content: dict[str, Any]) -> str:
    """What brings accuracy back, one thing changed at a time."""
    by_way, rows = _by_seed(content["variants"]), []
    for way, changed in _WAYS.items():
        found = by_way[way]
        against = "" if way == "usual" else _with_interval(_differences(found, by_way["usual"]))
        sizes = [human(next(iter(found.values()))[key]) for key in ("params", "macs")]
        rows.append([changed, str(len(found)), _percents(found, "top1"), against, *sizes])
    finetune, validation = content["config"]["finetune"], content["config"]["data"]["validation"]
    return f"""## What brings accuracy back: resnet20, {content["data"]}

At most 44.2% of the MACs stay, but for the first row. Fine-tuned for {finetune["epochs"]} epochs of
{1 - validation:.0%} of the training images, batch {finetune["batch_size"]}, peak rate {finetune["lr"]}; each row
differs from the second by what it says. Top-1 on the test split, mean and standard deviation over seeds; then the
difference to the second row, seed by seed, with its 95 % interval: where that holds 0, nothing is to be told.

| way | seeds | top-1 | against the second | parameters | MACs |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}

{_provenance(content["command"], [content])}
"""


def _quality(content: dict[str, Any]) -> str:
    """How good knockoffs are."""
    rows = []
    for name, found in content["sources"].items():
        quality = found["quality"]
        tests = [f"{quality[swap]['p']:.3f}" for swap in ("swap_all", "swap_half", "swap_pixels")]
        cells = [name, *tests, f"{quality['correlation']:.3f} ({quality['correlation_expected']:.3f})"]
        agreement = f"{quality['label_agreement']:.1%} ({quality['label_agreement_expected']:.1%}"
        cells.append(f"{agreement}, p = {quality['label_p']:.3f})")
        cells += [f"{found[key]:.0%}" for key in ("beat_their_knockoffs", "are_beaten")]
        cells += [f"{kept:.0%}" if kept else "refused" for kept in found["kept_at_fdr"].values()]
        rows.append(f"| {' | '.join(cells)} |")
    first = next(iter(content["sources"].values()))
    return f"""## How good knockoffs are: CIFAR-10 (JPEG q75)

Permutation p-values of the swaps (everything, half of the principal components, half of the pixels at 4x4), correlation
with the original (of independent images), how often the dense network finds the original's label (by chance). Then what
the channels of the shared {
        content["network"]
    } make of them: the share that beats its knockoff by more than two standard
errors, that is beaten, and that the filter keeps.

| source | all | components | pixels | correlation | label | beat | beaten | {
        " | ".join(f"fdr {q}" for q in first["kept_at_fdr"])
    } |
| --- | --- | --- | --- | --- | --- | --- | --- | {" | ".join("---" for _ in first["kept_at_fdr"])} |
{chr(10).join(rows)}

{_provenance(content["command"], content["sources"].values())}
"""


def _provenance(command: str, rows: Iterable[dict[str, Any]]) -> str:
    """By which command, on which machines: rows may be of several."""
    machines = [row["machine"] for row in rows]

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(machine[key]) for machine in machines))

    return f"""Command: `{command}`. Machine: {every("device")}, Python {every("python")}, torch {every("torch")};
revision {every("revision")}; {every("date")}."""


def _run(name: str, content: dict[str, Any]) -> str:
    groups = _by_seed(content["variants"])
    none = {v["name"].partition("-seed")[0] for v in content["variants"] if v["method"] == "none"}
    reference = groups[none.pop()] if none else {}
    config, device = content["config"], content["machine"]
    finetune, epochs = config["finetune"], config["knockoff"].get("epochs")
    phase = f"of {epochs} epochs" if epochs else f"by score {config['knockoff'].get('score', 'fisher')}"
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

{_remark(content)}Command: `{content["command"]}` ({content["seconds"] / 60:.0f} minutes, not alone on the machine).
Machine:
{device["device"]}, Python {device["python"]}, torch {device["torch"]}, revision {device["revision"]}, {device["date"]}.
"""


def _remark(content: dict[str, Any]) -> str:
    return f"{content['remark']}\n\n" if "remark" in content else ""


def _scores(network: str, content: dict[str, Any]) -> str:
    ways = content["ways"]
    rates = list(next(iter(ways.values()))["top1"])
    rows = []
    for way, figures in ways.items():
        cells = [way, str(figures["seeds"]), *(_percent(figures["top1"][rate]) for rate in rates)]
        for key in ("rank_correlation_with_removal", "agreement_of_seeds"):
            cells.append("" if figures.get(key) is None else f"{figures[key]:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return f"""## Scores: {network}, CIFAR-10 (JPEG q75)

What a score knows before any fine-tuning: top-1 on 5,000 images of the validation split after surgery (rule scatter,
the same rate in each layer) and recalibration of the batch norms, mean and standard deviation over seeds. The dense
network has {content["dense_top1"]:.1%} there: it was trained on most of these images. Then the rank correlation with
what a channel is worth by itself (the loss that its removal costs), and between seeds. The knockoff phase sees 10,240
images, of which half are for the scores and half for W. What they mean says [knockoffs.md](knockoffs.md).

| score | seeds | {" | ".join(f"rate {rate}" for rate in rates)} | correlation | seeds agree |
| --- | --- | {"--- | " * len(rates)}--- | --- |
{chr(10).join(rows)}

{_provenance(content["command"], ways.values())}
"""


def _failures() -> str:
    """What was tried and is behind the default, from the tables above."""
    rows = []
    for path in sorted(FOLDER.glob("scores-*.json")):
        ways = json.loads(path.read_text())["ways"]
        best = ways["fisher"]["top1"]["0.45"]
        for way, figures in ways.items():
            own = figures["top1"]["0.45"]
            if way in (*SETTINGS, *REMEDIES) and statistics.fmean(own) < statistics.fmean(best):
                rows.append(
                    [f"score: {way}", f"{path.stem.partition('-')[2]}, rate 0.45", _percent(own), _percent(best)]
                )
    path = FOLDER / "recovery-resnet20.json"
    ways = _by_seed(json.loads(path.read_text())["variants"]) if path.exists() else {}
    usual = [figures["top1"] for figures in ways.get("usual", {}).values()]
    for way, found in ways.items():
        own = [figures["top1"] for figures in found.values()]
        if way != "none" and statistics.fmean(own) < statistics.fmean(usual):
            rows.append([_WAYS[way], "resnet20, short fine-tuning", _percent(own, 2), _percent(usual, 2)])
    return f"""## What did not help

Ways of scoring whose mean is below the default's in the tables above, and ways of fine-tuning below the presets'; the
standard deviations say which of them might be as good. What was only sketched is told in [knockoffs.md](knockoffs.md).

| tried | where | top-1 | instead of |
| --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}
"""


def _by_variant(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by VARIANT-SEED -> variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, figures in rows.items():
        variant, _, seed = key.rpartition("-")
        groups.setdefault(variant, {})[seed] = figures
    return groups


def _speed_of(found: dict[str, dict[str, Any]]) -> str:
    """The mean over those seeds by which it was measured."""
    known = [figures["speedup"] for figures in found.values() if figures["speedup"] is not None]
    return f"{statistics.fmean(known):.2f}x" if known else ""


def _by_seed(variants: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Variant -> seed -> figures."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for variant in variants:
        name, _, seed = variant["name"].partition("-seed")
        groups.setdefault(name, {})[seed] = variant["pruned"]
    return groups


def _differences(theirs: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> list[float]:
    """Top-1 of the one less that of the other in points, for each seed that both have."""
    return [100 * (theirs[seed]["top1"] - own["top1"]) for seed, own in ours.items() if seed in theirs]


def _with_interval(differences: list[float]) -> str:
    """Their mean and its 95 % interval."""
    if not differences:
        return ""
    low, high = interval(differences)
    known = f" ({low:+.2f} to {high:+.2f})" if low is not None and high is not None else ""
    return f"{statistics.fmean(differences):+.2f}{known}"


def _percents(by_seed: dict[str, dict[str, Any]], key: str) -> str:
    return _percent([figures[key] for figures in by_seed.values()], 2)


def _percent(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.{digits}f}{deviation}"


def _row(name: str, by_seed: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]]) -> str:
    found = list(by_seed.values())
    pairs = _differences(by_seed, reference)
    cells = [
        name,
        str(len(found)) if any(by_seed) else "",
        *(_percents(by_seed, key) for key in ("top1", "top5")),
        human(found[0]["params"]),
        human(found[0]["macs"]),
    ]
    for batch in found[0]["latency_ms"]:
        cells.append(f"{statistics.fmean(figures['latency_ms'][batch]['p50'] for figures in found):.2f}")
    return f"| {' | '.join([*cells, '' if by_seed == reference else _with_interval(pairs)])} |"


def _latency_budget(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "latency_budget" not in content:
        return []
    answer, off = content["latency_budget"]["answer"], content["latency_budget"]["off"]
    measured = f"{off['ratio']:.1%} (median), {off['worst']:.1%} (worst)"
    return [
        ("a budget of latency answered, ResNet-20", f"{answer['seconds']:.0f} s", "at most 120 s"),
        ("the network's latency, measured anew, off its budget by", measured, "at most 3 %"),
    ]


def _speed(content: dict[str, Any]) -> str:
    finetuning, device = content["finetuning"], content["batches"]["machine"]
    rows = [
        ("a batch, as a share of a ResNet-20 training step", f"{content['batches']['ratio']:.1%}", "at most 5 %"),
        (
            "a step of the knockoff phase against a training step, ResNet-20, batch 256",
            f"{content['knockoff_step']['fisher']['ratio']:.2f}x",
            "at most 1.4x",
        ),
        ("the same, `score: published`", f"{content['knockoff_step']['published']['ratio']:.2f}x", "at most 1.4x"),
        (
            "training throughput of ResNet-56 pruned at 0.45 against dense, `scatter`",
            f"{(scattered := finetuning['scatter']['ratio']):.2f}x",
            "at least 1.4x" + (": missed, [why](../README.md#the-three-residual-rules)" if scattered < 1.4 else ""),
        ),
        (
            "the same, `scatter`, widths a multiple of 8",
            f"{finetuning['scatter rounded to 8']['ratio']:.2f}x",
            "",
        ),
        (
            "the same, `coupled`, widths a multiple of 8",
            f"{finetuning['coupled']['ratio']:.2f}x",
            "at least 1.8x",
        ),
        *_latency_budget(content),
        ("`scop --help`", f"{content['help']['seconds']:.2f} s", "at most 0.5 s"),
        ("a step's own overhead, with tracking", f"{content['step_overhead']['seconds']:.1f} s", "at most 8 s"),
        (
            "60,000 JPEG files of a .tar.gz decoded and packed",
            f"{content['archive']['seconds']:.0f} s",
            "at most 60 s",
        ),
        ("a GiB to S3, against `rclone copy`", f"{content['s3']['up']['ratio']:.1f}x", "at least 0.8x"),
        ("a GiB from S3, verified, against `rclone copy`", f"{content['s3']['down']['ratio']:.1f}x", "at least 0.8x"),
        *(
            (
                f"`scop compare` of an experiment of {count}, MLflow server with four workers",
                f"{figures['seconds']:.1f} s",
                f"at most {figures['at_most']:.0f} s",
            )
            for count, figures in content["compare"].items()
            if count.endswith(" runs")
        ),
        ("`make run` after set-up", f"{content['default_run']['seconds']:.0f} s", "at most 240 s"),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""## Speed

| what | measured | bound |
| --- | --- | --- |
{table}

Command: `make bench`. Machine: {device["device"]}, Python {device["python"]}, torch {device["torch"]},
{device["date"]}.
"""


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    PAGE.write_text(render())
