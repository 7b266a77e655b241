"""What may follow `scop` on a command line. Only the standard library is imported until the parser is made."""

from __future__ import annotations

import argparse
from pathlib import Path

import scop

DEFAULT_CONFIG = "digits-resnet20"


def make_parser() -> argparse.ArgumentParser:
    """What `command` in the result says is a command's name; the rest are its options."""
    from pipelines.presets import preset_names
    from scop.steps import STEPS

    parser = argparse.ArgumentParser(
        prog="scop",
        description="Prune convolutional networks with scientific control (SCOP), as a Kubeflow pipeline.",
        epilog="Every command explains itself: scop COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"scop {scop.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)

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

    watch = commands.add_parser(
        "watch",
        help="follow a run on a cluster",
        description="Follow a run on Kubeflow Pipelines to its end, a line for each task and state, or tell how it "
        "ended. In MLflow it is closed where a pod that was killed could not. Exit code 1 if it does not succeed.",
    )
    watch.add_argument("run", metavar="RUN", help="KFP's id of it, the last part of its address")
    watch.add_argument("--cluster", required=True, metavar="PROFILE", help="the cluster profile it was submitted with")
    _add_every(watch)
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
