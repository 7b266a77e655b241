"""Step 8: bring all variants together: summary.json and report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.config.parsing import Section
from scop.errors import UserError
from scop.report.page import Page
from scop.report.results import VariantResult, with_timings
from scop.runtime.places import exchanged
from scop.runtime.record import RUN_VARIABLE
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.storage.files import join
from scop.storage.manifest import TIMINGS, write_manifest
from scop.system.cost import Spent

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""layer -> what scores.json has of it: ``gate`` and ``score``, of each channel."""


class Config(Section):
    pass


@dataclass(frozen=True)
class Inputs:
    scores: Path
    evaluations: list[Path]
    exports: list[Path]


@dataclass(frozen=True)
class Outputs:
    report: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    exports = list(zip(inputs.exports, context.places["exports"], strict=True))
    evaluations = list(zip(inputs.evaluations, context.places["evaluations"], strict=True))
    results = read_results(evaluations, exports)
    run_id = os.environ.get(RUN_VARIABLE, "run")
    summary = {"run_id": run_id, "variants": [result.summary() for result in results]}
    (outputs.report / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    scores = json.loads((inputs.scores / "scores.json").read_text())
    page_of(results, [scores] * len(results), f"Pruning run {run_id}").write(outputs.report / "report.html")
    write_manifest(outputs.report, kind="report")
    for name in ("summary.json", "report.html"):
        context.tracker.log_file(outputs.report / name)
    return StepResult(headline(summary))


def page_of(
    results: Sequence[VariantResult],
    scores: Sequence[Scores],
    title: str,
    missing: Mapping[str, str] | None = None,
    spent: Sequence[Spent] = (),
) -> Page:
    """The page of some variants, with all that is known of each; scores of the run of each."""
    first = results[0].evaluation
    layers = [{layer: entry["score"] for layer, entry in own.items()} for own in scores]
    return Page(
        title=title,
        results=[result.result for result in results],
        details={number: {**result.evaluation, "scores": layers[number]} for number, result in enumerate(results)},
        missing=missing or {},
        spent=spent,
        facts=[f"{first['dataset']['test']:,} test images; latency in float32, {first['threads']} threads."],
    )


def read_results(evaluations: Sequence[tuple[Path, str]], exports: Sequence[tuple[Path, str]]) -> list[VariantResult]:
    """What the artifacts say of each variant.

    Args:
        evaluations: folders of step evaluate, each with the place by which others know it.
        exports: folders of step export, each with the place by which others know it.

    Raises:
        UserError: a variant was evaluated but not exported.
    """
    exported = {}
    for folder, place in exports:
        report = json.loads((folder / "export.json").read_text())
        exported[report["variant"]] = report | {"model": place, "onnx": join(place, "model.onnx")}
    results = []
    for folder, place in evaluations:
        evaluation = _evaluation(folder)
        if (variant := evaluation["variant"]) not in exported:
            raise UserError(f"variant {variant!r} was evaluated but not exported; give its export too")
        results.append(VariantResult(evaluation, exported[variant], exchanged(place)))
    return results


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The figures of a summary by which runs are compared."""
    variants = summary["variants"]
    metrics = {"variants": float(len(variants)), "dense/top1": variants[0]["dense"]["top1"]}
    for variant in variants:
        metrics |= {f"{variant['name']}/{key}": float(variant["pruned"][key]) for key in ("top1", "params", "macs")}
    return metrics


def _evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json, with each network's latency, which lies apart, put in."""
    timings = json.loads((folder / TIMINGS).read_text())
    return with_timings(json.loads((folder / "evaluation.json").read_text()), timings)
