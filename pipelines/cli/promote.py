"""`scop promote`: make a registered model the champion."""

from __future__ import annotations

import argparse
import sys

from pipelines.cli.options import Commands, add_config, add_runs, open_cache


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "promote",
        help="make a registered model the champion",
        description="Give a version of a registered model the alias `champion` if its accuracy drop and its exactness "
        "are within the limits of section `export`. If they are not, the exit code is 1.",
        epilog="example: scop promote digits-resnet20-scop@candidate; then mlflow.pyfunc.load_model("
        "'models:/digits-resnet20-scop@champion')",
    )
    parser.set_defaults(action=run)
    parser.add_argument("version", metavar="VERSION", help="NAME/NUMBER or NAME@ALIAS, optionally after models:/")
    add_config(parser, "a YAML file or preset whose section export has the limits (default: those at export)")
    add_runs(parser)


def run(options: argparse.Namespace) -> int:
    """Promote the model, or print why it is not promoted."""
    from pipelines.compare.experiments import Source
    from pipelines.compare.promote import CHAMPION, LIMITS, promote
    from pipelines.presets import find_config
    from scop.config import load_config
    from scop.environment import UserEnvironment

    # Without a file, limits not given by --set are those at export, not those of a preset.
    path = find_config(options.config, open_cache()) if options.config else None
    export = load_config(path, options.set).export
    limits = export.model_dump(include=set(LIMITS), exclude_unset=not options.config)
    source = Source(options.runs, UserEnvironment.read().tracking_uri)
    outcome = promote(options.version, source, limits)
    for gate in outcome.gates:
        print(f"{'holds' if gate.holds else 'FAILS'}: {gate.text}")
    champion = f"models:/{outcome.name}@{CHAMPION}"
    before = f"version {outcome.before}" if outcome.before else "none"
    if not outcome.promoted:
        print(f"scop: version {outcome.number} is not promoted; {champion} stays {before}", file=sys.stderr)
        return 1
    print(f"{champion} is now version {outcome.number} (before: {before})")
    if source.tracking_uri is None:
        print(f"to load it: mlflow.set_tracking_uri({outcome.tracking_uri!r}); mlflow.pyfunc.load_model({champion!r})")
    return 0
