"""`scop compile`: write the pipeline as YAML."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.cli.options import Commands, add_config, load_cluster, load_configuration


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compile",
        help="write the pipeline as YAML",
        description="Write the pipeline as YAML: for any backend or, with --cluster, for one cluster, with its "
        "resources, nodes, secrets and retries. With -f or --set, the configuration's sections become the parameters' "
        "defaults.",
    )
    parser.set_defaults(action=run)
    add_config(parser)
    parser.add_argument("--cluster", metavar="PROFILE", help="a cluster profile, a YAML file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")


def run(options: argparse.Namespace) -> None:
    """Write the file."""
    from pipelines.cluster.compilation import compile_for, refuse_paths, refuse_uneven_shares
    from pipelines.pipeline import compile_pipeline, make_pipeline
    from scop.errors import UserError

    if options.output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {options.output} must end in .yaml")
    config = load_configuration(options)
    defaults = config.model_dump(mode="json", exclude_none=True) if options.config or options.set else None
    profile = load_cluster(options.cluster) if options.cluster else None
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
