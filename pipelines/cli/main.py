"""The `scop` command. Only the standard library is imported until a command needs more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli.options import DEFAULT_CONFIG, make_parser

if TYPE_CHECKING:
    from pipelines.cluster.profile import ClusterProfile
    from pipelines.cluster.submit import Cluster, Submission
    from scop.config import Config, VariantSection

_PAIRS_SHOWN = 12


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for a failure, 2 for a mistake of the user's."""
    options = make_parser().parse_args(arguments)
    from scop.errors import UserError

    try:
        return int(_COMMANDS[options.command](options) or 0)
    except UserError as error:
        print(f"scop: error: {error}", *_notes(error), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scop: interrupted", file=sys.stderr)
        return 130


def _notes(error: Exception) -> list[str]:
    """What is said beside an error: how to go on."""
    return [f"scop: {note}" for note in getattr(error, "__notes__", ())]


def _run(options: argparse.Namespace) -> int:
    from pipelines.local.containers import DEFAULT_IMAGE
    from pipelines.local.run import StepError, print_result, run_locally
    from pipelines.presets import find_config, run_name_of
    from pipelines.runs import find_run
    from scop.config import load_config
    from scop.errors import Stopped, UserError

    place = find_run(options.resume, options.out) if options.resume else None
    given = options.config or (f"{place}/config.yaml" if place else DEFAULT_CONFIG)
    path = find_config(given)
    config = load_config(path, options.set)
    out = place.rpartition("/")[0] if place else options.out
    try:
        image = options.docker if options.docker is None else options.docker or DEFAULT_IMAGE
        if options.gpus and image is None:
            raise UserError("--gpus is for containers; add --docker")
        run = run_locally(config, out, run_name_of(path), image, place, options.gpus)
    except (StepError, Stopped) as failure:
        print(f"scop: {failure}", *_notes(failure), sep="\n", file=sys.stderr)
        return failure.code if isinstance(failure, Stopped) else 1
    print_result(run)
    return 0


def _step(options: argparse.Namespace) -> None:
    from pipelines.presets import find_config
    from scop.config import Config, ConfigWithoutFinetuning, load_config
    from scop.runtime.execution import run_step
    from scop.runtime.places import absolute
    from scop.runtime.resume import CHECKPOINTS_VARIABLE, KEEP_VARIABLE
    from scop.runtime.step import find_step

    wanted = find_step(options.name).Config.model_fields
    kind = Config if "finetune" in wanted else ConfigWithoutFinetuning
    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set, kind)
    variant = _variant(config, options.variant)
    sections = config.model_dump(mode="json") | {"variant": variant.model_dump(mode="json")}
    if config.run.checkpoints:
        os.environ.setdefault(CHECKPOINTS_VARIABLE, absolute(config.run.checkpoints))
        os.environ.setdefault(KEEP_VARIABLE, str(config.run.keep_checkpoints))
    run_step(
        options.name,
        {name: sections[name] for name in wanted},
        _pairs(options.input, "--input"),
        {name: values[-1] for name, values in _pairs(options.output, "--output").items()},
    )


def _select(options: argparse.Namespace) -> None:
    from pipelines import select
    from pipelines.runs import find_run
    from scop.errors import UserError

    if not options.dry_run and options.output is None:
        raise UserError("say where the plan goes, --output FILE, or look only, --dry-run")
    if options.output and options.run is None:
        raise UserError("--output writes a plan by a run's scores: name the RUN, or look only, --dry-run")
    place = find_run(options.run, options.runs) if options.run else None
    config = select.config_of(options.config, place, options.set)
    variant = _variant(config, options.variant)
    dense = select.dense_of_run(place) if place else select.dense_of(config)
    plan = select.plan_of(dense, variant)
    select.print_plan(dense, plan, variant)
    if options.output and not options.dry_run:
        _written("--output", options.output, lambda path: select.save(plan, path))
        print(f"plan: {options.output}")


