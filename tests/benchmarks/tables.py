"""`make results`: insert the measured results into docs/results.md and docs/experiments.md.

The documents are written by hand. Between these markers, the script replaces a whole table, a cell, or the mean in a
cell, which is the cell up to its deviation or interval:

    <!-- table: NAME -->...<!-- end -->
    <!-- cell: NAME / ROW / COLUMN -->...<!-- end -->
    <!-- mean: NAME / ROW / COLUMN -->...<!-- end -->

    python -m tests.benchmarks.tables add NAME runs/RUN "COMMAND"

first stores a finished run as NAME.json: its figures, its configuration, the machine and the command.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.runs import records_of
from tests.benchmarks import accuracy_tables
from tests.benchmarks.bounds import figures
from tests.benchmarks.cells import Table, cell_of, markdown, percent
from tests.benchmarks.measure import RESULTS, machine
from tests.helpers import ROOT

DOCUMENTS = [ROOT / "docs" / name for name in ("results.md", "experiments.md")]
MARKER = re.compile(r"<!-- (table|cell|mean): (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def render(text: str, tables: dict[str, Table]) -> str:
    """Return a document with the text between all markers replaced.

    Raises:
        KeyError: a marker names a table, row or column that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if kind == "table":
            content = f"\n\n{markdown(tables[name])}\n\n"
        else:
            table, row, heading = name.split(" / ")
            content = cell_of(tables[table], row, heading)
            if kind == "mean":
                content = re.split(r" [±(]", content)[0]
        return f"<!-- {kind}: {name} -->{content}<!-- end -->"

    return MARKER.sub(replace, text)


