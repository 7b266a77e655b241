"""`scop step`: run one step on folders."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipelines.cli.options import Commands, add_config, add_variant, load_configuration, variant_of

if TYPE_CHECKING:
    from scop.runtime.registry import Signature


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
    parser.add_argument("name", metavar="NAME", help="one of the steps listed below")
    add_config(parser)
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=DIR", help="an input folder or s3:// URI (repeatable)"
    )
    parser.add_argument(
        "--output", action="append", default=[], metavar="NAME=DIR", help="an output folder or s3:// URI (repeatable)"
    )
    add_variant(parser)


def _describe_steps(steps: dict[str, Signature]) -> str:
    inputs = {name: " ".join(step.inputs) or "-" for name, step in steps.items()}
    width = max(map(len, inputs.values()))
    lines = [f"  {name:16} {inputs[name]:{width}}  ->  {step.output}" for name, step in steps.items()]
    return "\n".join(["steps, with their inputs and their output ('...' takes several folders):", *lines])


def run(options: argparse.Namespace) -> int:
    """Run the step in this process; return its exit code."""
    from scop.config import Config, ConfigWithoutFinetuning
    from scop.environment import StepEnvironment, TorchrunEnvironment
    from scop.errors import Stopped
    from scop.runtime.execution import run_step
    from scop.runtime.exit_codes import StepFailedError, exit_code_of
    from scop.runtime.logs import log_to_standard_output
    from scop.runtime.step import find_step
    from scop.runtime.uris import absolute_uri
    from scop.system.progress import show_progress_on

    wanted = find_step(options.name).Config.model_fields
    kind = Config if "finetune" in wanted else ConfigWithoutFinetuning
    config = load_configuration(options, kind)
    variant = variant_of(config, options.variant)
    sections = config.model_dump(mode="json") | {"variant": variant.model_dump(mode="json")}
    environment = StepEnvironment.read()
    if config.run.checkpoints and not environment.checkpoints:
        kept = {"checkpoints": absolute_uri(config.run.checkpoints), "keep_checkpoints": config.run.keep_checkpoints}
        environment = environment.model_copy(update=kept)
    log_to_standard_output()
    try:
        with show_progress_on(environment.terminal):
            run_step(
                options.name,
                {name: sections[name] for name in wanted},
                _pairs(options.input, "--input"),
                {name: values[-1] for name, values in _pairs(options.output, "--output").items()},
                environment,
                TorchrunEnvironment.read(),
            )
    except (Stopped, StepFailedError) as error:
        return exit_code_of(error)
    return 0


def _pairs(arguments: list[str], option: str) -> dict[str, list[str]]:
    """Return NAME=DIR arguments by name; a repeated name has several folders."""
    from scop.errors import UserError

    pairs: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"{option} {argument!r} must have the form NAME=DIR")
        pairs.setdefault(name, []).append(folder)
    return pairs
