"""The `scop` command. It imports only the standard library until a command runs, so that help is fast."""

from __future__ import annotations

import argparse
import sys

import scop
from pipelines.cli import compare, compile, doctor, promote, rerun, run, select, step, submit, watch
from pipelines.cli.options import report_missing_module, report_user_error

COMMANDS = (run, step, rerun, select, compare, promote, doctor, compile, submit, watch)
"""One module per command; its `add_parser` sets the function that runs the command."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C.
    """
    options = make_parser().parse_args(arguments)
    from scop.errors import UserError
    from scop.system.garbage import collect_garbage_rarely

    collect_garbage_rarely()
    try:
        return int(options.action(options) or 0)
    except UserError as error:
        return report_user_error(error)
    except ModuleNotFoundError as error:
        return report_missing_module(error)
    except KeyboardInterrupt:
        print("scop: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `action` in its result is the function to call."""
    parser = argparse.ArgumentParser(
        prog="scop",
        description="Prune convolutional networks with scientific control (SCOP), as a Kubeflow pipeline.",
        epilog="Help on one command: scop COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=f"scop {scop.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return parser
