"""`scop submit`: run the pipeline on a cluster."""

from __future__ import annotations

import argparse

from pipelines.cli.options import DEFAULT_CONFIG, Commands, add_config, add_interval, load_cluster, open_cache
from pipelines.cli.watch import follow_run, require_interval


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "submit",
        help="run the whole pipeline on a cluster",
        description="Run the whole pipeline on Kubeflow Pipelines. The pipeline is uploaded if the server does not "
        "have this version yet. With --wait, the exit code is 1 if the run does not succeed.",
        epilog="The server is the profile's `host`, else KF_PIPELINES_ENDPOINT, else what KFP's client finds; a token "
        "comes from KF_PIPELINES_TOKEN.",
    )
    parser.set_defaults(action=run)
    add_config(parser)
    parser.add_argument("--cluster", required=True, metavar="PROFILE", help="a cluster profile, a YAML file")
    parser.add_argument("--name", metavar="NAME", help="the run's name (default: configuration name and time)")
    parser.add_argument("--no-cache", action="store_true", help="run every step, ignoring KFP's cache")
    parser.add_argument(
        "--recurring", metavar="CRON", help='start a recurring run, such as "0 0 3 * * *": the first field is seconds'
    )
    parser.add_argument("--wait", action="store_true", help="follow the run to its end, as `scop watch` does")
    add_interval(parser)


def run(options: argparse.Namespace) -> int:
    """Submit the run, and follow it if requested."""
    from pipelines.cluster.compilation import refuse_uneven_shares
    from pipelines.cluster.submit import Cluster, keep_configuration, pin_files, run_name
    from pipelines.presets import find_config, run_name_of
    from scop.config import load_config
    from scop.environment import ClusterEnvironment
    from scop.errors import UserError

    path = find_config(options.config or DEFAULT_CONFIG, open_cache())
    config = pin_files(load_config(path, options.set))
    require_interval(options.every)
    if options.wait and options.recurring:
        raise UserError("--wait follows one run, and --recurring starts many; give one of them")
    profile = load_cluster(options.cluster)
    refuse_uneven_shares(config, profile)
    cluster = Cluster(profile, ClusterEnvironment.read())
    name = options.name or run_name(config, run_name_of(path))
    submission = cluster.submit(config, name, caching=not options.no_cache, cron=options.recurring)
    print(f"{'recurring run' if options.recurring else 'run'} {name}: {submission.address}", flush=True)
    keep_configuration(submission, config)
    return follow_run(cluster, submission, options.every) if options.wait else 0
