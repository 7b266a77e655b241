"""Comparing results: of runs, from the artifacts of their steps, and of experiments, from MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.compare.experiments import Memory, Mlflow, Source
from pipelines.runs import CONFIG, find_run, records_of
from scop.config import Config, finetune_for
from scop.config.parsing import parse
from scop.errors import UserError
from scop.report.page import Page
from scop.report.results import Result, VariantResult
from scop.report.summary import Scores, page_of, read_results
from scop.runtime.exit_codes import Status
from scop.runtime.record import StepRecord
from scop.runtime.registry import VARIANT_STEPS
from scop.runtime.uris import shared_uri
from scop.storage.cache import Cache
from scop.storage.files import is_s3, join_uri, read_if_exists
from scop.storage.folders import local_folder
from scop.system.cost import Spent, total

_WITH_DETAILS = 12
"""Number of results of an experiment that the page shows with curves, layers and confusion; each is a download."""
_Identity = tuple[str, tuple[int, ...] | None]
"""A variant's name and its seeds; None if the seeds are unknown."""


@dataclass(frozen=True)
class Comparison:
    """The results of some runs or experiments.

    Attributes:
        title: names of the runs or experiments.
        page: page with all results.
        missing: reason for each missing result, by name.
        summary: like a run's `summary.json`, with the missing results; None for experiments.
        spent: cost by device.
        unread: reasons why the page lacks curves and layers of some results.
    """

    title: str
    page: Page
    missing: dict[str, str]
    summary: dict[str, Any] | None = None
    spent: list[Spent] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def results(self) -> Sequence[Result]:
        """Results of all measured networks."""
        return self.page.results


def compare(
    targets: Sequence[str], source: Source, cache: Cache, where: str | None = None, details: bool = False
) -> Comparison:
    """Compare runs, or experiments.

    Args:
        targets: runs, by name, folder or URI; or names of MLflow experiments; by default all experiments.
        source: location of the runs and of MLflow.
        cache: local cache of files fetched from S3.
        where: filter for results of experiments, in MLflow's filter language.
        details: whether to fetch curves and layers of the best results of experiments for the page.

    Raises:
        UserError: a target is neither a run nor an experiment, or no target has a complete result.
    """
    uris = {target: _run_uri(target, source.runs) for target in targets}
    if runs := {target: uri for target, uri in uris.items() if uri is not None}:
        if where:
            raise UserError(f"--where selects from experiments in MLflow, and {next(iter(runs))!r} is a run")
        if others := [target for target in targets if target not in runs]:
            raise UserError(
                f"{next(iter(runs))!r} is a run and {others[0]!r} is not; compare runs with runs, or experiments with "
                "experiments"
            )
        return compare_runs(list(runs.values()), cache)
    memory = _experiments(targets, source, where)
    title = ", ".join(targets) or "all experiments"
    if not memory.results:
        some = "; ".join(f"{failure.name}: {failure.error}" for failure in memory.failures[:3])
        reasons = some or ("no result matches --where" if where else "no network was measured")
        raise UserError(f"{title}: there is nothing to compare ({reasons})")
    missing = {f"{failure.name} (run {failure.run})": failure.error for failure in memory.failures}
    found, unread = _details(memory.results, source) if details else ({}, [])
    page = Page(f"Experiments: {title}", memory.results, found, missing=missing, spent=memory.spent)
    return Comparison(title, page, missing, spent=memory.spent, unread=unread)


def _run_uri(target: str, root: str) -> str | None:
    try:
        return find_run(target, root)
    except UserError:
        return None


def _experiments(targets: Sequence[str], source: Source, where: str | None) -> Memory:
    for target in targets:
        if is_s3(target):
            find_run(target, source.runs)  # raises UserError, since a URI is never an experiment
    return Mlflow(source).read(targets, where)


def _details(results: Sequence[Result], source: Source) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the evaluations of the best results by index, and the reasons why others could not be read."""
    client = Mlflow(source)
    best = sorted(range(len(results)), key=lambda n: -results[n].metrics.get("pruned_top1", 0.0))[:_WITH_DETAILS]
    found: dict[int, dict[str, Any]] = {}
    reasons: dict[str, int] = {}
    for number in best:
        try:
            found[number] = client.details(results[number])
        except UserError as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
    unread = [f"curves and layers of {count} of {len(best)} networks: {reason}" for reason, count in reasons.items()]
    return found, unread


# -- runs --------------------------------------------------------------------------------------------------------------


def compare_runs(uris: Sequence[str], cache: Cache) -> Comparison:
    """Compare the variants of runs; a result that several runs share through KFP's cache counts once.

    Args:
        uris: folders or ``s3://`` URIs of the runs.
        cache: local cache of files fetched from S3.

    Raises:
        UserError: no run has a complete variant.
    """
    results: dict[str | None, tuple[VariantResult, Scores]] = {}
    made: list[_Identity] = []
    lacking: list[tuple[_Identity, str, str]] = []
    started: list[StepRecord] = []
    for uri in uris:
        records = records_of(uri)
        started += records
        config = _configuration(uri)
        complete, incomplete = _variants_of(records, config, cache)
        scores = _scores(records, cache)
        results |= {result.uri: (result, scores) for result in complete.values() if result.uri not in results}
        made += [_identity(name, config) for name in complete]
        lacking += [(_identity(name, config), uri.rpartition("/")[2], why) for name, why in incomplete.items()]
    missed = [entry for entry in lacking if not any(_is_replaced(entry[0], other) for other in made)]
    known = [name for name, _ in {*made, *(identity for identity, _, _ in missed)}]
    missing = {
        f"{identity[0]} of {run}" if known.count(identity[0]) > 1 else identity[0]: why for identity, run, why in missed
    }
    title = ", ".join(uri.rpartition("/")[2] for uri in uris)
    if not results:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "no step has a record"
        raise UserError(f"no variant of {title} is complete, so there is nothing to compare ({reasons})")
    found, scored = zip(*results.values(), strict=True)
    summary = {"run_id": title, "variants": [result.summary() for result in found], "missing": missing}
    spent = _spent(started)
    sums = total(spent, f"{len(uris)} run{'s' * (len(uris) != 1)}")
    page = page_of(found, scored, f"Pruning run {title}", missing, [*spent, *total(spent, "all steps, last attempts")])
    return Comparison(title, page, missing, summary, sums)


def _spent(records: Sequence[StepRecord]) -> list[Spent]:
    """Return the cost of each step's last attempt."""
    costs = [(record.title, record.cost) for record in records if record.cost is not None]
    return [Spent(title, cost.device, cost.device_seconds, cost.energy_joules) for title, cost in costs]