def _rerun(options: argparse.Namespace) -> int:
    from pipelines.local import rerun
    from pipelines.local.containers import require_image
    from pipelines.runs import find_record
    from scop.errors import UserError

    image: str | None = options.docker
    if image is None and (options.shell or options.gpus):
        raise UserError(f"--{'shell' if options.shell else 'gpus'} is for containers; add --docker")
    record = find_record(options.target, options.runs)
    if "://" in str(options.out) or str(options.out).startswith("s3:"):
        raise UserError(f"--out {options.out} is no folder; nothing of a rerun is uploaded: give a folder")
    if options.shell and options.verify:
        raise UserError("--verify compares what the step makes, and --shell leaves that to you; leave one of them out")
    if options.verify and record.status != "done":
        raise UserError(
            f"--verify: there is nothing to compare with, the recorded step is {record.status!r}, not 'done'"
        )
    if image is not None:
        image = image or rerun.default_image(record)
        require_image(image)
    ready = rerun.make_ready(record, Path(options.out), options.set, options.track)
    code = rerun.rerun(ready, image=image, gpus=options.gpus, dry_run=options.dry_run, shell=options.shell)
    if code or options.dry_run or options.shell:
        return code
    rerun.print_result(ready)
    return 0 if not options.verify or rerun.verify(ready) else 1


def _compare(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from pipelines.compare.comparison import compare
    from pipelines.compare.table import as_csv, as_json, print_table, tables
    from scop.errors import UserError
    from scop.report.paired_comparison import compare_pairs
    from scop.storage.manifest import write_atomically

    given = [place for place in (options.html, options.csv, options.json, options.png) if place is not None]
    if len({place.absolute() for place in given}) < len(given):
        raise UserError("--html, --csv, --json and --png need a place each; two of them are the same")
    found = compare(options.targets, options.root, options.where, details=bool(options.html or options.png))
    keys = [key.strip() for key in options.group_by.split(",") if key.strip()]
    side_by_side = tables(found.results, options.metric, keys, options.baseline)
    for table in side_by_side:
        print_table(table)
        print()
    pairs = compare_pairs(found.results)
    for pair in pairs[:_PAIRS_SHOWN]:
        print(f"paired:  {pair}")
    if len(pairs) > _PAIRS_SHOWN:
        print(f"paired:  and {len(pairs) - _PAIRS_SHOWN} more, see --json")
    for entry in found.spent:
        print(f"cost:    {entry.time} on {entry.device}, energy {entry.energy}, {entry.what}")
    if options.html:
        _written("--html", options.html, found.page.write)
        print(f"report:  {options.html}")
    if options.json:
        content = found.summary or {"experiments": found.title, "missing": found.missing}
        content = {
            **content,
            "paired": [asdict(pair) for pair in pairs],
            "spent": [asdict(entry) for entry in found.spent],
            "tables": as_json(side_by_side),
        }
        _written("--json", options.json, lambda path: write_atomically(path, json.dumps(content, indent=1) + "\n"))
        print(f"summary: {options.json}")
    if options.csv:
        _written("--csv", options.csv, lambda path: write_atomically(path, as_csv(side_by_side)))
        print(f"table:   {options.csv}")
    if options.png:
        from scop.report.page.pictures import write_pictures

        _written("--png", options.png, lambda folder: write_pictures(found.page, folder))
        print(f"plots:   {options.png}")
    for what in found.unread:
        print(f"left out: {what}", file=sys.stderr)
    for name, why in found.missing.items():
        print(f"missing: {name}: {why}", file=sys.stderr)
    return int(bool(found.missing and found.summary))


def _written(option: str, path: Path, write: Callable[[Path], object]) -> None:
    """Write what an option asked for; raises UserError where that cannot be done."""
    from scop.errors import UserError

    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from error


def _promote(options: argparse.Namespace) -> int:
    from pipelines.compare.promote import CHAMPION, LIMITS, promote
    from pipelines.presets import find_config
    from scop.config import load_config

    # Without a file, what is not set is as the version was exported, and no preset's.
    export = load_config(find_config(options.config) if options.config else None, options.set).export
    limits = export.model_dump(include=set(LIMITS), exclude_unset=not options.config)
    outcome = promote(options.version, options.root, limits)
    for gate in outcome.gates:
        print(f"{'holds' if gate.holds else 'FAILS'}: {gate.text}")
    champion = f"models:/{outcome.name}@{CHAMPION}"
    before = f"version {outcome.before}" if outcome.before else "none"
    if not outcome.promoted:
        print(f"scop: version {outcome.number} is not promoted; {champion} stays {before}", file=sys.stderr)
        return 1
    print(f"{champion} is version {outcome.number} now (before: {before})")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        print(f"to load it: mlflow.set_tracking_uri({outcome.tracking_uri!r}); mlflow.pyfunc.load_model({champion!r})")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pipelines.cli.doctor import examine
    from pipelines.local.containers import DEFAULT_IMAGE
    from pipelines.presets import find_config
    from scop.config import load_config

    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set)
    image = options.docker if options.docker is None else options.docker or DEFAULT_IMAGE
    missing = False
    host = options.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    profile = _profile(options.cluster) if options.cluster else None
    for finding in examine(config, options.out, image, host, profile):
        print(finding, flush=True)
        missing |= finding.state == "missing"
    return int(missing)


