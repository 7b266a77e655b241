"""`make results`: docs/results.md, made from the JSON files in tests/benchmarks/results.

    python -m tests.benchmarks.tables add NAME runs/RUN "COMMAND" "DATA"

takes a finished run in: its summary, its configuration and the machine; DATA is what the tables call its images.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.accuracy_tables import (
    LESS,
    WAYS,
    accuracy_section,
    figures_section,
    recovery_section,
    run_section,
    variants_section,
)
from tests.benchmarks.cells import group_by_seed, percent, provenance
from tests.benchmarks.measure import machine, settings_hash
from tests.benchmarks.remedies import REMEDIES
from tests.benchmarks.scores import SETTINGS

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
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
                sections[kind].append(accuracy_section(content))
            case "variants":
                sections[kind].append(variants_section(content))
            case "recovery":
                sections[kind].append(recovery_section(content))
            case "quality":
                sections[kind].append(_quality(content))
            case "scores":
                sections[kind].append(_scores(name, content))
            case "speed":
                sections[kind].append(_speed(content))
            case _:
                sections["run"].append(run_section(path.stem, content))
    tables = (section for kind in sections.values() for section in kind)
    return "\n".join([_INTRODUCTION, figures_section(FOLDER), *tables, _failures()])


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

{provenance(content["command"], content["sources"].values())}
"""


def _scores(network: str, content: dict[str, Any]) -> str:
    ways = content["ways"]
    rates = list(next(iter(ways.values()))["top1"])
    rows = []
    for way, figures in ways.items():
        cells = [_labelled(way, figures), str(figures["seeds"])]
        cells += [percent(figures["top1"][rate]) for rate in rates]
        for key in ("rank_correlation_with_removal", "agreement_of_seeds"):
            cells.append("" if figures.get(key) is None else f"{figures[key]:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    trained = ", and was trained on them" if network == "resnet20" else ""
    return f"""## Scores: {network}, CIFAR-10 (JPEG q75)

What a score knows before any fine-tuning: top-1 on 5,000 images of the validation split after surgery (rule scatter,
the same rate in each layer) and recalibration of the batch norms, mean and standard deviation over seeds. The dense
network has {content["dense_top1"]:.1%} there{trained}. Then the rank correlation with what a channel is worth by
itself (the loss that its removal costs), and between seeds. `fisher` sees 10,240 images once, half of them for the
scores and half for W; `published` and its remedies see them four times. What it all means says
[knockoffs.md](knockoffs.md).

| score | seeds | {" | ".join(f"rate {rate}" for rate in rates)} | correlation | seeds agree |
| --- | --- | {"--- | " * len(rates)}--- | --- |
{chr(10).join(rows)}

{provenance(content["command"], ways.values())}
{_saturation(content["saturation"]) if "saturation" in content else ""}"""


def _labelled(way: str, figures: dict[str, Any]) -> str:
    """What most rows are from needs no word; what was measured elsewhere does."""
    return f"{way} (on a GPU)" if figures["machine"]["device"].startswith("NVIDIA") else way


def _saturation(content: dict[str, Any]) -> str:
    """How the published score loses what it might have known."""
    rows = [
        f"| {content['steps'] * number} | {step['mean_gate']:.2f} | {step['open']:.0%} | {step['closed']:.0%} "
        f"| {step['correlation_with_gamma']:.2f} |"
        for number, step in enumerate(content["passes"], 1)
    ]
    return f"""
### The published score's gates while they are trained

From 0.5, with frozen batch norms, seed {content["seed"]}. A gate of {content["open"]} and more is open, one of
{1 - content["open"]:.2f} and less closed; the last column is the rank correlation of the score with the batch norms'
weights alone, in the mean over layers.

| steps | mean gate | open | closed | correlation |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{provenance('make bench-scores ARGS="resnet20 saturation"', [content])}
"""


def _failures() -> str:
    """What was tried and is behind the default, and where the default is not ahead, from the tables above."""
    rows, others = [], []
    for path in sorted(FOLDER.glob("scores-*.json")):
        ways = json.loads(path.read_text())["ways"]
        for (way, figures), rate in product(ways.items(), ways["fisher"]["top1"]):
            own, best = figures["top1"][rate], ways["fisher"]["top1"][rate]
            row = [
                f"score: {_labelled(way, figures)}",
                f"{path.stem.partition('-')[2]}, rate {rate}",
                percent(own),
                percent(best),
            ]
            if statistics.fmean(own) >= statistics.fmean(best):
                others += [row] if way != "fisher" else []
            elif way in (*SETTINGS, *REMEDIES) and rate == "0.45":
                rows.append(row)
    path = FOLDER / "recovery-resnet20.json"
    ways = group_by_seed(json.loads(path.read_text())["variants"]) if path.exists() else {}
    usual = [figures["top1"] for figures in ways.get("usual", {}).values()]
    for way, found in ways.items():
        own = [figures["top1"] for figures in found.values()]
        row = [WAYS[way], "resnet20, short fine-tuning", percent(own, 2), percent(usual, 2)]
        if way in LESS and statistics.fmean(own) >= statistics.fmean(usual):
            others.append(row)
        elif way != "none" and statistics.fmean(own) < statistics.fmean(usual):
            rows.append(row)
    return f"""## What is behind the default

Ways of scoring whose mean is below the default's in the tables above, and ways of fine-tuning below `usual`, the second
row of their table; the standard deviations say which of them might be as good. What was only sketched is told in
[knockoffs.md](knockoffs.md).

| way | where | top-1 | instead of |
| --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}

And where the default is not ahead: scores whose mean is not below its own, controls among them, and what fine-tuning
can do without.

| way | where | top-1 | the default |
| --- | --- | --- | --- |
{chr(10).join(f"| {' | '.join(row)} |" for row in others)}
"""


def _latency_budget(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "latency_budget" not in content:
        return []
    answer, off = content["latency_budget"]["answer"], content["latency_budget"]["off"]
    measured = f"{off['ratio']:.1%} (median), {off['worst']:.1%} (worst)"
    missed = ": missed by the worst" if off["worst"] > 0.03 else ""
    return [
        ("a budget of latency answered, ResNet-20", f"{answer['seconds']:.0f} s", "at most 120 s"),
        ("the network's latency, measured anew, off its budget by", measured, f"at most 3 %{missed}"),
    ]


def _speed(content: dict[str, Any]) -> str:
    finetuning = content["finetuning"]
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

{provenance("make bench", _measured(content))}
"""


def _measured(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What has a machine that it was measured on, however deep."""
    for entry in (entry for entry in content.values() if isinstance(entry, dict)):
        if "machine" in entry:
            yield entry
        yield from _measured(entry)


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    PAGE.write_text(render())
