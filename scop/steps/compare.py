"""Step 8: compare all variants in summary.json and report.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from scop.config.parsing import Section
from scop.report.summary import headline, page_of, read_results
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.runtime.uris import shared_uri
from scop.storage.manifest import write_manifest


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
    evaluations = list(zip(inputs.evaluations, map(shared_uri, context.input_uris["evaluations"]), strict=True))
    exports = list(zip(inputs.exports, context.input_uris["exports"], strict=True))
    results = read_results(evaluations, exports)
    run_id = context.environment.run_id or "run"
    summary = {"run_id": run_id, "variants": [result.summary() for result in results]}
    (outputs.report / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    scores = json.loads((inputs.scores / "scores.json").read_text())
    page_of(results, [scores] * len(results), f"Pruning run {run_id}").write(outputs.report / "report.html")
    write_manifest(outputs.report, kind="report")
    for name in ("summary.json", "report.html"):
        context.tracker.log_file(outputs.report / name)
    return StepResult(headline(summary))
