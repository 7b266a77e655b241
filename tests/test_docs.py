"""Tests that the commands in the README, docs/ and the components' READMEs are valid."""

import re
import shlex

import pytest

from pipelines.cli.main import make_parser
from pipelines.cli.options import DEFAULT_CONFIG
from pipelines.cluster import submit
from pipelines.cluster.submit import pin_files
from pipelines.presets import find_config, preset_names
from scop.config import load_config
from scop.storage.cache import Cache
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "components").glob("*/README.md"))]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Return (page, arguments) of each command of a program that a page shows after a prompt."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if line.startswith("$ ") else []
                words = [word for word in words if not re.match(r"^[A-Z_0-9]+=", word)]  # leading variables
                if words[:1] == [program]:
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize(("page", "words"), commands("scop"))
def test_cli_accepts_documented_commands(page: str, words: list[str], monkeypatch, cache: Cache) -> None:
    options = make_parser().parse_args(words)
    config = getattr(options, "config", None) or DEFAULT_CONFIG
    if config not in preset_names() or not hasattr(options, "set") or words[0] == "rerun":
        return
    values = load_config(find_config(config, cache), options.set)
    if words[0] == "submit":  # fails if a file is a local path
        monkeypatch.setattr(submit, "pin", lambda uri: uri)
        pin_files(values)


def test_docs_show_every_kind_of_command() -> None:
    assert {words[0] for _, words in commands("scop")} >= {
        "run",
        "step",
        "rerun",
        "compare",
        "doctor",
        "compile",
        "submit",
    }


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {word for _, words in commands("make") for word in words if re.fullmatch(r"[a-z-]+", word)}
    assert wanted
    assert wanted <= targets
