"""`scop compare`: compare results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.cli.options import Commands, add_runs, open_cache, write_output

_PAIRS_SHOWN = 12


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "compare",
        help="compare results",
        description="Compare results: of runs, from their artifacts, which may be local, in S3 or on a "
        "cluster; of experiments, from MLflow. Failed variants and steps are listed with their reason; if a variant of "
        "a run is missing, the exit code is 1.",
        epilog='example: scop compare digits-resnet20 --where "metrics.top1_drop < 0.01" --group-by method,prune_rate',
    )
    parser.set_defaults(action=run)
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="a run (its name, folder or s3:// URI) or the name of an MLflow experiment (default: all experiments)",
    )
    parser.add_argument(
        "--where", metavar="EXPRESSION", help="filter results of experiments, in MLflow's filter syntax"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric to show as a column; rows are sorted by the first one (repeatable)",
    )
    parser.add_argument(
        "--group-by",
        default="",
        metavar="NAME,...",
        help="one row for all results with equal values of these parameters: mean, standard deviation, n",
    )
    parser.add_argument("--baseline", metavar="NAME", help="show changes relative to `dense` or to a variant")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an interactive page as a single file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table with raw values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON (runs: as in summary.json)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the plots as PNG")
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Print the comparison and write the requested files."""
    import json
    from dataclasses import asdict

    from pipelines.compare.comparison import compare
    from pipelines.compare.experiments import Source
    from pipelines.compare.table import as_csv, as_json, print_table, tables
    from scop.environment import UserEnvironment
    from scop.errors import UserError
    from scop.report.paired_comparison import compare_pairs
    from scop.storage.manifest import write_atomically

    given = [path for path in (options.html, options.csv, options.json, options.png) if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise UserError("--html, --csv, --json and --png need different paths")
    source = Source(options.runs, UserEnvironment.read().tracking_uri)
    details = bool(options.html or options.png)
    found = compare(options.targets, source, open_cache(), options.where, details)
    keys = [key.strip() for key in options.group_by.split(",") if key.strip()]
    side_by_side = tables(found.results, options.metric, keys, options.baseline)
    for table in side_by_side:
        print_table(table)
        print()
    pairs = compare_pairs(found.results)
    for pair in pairs[:_PAIRS_SHOWN]:
        print(f"paired:  {pair}")
    if len(pairs) > _PAIRS_SHOWN:
        print(f"paired:  {len(pairs) - _PAIRS_SHOWN} more, see --json")
    for entry in found.spent:
        print(f"cost:    {entry.time} on {entry.device}, energy {entry.energy}, {entry.what}")
    if options.html:
        write_output("--html", options.html, found.page.write)
        print(f"report:  {options.html}")
    if options.json:
        content = found.summary or {"experiments": found.title, "missing": found.missing}
        content = {
            **content,
            "paired": [asdict(pair) for pair in pairs],
            "spent": [asdict(entry) for entry in found.spent],
            "tables": as_json(side_by_side),
        }
        text = json.dumps(content, indent=1) + "\n"
        write_output("--json", options.json, lambda path: write_atomically(path, text))
        print(f"summary: {options.json}")
    if options.csv:
        write_output("--csv", options.csv, lambda path: write_atomically(path, as_csv(side_by_side)))
        print(f"table:   {options.csv}")
    if options.png:
        from scop.report.page.pictures import write_pictures

        write_output("--png", options.png, lambda folder: write_pictures(found.page, folder))
        print(f"plots:   {options.png}")
    for what in found.unread:
        print(f"left out: {what}", file=sys.stderr)
    for name, why in found.missing.items():
        print(f"missing: {name}: {why}", file=sys.stderr)
    return int(bool(found.missing and found.summary))