def make_tables(folder: Path = RESULTS) -> dict[str, Table]:
    """Return all tables by name."""
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    accuracy = [content for stem, content in contents.items() if stem.startswith("accuracy-")]
    tables = {
        "targets": accuracy_tables.targets(accuracy),
        "accuracy": accuracy_tables.accuracy(accuracy),
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
    rows = []
    for name, found in content["sources"].items():
        quality, row = found["quality"], {"source": name}
        for what, swap in (("all", "swap_all"), ("components", "swap_half"), ("pixels", "swap_pixels")):
            row[f"p, {what}"] = f"{quality[swap]['p']:.3f}"
        row["correlation"] = f"{quality['correlation']:.3f} ({quality['correlation_expected']:.3f})"
        agreement = f"{quality['label_agreement']:.1%} ({quality['label_agreement_expected']:.1%}"
        row["label"] = f"{agreement}, p = {quality['label_p']:.3f})"
        row |= {"beat": f"{found['beat_their_knockoffs']:.0%}", "beaten": f"{found['are_beaten']:.0%}"}
        for rate, kept in found["kept_at_fdr"].items():
            row[f"fdr {rate}"] = f"{kept:.0%}" if kept else "none"
        rows.append(row)
    return rows


def _scores(content: dict[str, Any]) -> Table:
    rates = next(iter(content["ways"].values()))["top1"]
    none = {"seeds": 1, "top1": {rate: [content["dense_top1"]] for rate in rates}}
    rows = []
    for way, found in {"none": none, **content["ways"]}.items():
        row = {"score": way, "seeds": str(found["seeds"])}
        row |= {f"rate {rate}": percent(values) for rate, values in found["top1"].items()}
        for heading, key in _CORRELATIONS.items():
            row[heading] = "" if found.get(key) is None else f"{found[key]:.2f}"
        rows.append(row)
    return rows


_CORRELATIONS = {"correlation with removal": "rank_correlation_with_removal", "between seeds": "agreement_of_seeds"}


def _saturation(content: dict[str, Any]) -> Table:
    return [
        {
            "steps": str(content["steps"] * number),
            "mean gate": f"{step['mean_gate']:.2f}",
            "open": f"{step['open']:.0%}",
            "closed": f"{step['closed']:.0%}",
            "correlation with gamma": f"{step['correlation_with_gamma']:.2f}",
        }
        for number, step in enumerate(content["passes"], 1)
    ]


_SPEED = {
    "batches": ("loading a batch, share of a ResNet-20 training step", 1, "%"),
    "knockoff_step fisher": ("knockoff step against a training step, ResNet-20, batch 256", 2, "x"),
    "knockoff_step published": ("the same with `score: published`", 2, "x"),
    "finetuning scatter": ("training throughput of ResNet-56 at rate 0.45 against dense, `scatter`", 2, "x"),
    "finetuning scatter rounded to 8": ("the same with `round_to: 8`", 2, "x"),
    "finetuning coupled": ("the same with `coupled` and `round_to: 8`", 2, "x"),
    "narrow_batch_norm scatter": (
        "training step of pruned ResNet-20, PyTorch's batch norms against folded ones",
        2,
        "x",
    ),
    "narrow_batch_norm inner": ("the same with `inner`", 2, "x"),
    "narrow_batch_norm coupled": ("the same with `coupled`", 2, "x"),
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
    found, rows = figures(content), []
    for name, (label, digits, unit) in _SPEED.items():
        figure, scale = found[name], 100 if unit == "%" else 1
        measured = f"{scale * figure.value:.{digits}f}{unit}"
        if figure.worst is not None:
            measured += f" (worst: {scale * figure.worst:.{digits}f}{unit})"
        bound = f"{figure.limit} {scale * figure.bound:g}{unit}"
        rows.append({"figure": label, "measured": measured, "bound": bound, "met": "yes" if figure.met else "no"})
    return rows


def _commands(contents: dict[str, dict[str, Any]]) -> Table:
    """For each file of results: the command, with its commit if it was replaced, and where and when it ran."""
    rows = []
    for stem, content in contents.items():
        command = f"`{content.get('command', 'make bench')}`"
        row = {"file": f"[{stem}](../tests/benchmarks/results/{stem}.json)"}
        row["command"] = f"{command} at {content['commit']}" if "commit" in content else command
        machines = list(_machines(content))
        for key, heading in _MACHINE.items():
            row[heading] = ", ".join(dict.fromkeys(str(machine[key]) for machine in machines))
        rows.append(row)
    return rows


_MACHINE = {"device": "machine", "python": "Python", "torch": "PyTorch", "revision": "revision", "date": "date"}


def _machines(content: Any) -> Iterator[dict[str, Any]]:
    """Yield all entries `machine` of nested results."""
    if isinstance(content, dict) and "machine" in content:
        yield content["machine"]
    if isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _machines(entry)


def add(name: str, folder: Path, command: str) -> None:
    """Store a finished run with the results."""
    summary, first = json.loads((folder / "summary.json").read_text()), records_of(str(folder))[0]
    # A run stores absolute paths; they are relative to the project again, as in its configuration.
    config = (folder / "config.yaml").read_text().replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")
    content = {
        "command": command,
        "machine": machine() | {"revision": first.software.revision, "date": str(first.started)[:10]},
        "config": yaml.safe_load(config),
        "seconds": summary["seconds"],
        "variants": list(_figures(summary["variants"], folder)),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _figures(variants: list[dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each variant's figures, with the correctness of each answer and the speedup at the largest batch size.

    A variant NAME-before is NAME without fine-tuning: its top-1 becomes the entry `before` of NAME.
    """
    before = {v["name"].replace("-before", ""): v["pruned"]["top1"] for v in variants if "-before" in v["name"]}
    for variant in (variant for variant in variants if "-before" not in variant["name"]):
        evaluation = json.loads((folder / variant["name"] / "evaluate/evaluation/evaluation.json").read_text())
        networks = {key: variant[key] | {"right": evaluation[key]["right"]} for key in ("dense", "pruned")}
        dense, pruned = (list(network["latency_ms"].values())[-1]["p50"] for network in networks.values())
        row = {key: variant[key] for key in ("name", "method", "prune_rate")} | networks
        row |= {"exactness": variant["exactness"], "speedup": dense / pruned}
        yield row | ({"before": before[variant["name"]]} if variant["name"] in before else {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["add"]:
        add(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    for document in DOCUMENTS:
        document.write_text(render(document.read_text(), make_tables()))
