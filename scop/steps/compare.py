"""Step 8: bring all variants together: summary.json and report.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scop.config import Section
from scop.errors import UserError
from scop.manifest import write_manifest
from scop.report import VariantResult, write_report
from scop.steps.runtime import RUN_VARIABLE, Context, StepResult


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
    import os

    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in inputs.evaluations]
    exports = {
        report["variant"]: report
        for report in (json.loads((folder / "export.json").read_text()) for folder in inputs.exports)
    }
    for evaluation in evaluations:
        if evaluation["variant"] not in exports:
            raise UserError(f"variant {evaluation['variant']!r} was evaluated but not exported; give its export too")
    results = [VariantResult(evaluation, exports[evaluation["variant"]]) for evaluation in evaluations]
    run_id = os.environ.get(RUN_VARIABLE, "run")
    summary = {"run_id": run_id, "variants": [result.summary() for result in results]}
    (outputs.report / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    scores = json.loads((inputs.scores / "scores.json").read_text())
    write_report(results, scores, outputs.report / "report.html", f"Pruning run {run_id}")
    write_manifest(outputs.report, kind="report")
    for name in ("summary.json", "report.html"):
        context.tracker.log_file(outputs.report / name)
    return StepResult({"variants": float(len(results))})
