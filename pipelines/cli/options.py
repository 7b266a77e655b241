"""Options shared by several commands, and functions that evaluate them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.cluster.profile import ClusterProfile
    from scop.config import Config, VariantSection
    from scop.errors import UserError
    from scop.storage.cache import Cache

DEFAULT_CONFIG = "digits-resnet20"
Commands = Any
"""What `argparse.ArgumentParser.add_subparsers` returns; argparse has no public type for it."""


def add_config(parser: argparse.ArgumentParser, help_text: str | None = None) -> None:
    """Add -f and --set."""
    default = f"a YAML file, or the name of a preset (default: {DEFAULT_CONFIG})"
    parser.add_argument("-f", "--config", metavar="CONFIG", help=help_text or default)
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting, such as finetune.epochs=3 or variants.0.prune_rate=0.3 (repeatable)",
    )


def add_docker(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add --docker, with an optional image."""
    parser.add_argument("--docker", nargs="?", const="", metavar="IMAGE", help=help_text)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add --runs."""
    help_text = "the folder or s3:// URI that holds the runs (default: runs)"
    parser.add_argument("--runs", default="runs", metavar="DIR", help=help_text)


def add_variant(parser: argparse.ArgumentParser) -> None:
    """Add --variant."""
    parser.add_argument("--variant", metavar="NAME", help="a variant of the configuration (default: the first)")


def add_interval(parser: argparse.ArgumentParser) -> None:
    """Add --every."""
    help_text = "polling interval (default: 10)"
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help=help_text)


def report_user_error(error: UserError) -> int:
    """Print a user's mistake with its notes, and return the exit code."""
    from scop.runtime.exit_codes import exit_code_of

    print(f"scop: error: {error}", *notes_of(error), sep="\n", file=sys.stderr)
    return int(exit_code_of(error))


def report_missing_module(error: ModuleNotFoundError) -> int:
    """Print which extra installs a missing module, and return the exit code; raise if no extra does."""
    from scop.errors import missing_extra

    if (mistake := missing_extra(error)) is None:
        raise error
    return report_user_error(mistake)


def notes_of(error: Exception) -> list[str]:
    """Return the notes of an error, which say how to continue, as lines for the user."""
    return [f"scop: {note}" for note in getattr(error, "__notes__", ())]


def variant_of(config: Config, label: str | None) -> VariantSection:
    """Return the variant with this name, or the first if None; raise UserError if it does not exist."""
    from scop.errors import UserError

    variants = {variant.label: variant for variant in config.variants}
    if label is None:
        return config.variants[0]
    if label not in variants:
        raise UserError(f"--variant {label!r} is not in the configuration (known: {', '.join(variants)})")
    return variants[label]


def image_of(option: str | None) -> str | None:
    """Return the image given by --docker, by default the project's own; None without --docker."""
    from components.image import IMAGE

    return option if option is None else option or IMAGE


def open_cache() -> Cache:
    """Return the local cache of files fetched from S3, in the user's folder."""
    from scop.environment import UserEnvironment
    from scop.storage.cache import Cache

    return Cache(UserEnvironment.read().cache_folder)


def load_configuration(options: argparse.Namespace, kind: type[Config] | None = None) -> Config:
    """Load the configuration given by -f and --set, or the default one."""
    from pipelines.presets import find_config
    from scop.config import Config, load_config

    return load_config(find_config(options.config or DEFAULT_CONFIG, open_cache()), options.set, kind or Config)


def load_cluster(name: str) -> ClusterProfile:
    """Load a cluster profile; print a note if its image may change under the same name."""
    from pipelines.cluster.profile import load_profile
    from scop.storage.fetch import local_path

    profile = load_profile(local_path(name, open_cache()))
    if not profile.has_digest:
        print(
            f"note: image {profile.image} is named by a tag; KFP's cache does not notice when a tag moves, so name the "
            "image by its digest",
            file=sys.stderr,
        )
    return profile


def write_output(option: str, path: Path, write: Callable[[Path], object]) -> None:
    """Write the file or folder given by an option; raise UserError if that fails."""
    from scop.errors import UserError

    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from error
