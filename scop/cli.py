"""The `scop` command. Only the standard library is imported until a command needs more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import scop

if TYPE_CHECKING:
    from pipelines.profile import ClusterProfile
    from pipelines.submit import Cluster, Submission
    from scop.config import Config, VariantSection

DEFAULT_CONFIG = "digits-resnet20"
_PAIRS_SHOWN = 12


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for a failure, 2 for a mistake of the user's."""
    parser = _parser()
    options = parser.parse_args(arguments)
    from scop.errors import UserError

    try:
        return int(options.command(options) or 0)
    except UserError as error:
        print(f"scop: error: {error}", *_notes(error), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scop: interrupted", file=sys.stderr)
        return 130


def _notes(error: Exception) -> list[str]:
    """What is said beside an error: how to go on."""
    return [f"scop: {note}" for note in getattr(error, "__notes__", ())]


def _parser() -> argparse.ArgumentParser:
    from pipelines.presets import preset_names
    from scop.steps import STEPS

    parser = argparse.ArgumentParser(
        prog="scop",
        description="Prune convolutional networks with scientific control (SCOP), as a Kubeflow pipeline.",
        epilog="Every command explains itself: scop COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"scop {scop.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="run the whole pipeline on this machine",
        description="Run the whole pipeline on this machine, through KFP's local runner.",
        epilog=f"presets: {', '.join(preset_names())}",
    )
    _add_config(run)
    run.add_argument(
        "--out", default="runs", metavar="DIR", help="where runs are kept, a folder or s3:// URI (default: runs)"
    )
    run.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an earlier run (a name in --out, a folder or a URI), with its configuration unless -f gives "
        "one; steps that are whole and unchanged are kept",
    )
    _add_docker(run, "run each step in a container of IMAGE (default: the project's own)")
    run.add_argument("--gpus", action="store_true", help="give the containers the GPUs")
    run.set_defaults(command=_run)

    step = commands.add_parser(
        "step",
        help="run one step on folders",
        description="Run one step on folders, as its container does, without KFP.",
        epilog=_describe_steps(STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.add_argument("name", metavar="NAME", help="the step, see below")
    _add_config(step)
    step.add_argument(
        "--input", action="append", default=[], metavar="NAME=DIR", help="an input, a folder or s3:// URI (repeatable)"
    )
    step.add_argument("--output", action="append", default=[], metavar="NAME=DIR", help="an output, likewise")
    step.add_argument("--variant", metavar="NAME", help="which of the configuration's variants (default: the first)")
    step.set_defaults(command=_step)

    rerun = commands.add_parser(
        "rerun",
        help="run a recorded step again",
        description="Run a recorded step again, here or in docker, from its recorded inputs and configuration. "
        "Nothing is uploaded, and tracking goes to a file, unless asked otherwise.",
    )
    rerun.add_argument(
        "target",
        metavar="TARGET",
        help="RUN/STEP or RUN/VARIANT/STEP, RUN a name, a folder or an s3:// URI; or a step.json, or its folder",
    )
    _add_docker(rerun, "in a container of IMAGE (default: the recorded one, or the project's own)")
    _add_set(rerun)
    rerun.add_argument("--verify", action="store_true", help="compare every output file with the recorded hash")
    rerun.add_argument("--shell", action="store_true", help="open a shell in the container, with everything in place")
    rerun.add_argument(
        "--dry-run", action="store_true", help="prepare all, and print the command instead of running it"
    )
    rerun.add_argument("--gpus", action="store_true", help="give the container the GPUs")
    rerun.add_argument("--track", action="store_true", help="track where MLFLOW_TRACKING_URI says")
    rerun.add_argument("--out", default="reruns", metavar="DIR", help="where results go (default: reruns)")
    where_runs = "where runs are, a folder or URI (default: runs)"
    rerun.add_argument("--runs", default="runs", metavar="DIR", help=where_runs)
    rerun.set_defaults(command=_rerun)

    select = commands.add_parser(
        "select",
        help="see what a variant would remove",
        description="Print, layer by layer, how many of its channels a variant removes, and what is left: of a run's "
        "network by its scores, or of a configuration's before anything is trained. Rates and budgets can be tried "
        "within seconds.",
        epilog="such as: scop select RUN --dry-run --set variants.0.selection=global "
        "--set variants.0.budget='{macs: 0.5}'",
    )
    select.add_argument("run", nargs="?", metavar="RUN", help="a run, by its name, folder or URI")
    _add_config(select)
    select.add_argument("--variant", metavar="NAME", help="which of the configuration's variants (default: the first)")
    select.add_argument("--dry-run", action="store_true", help="print only")
    select.add_argument("--output", type=Path, metavar="FILE", help="write the plan, a JSON file; needs RUN")
    select.add_argument("--runs", default="runs", metavar="DIR", help=where_runs)
    select.set_defaults(command=_select)

    compare = commands.add_parser(
        "compare",
        help="put results side by side",
        description="Put results side by side: of runs, from the artifacts that their steps left, here, in S3, or "
        "where a cluster keeps them; of experiments, all that MLflow remembers. What failed is named, with the reason; "
        "exit code 1 then where it is a variant of a run.",
        epilog='such as: scop compare digits-resnet20 --where "metrics.top1_drop < 0.01" --group-by method,prune_rate',
    )
    compare.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a run, by its name, folder or s3:// URI, or an experiment of MLflow, by its name (default: all "
        "experiments)",
    )
    compare.add_argument(
        "--where", metavar="EXPRESSION", help="only results that fit, in MLflow's filter language; of experiments"
    )
    compare.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="a column; the first is sorted by (repeatable)"
    )
    compare.add_argument(
        "--group-by",
        default="",
        metavar="NAME,...",
        help="one row for all results with the same values of these parameters: mean, standard deviation, n",
    )
    compare.add_argument("--baseline", metavar="NAME", help="tell changes against `dense`, or a variant")
    compare.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the page, one file with all results; it groups and sorts by itself",
    )
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write the table, raw values")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the figures; of runs, as their summary.json")
    compare.add_argument("--png", type=Path, metavar="DIR", help="write the plots as pictures")
    compare.add_argument("--runs", dest="root", default="runs", metavar="DIR", help=where_runs)
    compare.set_defaults(command=_compare)

    promote = commands.add_parser(
        "promote",
        help="make a registered model the champion",
        description="Give a version of a registered model the alias `champion`, if its drop in accuracy and its "
        "exactness are within what `export` allows. Exit code 1 if they are not.",
        epilog="such as: scop promote digits-resnet20-scop@candidate; then mlflow.pyfunc.load_model("
        "'models:/digits-resnet20-scop@champion')",
    )
    promote.add_argument("version", metavar="VERSION", help="NAME/NUMBER or NAME@ALIAS, with or without models:/")
    _add_config(promote, "by which section export judges: a YAML file or a preset (default: as it was exported)")
    promote.add_argument("--runs", dest="root", default="runs", metavar="DIR", help=where_runs)
    promote.set_defaults(command=_promote)

    doctor = commands.add_parser(
        "doctor",
        help="check that all is there",
        description="Check what a configuration needs (data, S3, MLflow, docker, GPU, KFP): a line for each, with "
        "what to set where something is missing; exit code 1 then.",
    )
    _add_config(doctor)
    doctor.add_argument("--out", default="runs", metavar="DIR", help="where runs will be kept (default: runs)")
    _add_docker(doctor, "steps will run in containers of IMAGE")
    doctor.add_argument("--cluster", metavar="PROFILE", help="check what a cluster profile names, too")
    doctor.add_argument("--host", metavar="URL", help="of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")
    doctor.set_defaults(command=_doctor)

    compile_ = commands.add_parser(
        "compile",
        help="write the pipeline as YAML",
        description="Write the pipeline as YAML: for any backend, or with --cluster for a certain one, then with "
        "resources, nodes, secrets and retries. With -f or --set the configuration's sections become the parameters' "
        "defaults.",
    )
    _add_config(compile_)
    compile_.add_argument("--cluster", metavar="PROFILE", help="a cluster profile, a YAML file")
    compile_.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    compile_.set_defaults(command=_compile)

    submit = commands.add_parser(
        "submit",
        help="run the whole pipeline on a cluster",
        description="Run the whole pipeline on Kubeflow Pipelines. The pipeline is uploaded where the server does not "
        "have this very version yet. Exit code 1 if, with --wait, the run does not succeed.",
        epilog="The server is the profile's `host`, else KF_PIPELINES_ENDPOINT, else what KFP's client finds; a token "
        "comes from KF_PIPELINES_TOKEN.",
    )
    _add_config(submit)
    submit.add_argument("--cluster", required=True, metavar="PROFILE", help="a cluster profile, a YAML file")
    submit.add_argument("--name", metavar="NAME", help="of the run (default: after the configuration, with the time)")
    submit.add_argument("--no-cache", action="store_true", help="run every step, whatever KFP knows of it")
    submit.add_argument(
        "--recurring", metavar="CRON", help='a run again and again, such as "0 0 3 * * *": seconds come first'
    )
    submit.add_argument("--wait", action="store_true", help="follow the run to its end, as `scop watch` does")
    _add_every(submit)
    submit.set_defaults(command=_submit)

    watch = commands.add_parser(
        "watch",
        help="follow a run on a cluster",
        description="Follow a run on Kubeflow Pipelines to its end, a line for each task and state, or tell how it "
        "ended. In MLflow it is closed where a pod that was killed could not. Exit code 1 if it does not succeed.",
    )
    watch.add_argument("run", metavar="RUN", help="KFP's id of it, the last part of its address")
    watch.add_argument("--cluster", required=True, metavar="PROFILE", help="the cluster profile it was submitted with")
    _add_every(watch)
    watch.set_defaults(command=_watch)
    return parser


