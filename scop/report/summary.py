"""Results of a run, read from the artifacts of its steps: summary, headline metrics and page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scop.errors import UserError
from scop.report.page import Page
from scop.report.results import VariantResult, with_timings
from scop.storage.files import join_uri
from scop.storage.manifest import TIMINGS
from scop.system.cost import Spent

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""layer -> its entry in scores.json: ``gate`` and ``score``, one value per channel."""


def read_results(evaluations: Sequence[tuple[Path, str]], exports: Sequence[tuple[Path, str]]) -> list[VariantResult]:
    """Read the result of each variant.

    Args:
        evaluations: output folders of step evaluate, each with its URI.
        exports: output folders of step export, each with its URI.

    Raises:
        UserError: a variant was evaluated but not exported.
    """
    exported = {}
    for folder, uri in exports:
        report = json.loads((folder / "export.json").read_text())
        exported[report["variant"]] = report | {"model": uri, "onnx": join_uri(uri, "model.onnx")}
    results = []
    for folder, uri in evaluations:
        evaluation = _read_evaluation(folder)
        if (variant := evaluation["variant"]) not in exported:
            raise UserError(f"variant {variant!r} was evaluated but not exported; add the output of its export step")
        results.append(VariantResult(evaluation, exported[variant], uri))
    return results


def headline(summary: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a summary that are used to compare runs."""
    variants = summary["variants"]
    metrics = {"variants": float(len(variants)), "dense/top1": variants[0]["dense"]["top1"]}
    for variant in variants:
        metrics |= {f"{variant['name']}/{key}": float(variant["pruned"][key]) for key in ("top1", "params", "macs")}
    return metrics


def page_of(
    results: Sequence[VariantResult],
    scores: Sequence[Scores],
    title: str,
    missing: Mapping[str, str] | None = None,
    spent: Sequence[Spent] = (),
) -> Page:
    """Return the page that shows some variants.

    Args:
        results: results of the variants; at least one.
        scores: for each result, the scores of its run.
        title: title of the page.
        missing: name -> reason, for variants without a result.
        spent: cost of the steps.
    """
    first = results[0].evaluation
    layers = [{layer: entry["score"] for layer, entry in own.items()} for own in scores]
    return Page(
        title=title,
        results=[result.result for result in results],
        details={index: {**result.evaluation, "scores": layers[index]} for index, result in enumerate(results)},
        missing=missing or {},
        spent=spent,
        facts=[f"{first['dataset']['test']:,} test images; latency in float32, threads: {first['threads']}."],
    )


def _read_evaluation(folder: Path) -> dict[str, Any]:
    """Read evaluation.json and merge the timings, which are in a file of their own."""
    timings = json.loads((folder / TIMINGS).read_text())
    return with_timings(json.loads((folder / "evaluation.json").read_text()), timings)
