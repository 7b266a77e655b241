"""`scop doctor`: check that a configuration can run."""

from __future__ import annotations

import argparse
import os

from pipelines.cli.options import DEFAULT_CONFIG, Commands, add_config, add_docker, image_of, load_cluster


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="check the environment",
        description="Check what a configuration needs (data, S3, MLflow, docker, GPU, KFP). Prints one line for each, "
        "with the remedy if something is missing; the exit code is then 1.",
    )
    parser.set_defaults(action=run)
    add_config(parser)
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder or s3:// URI for runs (default: runs)")
    add_docker(parser, "also check IMAGE (default: the project's own)")
    parser.add_argument("--cluster", metavar="PROFILE", help="also check what a cluster profile names")
    parser.add_argument("--host", metavar="URL", help="Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")


def run(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if anything is missing."""
    from pipelines.cli.checks import examine
    from pipelines.presets import find_config
    from scop.config import load_config

    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set)
    host = options.host or os.environ.get("KF_PIPELINES_ENDPOINT")
    profile = load_cluster(options.cluster) if options.cluster else None
    missing = False
    for finding in examine(config, options.out, image_of(options.docker), host, profile):
        print(finding, flush=True)
        missing |= finding.state == "missing"
    return int(missing)
