"""`scop compare`: results side by side, of runs by the artifacts that they left, of experiments by MLflow's memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.compare.experiments import Memory, Mlflow
from pipelines.runs import CONFIG, find_run, records_of
from scop.config import Config, finetune_for
from scop.config.parsing import parse
from scop.errors import UserError
from scop.report.page import Page
from scop.report.results import Result, VariantResult
from scop.runtime.record import StepRecord
from scop.steps.compare import Scores, page_of, read_results
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.system.cost import Spent, total

# The steps of a variant, by the last of which it is told how far it came.
_OF_A_VARIANT = ("select_channels", "finetune", "evaluate", "export")
# Of so many results of experiments the page has curves, layers and confusion: each is a file to fetch.
_WITH_DETAILS = 12
_Identity = tuple[str, tuple[int, ...] | None]
"""A variant's name and its seeds; None where those are not known."""


@dataclass(frozen=True)
class Comparison:
    """What is known of some runs, or experiments.

    Attributes:
        title: names them.
        page: that shows it all.
        summary: as `summary.json` of a run, with what is missing; None of experiments.
        missing: what failed, and why.
        spent: what it cost, by device.
        unread: why curves and layers of some results are not on the page.
    """

    title: str
    page: Page
    missing: dict[str, str]
    summary: dict[str, Any] | None = None
    spent: list[Spent] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def results(self) -> Sequence[Result]:
        """Of all networks that were measured."""
        return self.page.results


def compare(targets: Sequence[str], root: str, where: str | None = None, details: bool = False) -> Comparison:
    """Bring together what is known of runs or experiments.

    Args:
        targets: runs, by name, folder or URI; or experiments of MLflow; all experiments by default.
        root: where runs are, for those that are given by name.
        where: which results of experiments, in MLflow's filter language.
        details: whether curves and layers of experiments' best results are fetched, for a page.

    Raises:
        UserError: a target is neither, or nothing of any is whole.
    """
    places = {target: _place(target, root) for target in targets}
    if runs := {target: place for target, place in places.items() if place is not None}:
        if where:
            raise UserError(f"--where is a question to MLflow, of experiments, and {next(iter(runs))!r} is a run")
        if others := [target for target in targets if target not in runs]:
            raise UserError(
                f"{next(iter(runs))!r} is a run and {others[0]!r} is none; compare runs with runs, or experiments of "
                "MLflow with each other"
            )
        return compare_runs(list(runs.values()))
    memory = _experiments(targets, root, where)
    title = ", ".join(targets) or "all experiments"
    if not memory.results:
        some = "; ".join(f"{failure.name}: {failure.error}" for failure in memory.failures[:3])
        reasons = some or ("nothing fits --where" if where else "no network was measured")
        raise UserError(f"{title}: there is nothing to compare ({reasons})")
    missing = {f"{failure.name} (run {failure.run})": failure.error for failure in memory.failures}
    found, unread = _details(memory.results, root) if details else ({}, [])
    page = Page(f"Experiments: {title}", memory.results, found, missing=missing, spent=memory.spent)
    return Comparison(title, page, missing, spent=memory.spent, unread=unread)


def _place(target: str, root: str) -> str | None:
    try:
        return find_run(target, root)
    except UserError:
        return None


def _experiments(targets: Sequence[str], root: str, where: str | None) -> Memory:
    for target in targets:
        if storage.is_uri(target):
            find_run(target, root)  # no experiment is meant: says what is wrong
    return Mlflow(root).read(targets, where)


def _details(results: Sequence[Result], root: str) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The evaluations of the best, by their place in `results`, and why others could not be read."""
    client = Mlflow(root)
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


def compare_runs(places: Sequence[str]) -> Comparison:
    """Bring the variants of runs together; a result that several runs share, by KFP's cache, is there once.

    Raises:
        UserError: no variant of any is whole.
    """
    results: dict[str | None, tuple[VariantResult, Scores]] = {}
    made: list[_Identity] = []
    lacking: list[tuple[_Identity, str, str]] = []
    begun: list[StepRecord] = []
    for place in places:
        records = records_of(place)
        begun += records
        config = _configuration(place)
        whole, without = _variants_of(records, config)
        scores = _scores(records)
        results |= {result.place: (result, scores) for result in whole.values() if result.place not in results}
        made += [_identity(name, config) for name in whole]
        lacking += [(_identity(name, config), place.rpartition("/")[2], why) for name, why in without.items()]
    missed = [entry for entry in lacking if not any(_is_made_good(entry[0], other) for other in made)]
    known = [name for name, _ in {*made, *(identity for identity, _, _ in missed)}]
    missing = {
        f"{identity[0]} of {run}" if known.count(identity[0]) > 1 else identity[0]: why for identity, run, why in missed
    }
    title = ", ".join(place.rpartition("/")[2] for place in places)
    if not results:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "no step has a record"
        raise UserError(f"no variant of {title} is whole, so there is nothing to compare ({reasons})")
    found, scored = zip(*results.values(), strict=True)
    summary = {"run_id": title, "variants": [result.summary() for result in found], "missing": missing}
    spent = _spent(begun)
    sums = total(spent, f"{len(places)} run{'s' * (len(places) != 1)}")
    page = page_of(found, scored, f"Pruning run {title}", missing, [*spent, *total(spent, "all steps, last tries")])
    return Comparison(title, page, missing, summary, sums)


def _spent(records: Sequence[StepRecord]) -> list[Spent]:
    """What each step cost, the last try of it."""
    costs = [(record.title, record.cost) for record in records if record.cost is not None]
    return [Spent(title, cost.device, cost.device_seconds, cost.energy_joules) for title, cost in costs]


def _identity(name: str, config: Config | None) -> _Identity:
    """A variant's name, and the seeds that a run has for it, where that is known."""
    variant = next((variant for variant in config.variants if variant.label == name), None) if config else None
    if config is None or variant is None:
        return name, None
    return name, (config.dense.seed, config.knockoff.seed, variant.seed, finetune_for(config.finetune, variant).seed)


