"""Step 8: bring all variants together: summary.json and report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.manifest import TIMINGS, write_manifest
from scop.parsing import Section
from scop.report import VariantResult, write_report
from scop.steps.record import RUN_VARIABLE, StepResult
from scop.steps.runtime import Context
from scop.storage import join


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
    results = read_results(inputs.evaluations, exports)
    run_id = os.environ.get(RUN_VARIABLE, "run")
    summary = {"run_id": run_id, "variants": [result.summary() for result in results]}
    (outputs.report / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    scores = json.loads((inputs.scores / "scores.json").read_text())
    write_report(results, scores, outputs.report / "report.html", f"Pruning run {run_id}")
    write_manifest(outputs.report, kind="report")
    for name in ("summary.json", "report.html"):
        context.tracker.log_file(outputs.report / name)
    return StepResult(headline(summary))


def read_results(evaluations: Sequence[Path], exports: Sequence[tuple[Path, str]]) -> list[VariantResult]:
    """What the artifacts say of each variant.

    Args:
        evaluations: folders of step evaluate.
        exports: folders of step export, each with the place by which others know it.

    Raises:
        UserError: a variant was evaluated but not exported.
    """
    exported = {}
    for folder, place in exports:
        report = json.loads((folder / "export.json").read_text())
        exported[report["variant"]] = report | {"model": place, "onnx": join(place, "model.onnx")}
    measured = [_evaluation(folder) for folder in evaluations]
    for evaluation in measured:
        if evaluation["variant"] not in exported:
            raise UserError(f"variant {evaluation['variant']!r} was evaluated but not exported; give its export too")
    return [VariantResult(evaluation, exported[evaluation["variant"]]) for evaluation in measured]


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """The figures of a summary by which runs are compared."""
    variants = summary["variants"]
    metrics = {"variants": float(len(variants)), "dense/top1": variants[0]["dense"]["top1"]}
    for variant in variants:
        metrics |= {f"{variant['name']}/{key}": float(variant["pruned"][key]) for key in ("top1", "params", "macs")}
    return metrics


def _evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json, with each network's latency, which lies apart, put in."""
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    for name, latency in json.loads((folder / TIMINGS).read_text())["latency_ms"].items():
        evaluation[name]["latency_ms"] = latency
    return evaluation
