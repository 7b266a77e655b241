"""`make results`: insert the measured results into docs/results.md and docs/experiments.md.

The documents are written by hand. Between these markers, the script replaces a whole table, a cell, or the mean in a
cell, which is the cell up to its deviation or interval:

    <!-- table: NAME -->...<!-- end -->
    <!-- cell: NAME / ROW / COLUMN -->...<!-- end -->
    <!-- mean: NAME / ROW / COLUMN -->...<!-- end -->

    python -m tests.benchmarks.tables add NAME runs/RUN "COMMAND" "DATA"

first stores a finished run as NAME.json: its summary, its configuration, the machine, the command and the data set.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks import accuracy_tables
from tests.benchmarks.cells import Table, percent
from tests.benchmarks.measure import machine, settings_hash

FOLDER = Path(__file__).parent / "results"
DOCUMENTS = [Path(__file__).parents[2] / "docs" / name for name in ("results.md", "experiments.md")]
MARKER = re.compile(r"<!-- (table|cell|mean): (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def render(text: str, tables: dict[str, Table]) -> str:
    """Return a document with the text between all markers replaced.

    Raises:
        KeyError: a marker names a table, row or column that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if kind == "table":
            content = f"\n\n{tables[name].markdown()}\n\n"
        else:
            table, row, heading = name.split(" / ")
            content = tables[table].cell(row, heading)
            if kind == "mean":
                content = re.split(r" [±(]", content)[0]
        return f"<!-- {kind}: {name} -->{content}<!-- end -->"

    return MARKER.sub(replace, text)


def make_tables(folder: Path = FOLDER) -> dict[str, Table]:
    """Return all tables by name."""
    # Contents without variants hold the dense network only.
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    contents = {stem: content for stem, content in contents.items() if content.get("variants") != {}}
    accuracy = [content for stem, content in contents.items() if stem.startswith("accuracy-")]
    tables = {
        "targets": accuracy_tables.targets(folder),
        "accuracy": accuracy_tables.accuracy(sorted(accuracy, key=lambda content: str(content["network"]))),
        "commands": _commands(contents),
    }
    for stem, content in contents.items():
        match stem.partition("-")[0]:
            case "accuracy":
                pass
            case "variants":
                tables["rules"], tables["methods"] = accuracy_tables.rules(content), accuracy_tables.methods(content)
            case "recovery":
                tables["recovery"] = accuracy_tables.recovery(content)
            case "quality":
                tables["quality"] = _quality(content)
            case "scores":
                tables[stem] = _scores(content)
                if "saturation" in content:
                    tables["saturation"] = _saturation(content["saturation"])
            case "speed":
                tables["speed"] = _speed(content)
            case _:
                tables[stem] = accuracy_tables.run(content)
    return tables


def _quality(content: dict[str, Any]) -> Table:
    rows, rates = [], list[str]()
    for name, found in content["sources"].items():
        quality, rates = found["quality"], list(found["kept_at_fdr"])
        row = [name, *(f"{quality[swap]['p']:.3f}" for swap in ("swap_all", "swap_half", "swap_pixels"))]
        row.append(f"{quality['correlation']:.3f} ({quality['correlation_expected']:.3f})")
        agreement = f"{quality['label_agreement']:.1%} ({quality['label_agreement_expected']:.1%}"
        row.append(f"{agreement}, p = {quality['label_p']:.3f})")
        row += [f"{found[key]:.0%}" for key in ("beat_their_knockoffs", "are_beaten")]
        rows.append(row + [f"{kept:.0%}" if kept else "none" for kept in found["kept_at_fdr"].values()])
    headings = ["source", "p, all", "p, components", "p, pixels", "correlation", "label", "beat", "beaten"]
    return Table([*headings, *(f"fdr {rate}" for rate in rates)], rows)


def _scores(content: dict[str, Any]) -> Table:
    rates = list(next(iter(content["ways"].values()))["top1"])
    rows = [["none", "1", *[percent([content["dense_top1"]])] * len(rates), "", ""]]
    for way, figures in content["ways"].items():
        known = [figures.get(key) for key in ("rank_correlation_with_removal", "agreement_of_seeds")]
        numbers = ["" if number is None else f"{number:.2f}" for number in known]
        rows.append([way, str(figures["seeds"]), *(percent(figures["top1"][rate]) for rate in rates), *numbers])
    headings = ["score", "seeds", *(f"rate {rate}" for rate in rates), "correlation with removal", "between seeds"]
    return Table(headings, rows)


