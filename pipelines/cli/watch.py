"""`scop watch`: follow a run on a cluster."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pipelines.cli.options import Commands, add_interval, load_cluster

if TYPE_CHECKING:
    from pipelines.cluster.submit import Cluster, Submission


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "watch",
        help="follow a run on a cluster",
        description="Follow a run on Kubeflow Pipelines to its end: one line for each change of a task's state. If a "
        "killed pod left the MLflow run open, it is closed. The exit code is 1 if the run does not succeed.",
    )
    parser.set_defaults(action=run)
    parser.add_argument("run", metavar="RUN", help="KFP's run ID, the last part of the run's URL")
    parser.add_argument(
        "--cluster", required=True, metavar="PROFILE", help="the profile that the run was submitted with"
    )
    add_interval(parser)


def run(options: argparse.Namespace) -> int:
    """Follow the run; return 1 unless it succeeds."""
    from pipelines.cluster.submit import Cluster
    from scop.environment import ClusterEnvironment

    require_interval(options.every)
    cluster = Cluster(load_cluster(options.cluster), ClusterEnvironment.read())
    return follow_run(cluster, cluster.find(options.run), options.every)


def require_interval(seconds: float) -> None:
    """Raise UserError unless the polling interval is positive."""
    from scop.errors import UserError

    if not seconds > 0:
        raise UserError(f"--every {seconds:g} must be greater than 0 seconds")


def follow_run(cluster: Cluster, run: Submission, every: float) -> int:
    """Print a run's progress until it ends, and close it in MLflow; return 1 unless it succeeds."""
    from pipelines.cluster.progress import follow
    from pipelines.cluster.submit import close_tracking, failed_steps
    from scop.environment import UserEnvironment

    outcome = follow(cluster.server, run.id, lambda line: print(line, flush=True), every)
    close_tracking(run, outcome, UserEnvironment.read().tracking_uri)
    if not outcome.succeeded:
        print(f"scop: {outcome.error}", *failed_steps(run), sep="\n", file=sys.stderr)
        return 1
    print("the run succeeded")
    return 0
