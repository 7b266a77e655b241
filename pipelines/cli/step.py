"""`scop step`: run one step on folders."""

from __future__ import annotations

import argparse
import os

from pipelines.cli.options import DEFAULT_CONFIG, Commands, add_config, add_variant, variant_of


def add_parser(commands: Commands) -> None:
    """Add the command."""
    from scop.runtime.registry import STEPS

    parser = commands.add_parser(
        "step",
        help="run one step on folders",
        description="Run one step on folders, as its container does, without KFP.",
        epilog=_describe_steps(STEPS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(action=run)
    parser.add_argument("name", metavar="NAME", help="a step of the list below")
    add_config(parser)
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=DIR", help="an input folder or s3:// URI (repeatable)"
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="NAME=DIR", help="an output folder or s3:// URI (repeatable)"
    )
    add_variant(parser)


def _describe_steps(steps: dict[str, tuple[str, str]]) -> str:
    inputs = max(len(inputs) for inputs, _ in steps.values())
    lines = [f"  {name:16} {given or '-':{inputs}}  ->  {made}" for name, (given, made) in steps.items()]
    return "\n".join(["steps, with their inputs and their output ('...' takes several folders):", *lines])


def run(options: argparse.Namespace) -> None:
    """Run the step in this process."""
    from pipelines.presets import find_config
    from scop.config import Config, ConfigWithoutFinetuning, load_config
    from scop.runtime.execution import run_step
    from scop.runtime.places import absolute
    from scop.runtime.resume import CHECKPOINTS_VARIABLE, KEEP_VARIABLE
    from scop.runtime.step import find_step

    wanted = find_step(options.name).Config.model_fields
    kind = Config if "finetune" in wanted else ConfigWithoutFinetuning
    config = load_config(find_config(options.config or DEFAULT_CONFIG), options.set, kind)
    variant = variant_of(config, options.variant)
    sections = config.model_dump(mode="json") | {"variant": variant.model_dump(mode="json")}
    if config.run.checkpoints:
        os.environ.setdefault(CHECKPOINTS_VARIABLE, absolute(config.run.checkpoints))
        os.environ.setdefault(KEEP_VARIABLE, str(config.run.keep_checkpoints))
    run_step(
        options.name,
        {name: sections[name] for name in wanted},
        _pairs(options.input, "--input"),
        {name: values[-1] for name, values in _pairs(options.output, "--output").items()},
    )


def _pairs(arguments: list[str], option: str) -> dict[str, list[str]]:
    """Return NAME=DIR arguments by name; a name that is repeated has several folders."""
    from scop.errors import UserError

    pairs: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"{option} {argument!r} must have the form NAME=DIR")
        pairs.setdefault(name, []).append(folder)
    return pairs
