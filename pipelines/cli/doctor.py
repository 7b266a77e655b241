"""`scop doctor`: check that a configuration can run."""

from __future__ import annotations

import argparse

from pipelines.cli.options import Commands, add_config, add_docker, image_of, load_cluster, load_configuration


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
    parser.add_argument("--cluster", metavar="PROFILE", help="also check the settings of a cluster profile")
    parser.add_argument("--host", metavar="URL", help="URL of Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)")


def run(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if anything is missing."""
    from pipelines.cli.checks import examine
    from scop.environment import ClusterEnvironment, UserEnvironment

    config = load_configuration(options)
    cluster = ClusterEnvironment.read()
    host = options.host or cluster.host
    profile = load_cluster(options.cluster) if options.cluster else None
    access = cluster.model_copy(update={"host": host})
    missing = False
    for finding in examine(config, options.out, image_of(options.docker), access, profile, UserEnvironment.read()):
        print(finding, flush=True)
        missing |= finding.state == "missing"
    return int(missing)
