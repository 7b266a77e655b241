"""`scop rerun`: run a recorded step again."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.cli.options import Commands, add_docker, add_runs, add_set, open_cache


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "rerun",
        help="run a recorded step again",
        description="Run a recorded step again, locally or in Docker, from its recorded inputs and configuration. "
        "Nothing is uploaded, and metrics go to a local file unless --track is given.",
    )
    parser.set_defaults(action=run)
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="RUN/STEP or RUN/VARIANT/STEP, where RUN is a name, a folder or an s3:// URI; or a step.json file or its "
        "folder",
    )
    add_docker(parser, "run in a container of IMAGE (default: the recorded one, or the project's own)")
    add_set(parser)
    parser.add_argument("--verify", action="store_true", help="compare every output file with the recorded hash")
    parser.add_argument("--shell", action="store_true", help="open a shell in the container, ready to run the step")
    parser.add_argument(
        "--dry-run", action="store_true", help="prepare the inputs and print the command, but do not run it"
    )
    parser.add_argument("--gpus", action="store_true", help="make the GPUs available to the container")
    parser.add_argument("--track", action="store_true", help="send metrics to MLFLOW_TRACKING_URI")
    parser.add_argument("--out", default="reruns", metavar="DIR", help="the folder for results (default: reruns)")
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Run the step again; return its exit code, or 1 if --verify finds a difference."""
    from pipelines.local import rerun_step
    from pipelines.local.containers import require_image
    from pipelines.runs import find_record
    from scop.errors import UserError

    image: str | None = options.docker
    if image is None and (options.shell or options.gpus):
        raise UserError(f"--{'shell' if options.shell else 'gpus'} applies to containers; add --docker")
    record = find_record(options.target, options.runs)
    if "://" in str(options.out) or str(options.out).startswith("s3:"):
        raise UserError(f"--out {options.out} is not a folder; a rerun uploads nothing, so give a local folder")
    if options.shell and options.verify:
        raise UserError("--verify needs the step's output, and --shell does not run the step; give one of them")
    if options.verify and record.status != "done":
        raise UserError(f"--verify needs a finished step to compare with, and the recorded one is {record.status}")
    if image is not None:
        image = image or rerun_step.default_image(record)
        require_image(image)
    ready = rerun_step.make_ready(record, Path(options.out), options.set, options.track, open_cache())
    code = rerun_step.rerun(ready, image=image, gpus=options.gpus, dry_run=options.dry_run, shell=options.shell)
    if code or options.dry_run or options.shell:
        return code
    rerun_step.print_result(ready)
    return 0 if not options.verify or rerun_step.verify(ready) else 1