def _variant(config: Config, label: str | None) -> VariantSection:
    """The variant of that name, or the first."""
    from scop.errors import UserError

    variants = {variant.label: variant for variant in config.variants}
    if label is None:
        return config.variants[0]
    if label not in variants:
        raise UserError(f"--variant {label!r} is not in the configuration (known: {', '.join(variants)})")
    return variants[label]


def _pairs(arguments: list[str], option: str) -> dict[str, list[str]]:
    """NAME=DIR arguments by name; a name that is given several times has several folders."""
    from scop.errors import UserError

    pairs: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"{option} {argument!r} must have the form NAME=DIR")
        pairs.setdefault(name, []).append(folder)
    return pairs


def _compile(options: argparse.Namespace) -> None:
    from pipelines.cluster.compilation import compile_for, refuse_paths, refuse_uneven_shares
    from pipelines.pipeline import compile_pipeline, make_pipeline
    from pipelines.presets import find_config
    from scop.config import load_config
    from scop.errors import UserError

    if options.output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {options.output} must end in .yaml")
    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set)
    defaults = config.model_dump(mode="json", exclude_none=True) if options.config or options.set else None
    profile = _profile(options.cluster) if options.cluster else None
    if profile and defaults:
        refuse_paths(config)
        refuse_uneven_shares(config, profile)
    try:
        if profile is None:
            compile_pipeline(str(options.output), make_pipeline(defaults=defaults))
        else:
            compile_for(profile, config.run, options.output, defaults=defaults)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written: {error.strerror}") from error
    print(f"wrote {options.output}")


def _profile(name: str) -> ClusterProfile:
    from pipelines.cluster.profile import load_profile
    from scop.storage import files as storage

    profile = load_profile(storage.local(name))
    if not profile.has_digest:
        print(
            f"note: image {profile.image} is named by a tag; if it moves, KFP's cache does not notice: name it by its "
            "digest",
            file=sys.stderr,
        )
    return profile


def _submit(options: argparse.Namespace) -> int:
    from pipelines.cluster.compilation import refuse_uneven_shares
    from pipelines.cluster.submit import Cluster, keep_configuration, pin_places, run_name
    from pipelines.presets import find_config, run_name_of
    from scop.config import load_config
    from scop.errors import UserError

    path = find_config(options.config or DEFAULT_CONFIG)
    config = pin_places(load_config(path, options.set))
    _check_every(options)
    if options.wait and options.recurring:
        raise UserError("--wait follows one run, and --recurring starts them again and again; leave one of them out")
    profile = _profile(options.cluster)
    refuse_uneven_shares(config, profile)
    cluster = Cluster(profile)
    name = options.name or run_name(config, run_name_of(path))
    run = cluster.submit(config, name, caching=not options.no_cache, cron=options.recurring)
    print(f"{'recurring run' if options.recurring else 'run'} {name}: {run.address}", flush=True)
    keep_configuration(run, config)
    return _follow(cluster, run, options.every) if options.wait else 0


def _watch(options: argparse.Namespace) -> int:
    from pipelines.cluster.submit import Cluster

    _check_every(options)
    cluster = Cluster(_profile(options.cluster))
    return _follow(cluster, cluster.find(options.run), options.every)


def _check_every(options: argparse.Namespace) -> None:
    from scop.errors import UserError

    if not options.every > 0:
        raise UserError(f"--every {options.every:g} must be above 0 seconds")


def _follow(cluster: Cluster, run: Submission, every: float) -> int:
    """Tell how a run goes and ends, and close it in MLflow; 1 where it does not succeed."""
    from pipelines.cluster.progress import follow
    from pipelines.cluster.submit import failed_steps, mend_tracking

    outcome = follow(cluster.server, run.id, lambda line: print(line, flush=True), every)
    mend_tracking(run, outcome)
    if not outcome.succeeded:
        print(f"scop: {outcome.error}", *failed_steps(run), sep="\n", file=sys.stderr)
        return 1
    print("the run succeeded")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "run": _run,
    "step": _step,
    "rerun": _rerun,
    "select": _select,
    "compare": _compare,
    "promote": _promote,
    "doctor": _doctor,
    "compile": _compile,
    "submit": _submit,
    "watch": _watch,
}


if __name__ == "__main__":
    sys.exit(main())