def _saturation(content: dict[str, Any]) -> Table:
    rows = [
        [
            str(content["steps"] * number),
            f"{step['mean_gate']:.2f}",
            f"{step['open']:.0%}",
            f"{step['closed']:.0%}",
            f"{step['correlation_with_gamma']:.2f}",
        ]
        for number, step in enumerate(content["passes"], 1)
    ]
    return Table(["steps", "mean gate", "open", "closed", "correlation with gamma"], rows)


_SPEED = {
    "batches": ("loading a batch, share of a ResNet-20 training step", 1, "%"),
    "knockoff_step fisher": ("knockoff step against a training step, ResNet-20, batch 256", 2, "x"),
    "knockoff_step published": ("the same with `score: published`", 2, "x"),
    "finetuning scatter": ("training throughput of ResNet-56 at rate 0.45 against dense, `scatter`", 2, "x"),
    "finetuning scatter rounded to 8": ("the same with `round_to: 8`", 2, "x"),
    "finetuning coupled": ("the same with `coupled` and `round_to: 8`", 2, "x"),
    "latency_budget answer": ("selection under a latency budget, ResNet-20", 0, " s"),
    "latency_budget off": ("deviation from that budget when measured again, median", 1, "%"),
    "help": ("`scop --help`", 2, " s"),
    "step_overhead": ("a step as a process of its own, with tracking", 1, " s"),
    "archive": ("decoding and packing 60,000 JPEG files of a .tar.gz", 0, " s"),
    "s3 up": ("upload of 1 GiB to S3, throughput against `rclone copy`", 1, "x"),
    "s3 down": ("verified download of 1 GiB from S3, throughput against `rclone copy`", 1, "x"),
    "compare 1000 runs": ("`scop compare`, 1,000 runs, MLflow server with 4 workers", 1, " s"),
    "compare 10000 runs": ("`scop compare`, 10,000 runs, MLflow server with 4 workers", 1, " s"),
    "default_run": ("`make run` after setup", 0, " s"),
    "run_overhead run over training": ("default run, time relative to its training", 2, "x"),
    "run_overhead step": ("step `select_channels` within a run, with tracking and plots", 1, " s"),
}
"""Label, digits and unit of each figure of `make bench`, in order."""


def _speed(content: dict[str, Any]) -> Table:
    found, rows = dict(_nested(content)), []
    for name, (label, digits, unit) in _SPEED.items():
        entry, scale = found[name], 100 if unit == "%" else 1
        value = entry["ratio"] if "ratio" in entry else entry["seconds"]
        bound = "at_most" if "at_most" in entry else "at_least"
        measured = f"{scale * value:.{digits}f}{unit}"
        worst = entry.get("worst", value)
        if "worst" in entry:
            measured += f" (worst: {scale * worst:.{digits}f}{unit})"
        met = worst <= entry[bound] if bound == "at_most" else worst >= entry[bound]
        limit = f"{bound.replace('_', ' ')} {scale * entry[bound]:g}{unit}"
        rows.append([label, measured, limit, "yes" if met else "no"])
    return Table(["figure", "measured", "bound", "met"], rows)


def _nested(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all dicts inside a dict, by their keys joined by spaces."""
    for key, entry in content.items():
        if isinstance(entry, dict):
            yield prefix + key, entry
            yield from _nested(entry, f"{prefix}{key} ")


def _commands(contents: dict[str, dict[str, Any]]) -> Table:
    """For each file of results: the command, and where and when it ran."""
    rows = []
    for stem, content in contents.items():
        machines = [entry["machine"] for _, entry in [("", content), *_nested(content)] if "machine" in entry]
        cells = [
            ", ".join(dict.fromkeys(str(machine[key]) for machine in machines))
            for key in ("device", "python", "torch", "revision", "date")
        ]
        file = f"[{stem}](../tests/benchmarks/results/{stem}.json)"
        rows.append([file, f"`{content.get('command', 'make bench')}`", *cells])
    return Table(["file", "command", "machine", "Python", "PyTorch", "revision", "date"], rows)


def add(name: str, folder: Path, command: str, data: str) -> None:
    """Store a finished run with the results."""
    summary = json.loads((folder / "summary.json").read_text())
    for variant in summary["variants"]:
        del variant["model"], variant["onnx"]  # paths on the machine where it ran
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    for document in DOCUMENTS:
        document.write_text(render(document.read_text(), make_tables()))