def _identity(name: str, config: Config | None) -> _Identity:
    """Return the name of a variant and its seeds in a run, if known."""
    variant = next((variant for variant in config.variants if variant.label == name), None) if config else None
    if config is None or variant is None:
        return name, None
    return name, (config.dense.seed, config.knockoff.seed, variant.seed, finetune_for(config.finetune, variant).seed)


def _is_replaced(lacking: _Identity, made: _Identity) -> bool:
    """Whether another run completed the missing variant of a run, with the same seeds."""
    return lacking[0] == made[0] and (None in (lacking[1], made[1]) or lacking[1] == made[1])


def _variants_of(
    records: Sequence[StepRecord], config: Config | None, cache: Cache
) -> tuple[dict[str, VariantResult], dict[str, str]]:
    """Return the results of the complete variants of a run, and the reasons why others are missing.

    A step whose result came from KFP's cache has no record in this run, but it is among the inputs of step compare.
    """
    evaluations, exports = (_outputs_of(records, step) for step in ("evaluate", "export"))
    owners = {evaluation: name for name, evaluation in evaluations.items()}
    # First the inputs of step compare of an earlier attempt, then the outputs written since.
    given = next((record for record in reversed(records) if record.step == "compare"), None)
    pairs = (
        {} if given is None else dict(zip(*(_input_uris(given, n) for n in ("evaluations", "exports")), strict=True))
    )
    pairs |= {evaluation: exports[name] for name, evaluation in evaluations.items() if name in exports}
    whole: dict[str, VariantResult] = {}
    broken: dict[str | None, str] = {}
    for evaluation, exported in pairs.items():
        try:
            folders = local_folder(evaluation, cache, "evaluation"), local_folder(exported, cache, "model")
            (result,) = read_results([(folders[0], shared_uri(evaluation))], [(folders[1], exported)])
            whole[result.name] = result
        except UserError as error:  # a pod was killed while its artifact was uploaded
            broken[owners.get(evaluation)] = str(error)
    wanted = [] if config is None else [variant.label for variant in config.variants]
    if wanted:
        whole = {name: result for name, result in whole.items() if name in wanted}
    else:
        wanted = list(dict.fromkeys(record.variant for record in records if record.variant is not None))
    return whole, {name: broken.get(name) or _reason(name, records) for name in wanted if name not in whole}


def _input_uris(record: StepRecord, name: str) -> list[str]:
    uri = record.inputs[name].uri
    return [uri] if isinstance(uri, str) else uri


def _outputs_of(records: Sequence[StepRecord], step: str) -> dict[str, str]:
    """Return the URIs of a step's outputs by variant."""
    done = [record for record in records if record.step == step and record.status is Status.DONE]
    return {str(record.variant): next(iter(record.outputs.values())).uri for record in done}


def _configuration(uri: str) -> Config | None:
    """Return a run's configuration, if it has one."""
    content = read_if_exists(join_uri(uri, CONFIG))
    return None if content is None else parse(Config, yaml.safe_load(content))


def _reason(variant: str, records: Sequence[StepRecord]) -> str:
    own = {record.step: record for record in records if record.variant == variant}
    for step in reversed(VARIANT_STEPS):
        if (record := own.get(step)) is None:
            continue
        if record.status is Status.DONE:
            return f"no step started after {step}"
        return f"{step} {record.status}" + (f": {record.error}" if record.error else "")
    return (
        "this run has no record of it: it was not started, or its result came from KFP's cache; then name that run, too"
    )


def _scores(records: Sequence[StepRecord], cache: Cache) -> Scores:
    """Return the scores that the steps of a run have used."""
    scored = [r for r in records if r.step == "train_knockoff" and r.status is Status.DONE]
    uris = [next(iter(record.outputs.values())).uri for record in scored]
    uris += [str(r.inputs["scores"].uri) for r in records if "scores" in r.inputs]
    for uri in uris:
        try:
            content = (local_folder(uri, cache, "scores") / "scores.json").read_text()
        except (UserError, OSError):
            continue
        scores: Scores = json.loads(content)
        return scores
    return {}