def _add_docker(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--docker", nargs="?", const="", metavar="IMAGE", help=help_text)


def _describe_steps(steps: dict[str, tuple[str, str]]) -> str:
    inputs = max(len(inputs) for inputs, _ in steps.values())
    lines = [f"  {name:16} {given or '-':{inputs}}  ->  {made}" for name, (given, made) in steps.items()]
    return "\n".join(["steps, with their inputs and their output (... stands for several folders):", *lines])


def _add_config(parser: argparse.ArgumentParser, help_text: str | None = None) -> None:
    default = f"a YAML file, or the name of a preset (default: {DEFAULT_CONFIG})"
    parser.add_argument("-f", "--config", metavar="CONFIG", help=help_text or default)
    _add_set(parser)


def _add_every(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="look so often (default: 10)")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change an entry, such as finetune.epochs=3 or variants.0.prune_rate=0.3 (repeatable)",
    )


def _run(options: argparse.Namespace) -> int:
    from pipelines.containers import DEFAULT_IMAGE
    from pipelines.local import StepError, print_result, run_locally
    from pipelines.presets import find_config
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
        run = run_locally(config, out, path.stem, image, place, options.gpus)
    except (StepError, Stopped) as failure:
        print(f"scop: {failure}", *_notes(failure), sep="\n", file=sys.stderr)
        return failure.code if isinstance(failure, Stopped) else 1
    print_result(run)
    return 0


