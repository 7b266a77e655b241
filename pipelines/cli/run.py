"""`scop run`: the whole pipeline on this machine."""

from __future__ import annotations

import argparse
import sys

from pipelines.cli.options import DEFAULT_CONFIG, Commands, add_config, add_docker, image_of, notes_of


def add_parser(commands: Commands) -> None:
    """Add the command."""
    from pipelines.presets import preset_names

    parser = commands.add_parser(
        "run",
        help="run the whole pipeline on this machine",
        description="Run the whole pipeline on this machine, through KFP's local runner.",
        epilog=f"presets: {', '.join(preset_names())}",
    )
    parser.set_defaults(action=run)
    add_config(parser)
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder or s3:// URI for runs (default: runs)")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue an earlier run (a name in --out, a folder or a URI), with its own configuration unless -f gives "
        "one; finished steps whose inputs are unchanged are kept",
    )
    add_docker(parser, "run each step in a container of IMAGE (default: the project's own)")
    parser.add_argument("--gpus", action="store_true", help="give the GPUs to the containers")


def run(options: argparse.Namespace) -> int:
    """Run the pipeline; return the exit code."""
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
        image = image_of(options.docker)
        if options.gpus and image is None:
            raise UserError("--gpus applies to containers; add --docker")
        result = run_locally(config, out, run_name_of(path), image, place, options.gpus)
    except (StepError, Stopped) as failure:
        print(f"scop: {failure}", *notes_of(failure), sep="\n", file=sys.stderr)
        return failure.code if isinstance(failure, Stopped) else 1
    print_result(result)
    return 0
