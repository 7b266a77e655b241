"""`scop run`: the whole pipeline on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.cli.options import (
    DEFAULT_CONFIG,
    Commands,
    add_config,
    add_docker,
    image_of,
    notes_of,
    report_user_error,
)

if TYPE_CHECKING:
    from pipelines.local.job import Runner, State


def add_parser(commands: Commands) -> None:
    """Add the command."""
    from pipelines.presets import preset_names

    parser = commands.add_parser(
        "run",
        help="run the whole pipeline on this machine",
        description="Run the whole pipeline on this machine.",
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
    parser.add_argument(
        "--runner",
        choices=("process", "kfp", "docker"),
        help="how steps run: all in one process (default), each in its own process with KFP's local runner, or each in "
        "a container",
    )
    add_docker(parser, "run each step in a container of IMAGE (default: the project's own); implies --runner docker")
    parser.add_argument("--gpus", action="store_true", help="make the GPUs available to the containers")


def run(options: argparse.Namespace) -> int:
    """Run the pipeline; return the exit code."""
    from pipelines.cli.supervisor import supervise

    return supervise(lambda announce: _run(options, announce))


def _run(options: argparse.Namespace, announce: Callable[[State], None]) -> int:
    from pipelines.local.job import StepError
    from pipelines.local.run import print_result, run_locally
    from pipelines.presets import find_config, run_name_of
    from pipelines.runs import find_run
    from scop.config import load_config
    from scop.environment import UserEnvironment
    from scop.errors import Stopped, UserError
    from scop.storage.cache import Cache
    from scop.system.progress import show_progress_on

    user = UserEnvironment.read()
    try:
        resumed = find_run(options.resume, options.out) if options.resume else None
        given = options.config or (f"{resumed}/config.yaml" if resumed else DEFAULT_CONFIG)
        path = find_config(given, Cache(user.cache_folder))
        config = load_config(path, options.set)
        out = resumed.rpartition("/")[0] if resumed else options.out
        name, runner = run_name_of(path), _runner(options)
        with show_progress_on(None):
            result = run_locally(config, out, name, runner=runner, resume=resumed, user=user, announce=announce)
    except UserError as error:
        return report_user_error(error)
    except (StepError, Stopped) as failure:
        print(f"scop: {failure}", *notes_of(failure), sep="\n", file=sys.stderr)
        return failure.code if isinstance(failure, Stopped) else 1
    print_result(result)
    return 0


def _runner(options: argparse.Namespace) -> Runner:
    """Return the runner selected by the options."""
    from pipelines.local.in_process import InProcess
    from scop.errors import UserError

    kind = options.runner or ("docker" if options.docker is not None else "process")
    if options.docker is not None and kind != "docker":
        raise UserError(f"--docker requires --runner docker, not --runner {kind}; give one of them")
    if options.gpus and kind != "docker":
        raise UserError("--gpus applies to containers; add --docker")
    if kind == "process":
        return InProcess()
    from pipelines.local.kfp_runner import KfpLocal

    return KfpLocal(image_of(options.docker or ""), options.gpus) if kind == "docker" else KfpLocal()