def _step(options: argparse.Namespace) -> None:
    from pipelines.presets import find_config
    from scop.config import load_config
    from scop.steps.runtime import CHECKPOINTS_VARIABLE, KEEP_VARIABLE, find_step, run_step

    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set)
    variant = _variant(config, options.variant)
    sections = config.model_dump(mode="json") | {"variant": variant.model_dump(mode="json")}
    wanted = find_step(options.name).Config.model_fields
    if config.run.checkpoints:
        os.environ.setdefault(CHECKPOINTS_VARIABLE, config.run.checkpoints)
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
        select.save(plan, options.output)
        print(f"plan: {options.output}")


def _rerun(options: argparse.Namespace) -> int:
    from pipelines import rerun
    from pipelines.containers import require_image
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

    from pipelines.compare import compare
    from pipelines.table import as_csv, as_json, print_table, tables
    from scop.errors import UserError
    from scop.manifest import write_atomically
    from scop.paired import compare_pairs

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
        from scop.page.pictures import write_pictures

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
    from pipelines.presets import find_config
    from pipelines.promote import CHAMPION, LIMITS, promote
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
    from pipelines.containers import DEFAULT_IMAGE
    from pipelines.doctor import examine
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
    from pipelines.cluster import compile_for, refuse_paths, refuse_uneven_shares
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
    from pipelines.profile import load_profile
    from scop import storage

    profile = load_profile(storage.local(name))
    if not profile.has_digest:
        print(
            f"note: image {profile.image} is named by a tag; if it moves, KFP's cache does not notice: name it by its "
            "digest",
            file=sys.stderr,
        )
    return profile


def _submit(options: argparse.Namespace) -> int:
    from pipelines.cluster import refuse_uneven_shares
    from pipelines.presets import find_config
    from pipelines.submit import Cluster, keep_configuration, pin_places, run_name
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
    name = options.name or run_name(config, path.stem)
    run = cluster.submit(config, name, caching=not options.no_cache, cron=options.recurring)
    print(f"{'recurring run' if options.recurring else 'run'} {name}: {run.address}", flush=True)
    keep_configuration(run, config)
    return _follow(cluster, run, options.every) if options.wait else 0


def _watch(options: argparse.Namespace) -> int:
    from pipelines.submit import Cluster

    _check_every(options)
    cluster = Cluster(_profile(options.cluster))
    return _follow(cluster, cluster.find(options.run), options.every)


def _check_every(options: argparse.Namespace) -> None:
    from scop.errors import UserError

    if not options.every > 0:
        raise UserError(f"--every {options.every:g} must be above 0 seconds")


def _follow(cluster: Cluster, run: Submission, every: float) -> int:
    """Tell how a run goes and ends, and close it in MLflow; 1 where it does not succeed."""
    from pipelines.submit import failed_steps, mend_tracking

    outcome = cluster.follow(run, lambda line: print(line, flush=True), every)
    mend_tracking(run, outcome)
    if not outcome.succeeded:
        print(f"scop: {outcome.error}", *failed_steps(run), sep="\n", file=sys.stderr)
        return 1
    print("the run succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
