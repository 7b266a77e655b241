"""`scop compare`: the variants of runs side by side, from the artifacts that their steps left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.runs import CONFIG, find_run, records_of
from scop import storage
from scop.config import Config
from scop.errors import UserError
from scop.parsing import parse
from scop.report import VariantResult, write_report
from scop.steps.compare import read_results
from scop.steps.record import StepRecord

# The steps of a variant, by the last of which it is told how far it came.
_OF_A_VARIANT = ("select_channels", "finetune", "evaluate", "export")


@dataclass(frozen=True)
class Comparison:
    """What is known of the variants of some runs.

    Attributes:
        title: names the runs.
        results: of the variants that are whole.
        missing: why the others are not, by variant.
        scores: layer -> {"gate": [...], "score": [...]}; empty where the knockoff phase's are not there.
    """

    title: str
    results: list[VariantResult]
    missing: dict[str, str]
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """As `summary.json` of a run, with what is missing."""
        return {"run_id": self.title, "variants": [r.summary() for r in self.results], "missing": self.missing}

    def write_page(self, path: Path) -> None:
        """Write the page; raises UserError where that cannot be done."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_report(self.results, self.scores, path, f"Pruning run {self.title}", self.missing)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error


def compare(runs: Sequence[str], root: str) -> Comparison:
    """Bring the variants of runs together; of one that several runs have, the last whole result counts.

    Args:
        runs: names, folders or URIs.
        root: where runs are, for those that are given by name.

    Raises:
        UserError: a run is not there, or no variant of any is whole.
    """
    places = [find_run(run, root) for run in runs]
    results: dict[str, VariantResult] = {}
    missing: dict[str, str] = {}
    scores: Mapping[str, Any] = {}
    for place in places:
        records = records_of(place)
        whole, lacking = _variants_of(place, records)
        results |= whole
        missing = {name: why for name, why in (missing | lacking).items() if name not in results}
        scores = _scores(records) or scores
    title = ", ".join(place.rpartition("/")[2] for place in places)
    if not results:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "no step has a record"
        raise UserError(f"no variant of {title} is whole, so there is nothing to compare ({reasons})")
    return Comparison(title, list(results.values()), missing, scores)


def _variants_of(place: str, records: Sequence[StepRecord]) -> tuple[dict[str, VariantResult], dict[str, str]]:
    """The results of a run's whole variants, and what the others lack.

    A step that KFP took from its cache has no record in this run. What `compare` was given tells of all variants.
    """
    given = next((record for record in reversed(records) if record.step == "compare"), None)
    if given is not None:
        evaluations, exports = (_places(given, name) for name in ("evaluations", "exports"))
    else:
        evaluations, exports = (_made(records, step) for step in ("evaluate", "export"))
        both = evaluations.keys() & exports.keys()
        evaluations, exports = ({k: v for k, v in found.items() if k in both} for found in (evaluations, exports))
    whole: dict[str, VariantResult] = {}
    broken: dict[str, str] = {}
    for name, evaluation in evaluations.items():
        try:
            folders = storage.local_folder(evaluation, "evaluation"), storage.local_folder(exports[name], "model")
            (result,) = read_results([folders[0]], [(folders[1], exports[name])])
            whole[result.name] = result
        except UserError as error:  # a pod that was killed while its artifact was uploaded
            broken[name] = str(error)
    begun = dict.fromkeys(record.variant for record in records if record.variant is not None)
    wanted = dict.fromkeys([*_configured(place), *begun])
    return whole, {name: broken.get(name) or _reason(name, records) for name in wanted if name not in whole}


def _places(record: StepRecord, name: str) -> dict[str, str]:
    """An input's places, numbered."""
    uri = record.inputs[name].uri
    return {str(number): place for number, place in enumerate([uri] if isinstance(uri, str) else uri)}


def _made(records: Sequence[StepRecord], step: str) -> dict[str, str]:
    """The places of what a step has made, by variant."""
    done = [record for record in records if record.step == step and record.status == "done"]
    return {str(record.variant): next(iter(record.outputs.values())).uri for record in done}


def _configured(place: str) -> list[str]:
    """The labels of the variants that the run was to have, where its configuration is there."""
    content = storage.read(storage.join(place, CONFIG), must_exist=False)
    return [] if content is None else [v.label for v in parse(Config, yaml.safe_load(content)).variants]


def _reason(variant: str, records: Sequence[StepRecord]) -> str:
    own = {record.step: record for record in records if record.variant == variant}
    for step in reversed(_OF_A_VARIANT):
        if (record := own.get(step)) is None:
            continue
        if record.status == "done":
            return f"nothing came after {step}"
        return f"{step} {record.status}" + (f": {record.error}" if record.error else "")
    return "this run has no record of it: it was not begun, or an earlier run's result was taken, which then name too"


def _scores(records: Sequence[StepRecord]) -> Mapping[str, Any]:
    """Those of the knockoff phase, from where the run's steps had them."""
    uris = [next(iter(r.outputs.values())).uri for r in records if r.step == "train_knockoff" and r.status == "done"]
    uris += [str(r.inputs["scores"].uri) for r in records if "scores" in r.inputs]
    for uri in uris:
        try:
            content = (storage.local_folder(uri, "scores") / "scores.json").read_text()
        except (UserError, OSError):
            continue
        scores: Mapping[str, Any] = json.loads(content)
        return scores
    return {}
