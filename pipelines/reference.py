"""`make docs`: docs/configuration.md, made from the sections' own docstrings and defaults."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scop.config import Config, TrainingSection

PATH = Path(__file__).parents[1] / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

A YAML file with these sections; what it leaves out has the default given here. `scop run -f FILE`, and
`--set section.key=value` changes an entry. Presets lie in [pipelines/configs](../pipelines/configs).

This page is made by `make docs` from the docstrings in [scop/config](../scop/config).
"""


def render() -> str:
    """The page, as Markdown."""
    return _INTRODUCTION + "".join(_render_section(name, kind) for name, kind in sections())


def sections(kind: type[BaseModel] = Config, within: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Names and kinds of all sections, each followed by those within it."""
    for key, field in kind.model_fields.items():
        for own in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(own) and issubclass(own, BaseModel):
                name = f"{within}{key}"
                yield (f"{name} (a list of these)" if get_origin(field.annotation) is list else name), own
                yield from sections(own, f"{name}.")


def _render_section(name: str, kind: type[BaseModel]) -> str:
    meanings = _meanings(TrainingSection) | _meanings(kind) if issubclass(kind, TrainingSection) else _meanings(kind)
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    rows = [f"| `{key}` | {_default(field)} | {meanings[key]} |" for key, field in kind.model_fields.items()]
    return f"\n## {name}\n\n{summary}\n\n| key | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return "" if value is None else f"`{json.dumps(value)}`"


def _meanings(kind: type[BaseModel]) -> dict[str, str]:
    """Attribute -> its description, from the docstring's list of attributes; one entry may name several."""
    _, _, block = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if match := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names = match[1].split(", ")
            meanings |= dict.fromkeys(names, match[2])
        elif line.strip():
            for name in names:
                meanings[name] += " " + line.strip()
    return {name: text.replace("|", "\\|") for name, text in meanings.items()}


def undocumented() -> list[str]:
    """Settings that no docstring describes; there should be none."""
    missing = []
    for name, kind in sections():
        known = _meanings(kind) | (_meanings(TrainingSection) if issubclass(kind, TrainingSection) else {})
        missing += [f"{name}.{key}" for key in kind.model_fields if key not in known]
    return missing


if __name__ == "__main__":
    PATH.write_text(render())
