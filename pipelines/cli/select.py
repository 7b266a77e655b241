"""`scop select`: show what a variant would remove."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.cli.options import (
    Commands,
    add_config,
    add_runs,
    add_variant,
    open_cache,
    variant_of,
    write_output,
)


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "select",
        help="show what a variant would remove",
        description="Print, layer by layer, how many channels a variant removes and how many parameters and MACs are "
        "left, for the network and scores of a run, or for a configuration before training. Try rates and "
        "budgets in seconds.",
        epilog="example: scop select RUN --dry-run --set variants.0.selection=global "
        "--set variants.0.budget='{macs: 0.5}'",
    )
    parser.set_defaults(action=run)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run: its name, folder or URI")
    add_config(parser)
    add_variant(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the result and write nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the plan as JSON; needs RUN")
    add_runs(parser)


def run(options: argparse.Namespace) -> None:
    """Print the selection, and write the plan if requested."""
    from pipelines import select
    from pipelines.runs import find_run
    from scop.errors import UserError

    if not options.dry_run and options.output is None:
        raise UserError("give --output FILE for the plan, or --dry-run to print only")
    if options.output and options.run is None:
        raise UserError("--output writes a plan made from a run's scores: name the RUN, or give --dry-run")
    source, cache = find_run(options.run, options.runs) if options.run else None, open_cache()
    config = select.config_of(options.config, source, options.set, cache)
    variant = variant_of(config, options.variant)
    dense = select.dense_of_run(source, cache) if source else select.dense_of(config, cache)
    plan = select.plan_of(dense, variant)
    select.print_plan(dense, plan, variant)
    if options.output and not options.dry_run:
        write_output("--output", options.output, lambda path: select.save(plan, path))
        print(f"plan: {options.output}")