def _is_made_good(lacking: _Identity, made: _Identity) -> bool:
    """Whether what one run lacks has been made by another one, with the mistake mended; by another seed it has not."""
    return lacking[0] == made[0] and (None in (lacking[1], made[1]) or lacking[1] == made[1])


def _variants_of(
    records: Sequence[StepRecord], config: Config | None
) -> tuple[dict[str, VariantResult], dict[str, str]]:
    """The results of a run's whole variants, and what the others lack.

    A step that KFP took from its cache has no record in this run. What `compare` was given tells of all variants.
    """
    evaluations, exports = (_made(records, step) for step in ("evaluate", "export"))
    owners = {evaluation: name for name, evaluation in evaluations.items()}
    # Those of an earlier try's last step first, and then what the steps have made since.
    given = next((record for record in reversed(records) if record.step == "compare"), None)
    pairs = {} if given is None else dict(zip(*(_places(given, n) for n in ("evaluations", "exports")), strict=True))
    pairs |= {evaluation: exports[name] for name, evaluation in evaluations.items() if name in exports}
    whole: dict[str, VariantResult] = {}
    broken: dict[str | None, str] = {}
    for evaluation, exported in pairs.items():
        try:
            folders = remote.local_folder(evaluation, "evaluation"), remote.local_folder(exported, "model")
            (result,) = read_results([(folders[0], evaluation)], [(folders[1], exported)])
            whole[result.name] = result
        except UserError as error:  # a pod that was killed while its artifact was uploaded
            broken[owners.get(evaluation)] = str(error)
    wanted = [] if config is None else [variant.label for variant in config.variants]
    if wanted:
        whole = {name: result for name, result in whole.items() if name in wanted}
    else:
        wanted = list(dict.fromkeys(record.variant for record in records if record.variant is not None))
    return whole, {name: broken.get(name) or _reason(name, records) for name in wanted if name not in whole}


def _places(record: StepRecord, name: str) -> list[str]:
    """Those of an input."""
    uri = record.inputs[name].uri
    return [uri] if isinstance(uri, str) else uri


def _made(records: Sequence[StepRecord], step: str) -> dict[str, str]:
    """The places of what a step has made, by variant."""
    done = [record for record in records if record.step == step and record.status == "done"]
    return {str(record.variant): next(iter(record.outputs.values())).uri for record in done}


def _configuration(place: str) -> Config | None:
    """What the run was to do, where its configuration is there."""
    content = storage.read(storage.join(place, CONFIG), must_exist=False)
    return None if content is None else parse(Config, yaml.safe_load(content))


def _reason(variant: str, records: Sequence[StepRecord]) -> str:
    own = {record.step: record for record in records if record.variant == variant}
    for step in reversed(_OF_A_VARIANT):
        if (record := own.get(step)) is None:
            continue
        if record.status == "done":
            return f"nothing came after {step}"
        return f"{step} {record.status}" + (f": {record.error}" if record.error else "")
    return "this run has no record of it: it was not begun, or an earlier run's result was taken, which then name too"


def _scores(records: Sequence[StepRecord]) -> Scores:
    """Those of the knockoff phase, from where the run's steps had them."""
    uris = [next(iter(r.outputs.values())).uri for r in records if r.step == "train_knockoff" and r.status == "done"]
    uris += [str(r.inputs["scores"].uri) for r in records if "scores" in r.inputs]
    for uri in uris:
        try:
            content = (remote.local_folder(uri, "scores") / "scores.json").read_text()
        except (UserError, OSError):
            continue
        scores: Scores = json.loads(content)
        return scores
    return {}
