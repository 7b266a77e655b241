"""`make docs`: docs/configuration.md, made from the sections' own docstrings and defaults."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from scop.config import (
    DataSection,
    DenseSection,
    DistillationSection,
    EvaluateSection,
    ExportSection,
    FinetuneSection,
    KnockoffSection,
    RunSection,
    TrainingSection,
    VariantSection,
)

PATH = Path(__file__).parents[1] / "docs" / "configuration.md"
_SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("run", RunSection),
    ("data", DataSection),
    ("dense", DenseSection),
    ("knockoff", KnockoffSection),
    ("variants (a list of these)", VariantSection),
    ("finetune", FinetuneSection),
    ("finetune.distillation", DistillationSection),
    ("evaluate", EvaluateSection),
    ("export", ExportSection),
]
_INTRODUCTION = """# Configuration

A YAML file with these sections; what it leaves out has the default given here. `scop run -f FILE`, and
`--set section.key=value` changes an entry. Presets lie in [pipelines/configs](../pipelines/configs).

This page is made by `make docs` from the docstrings in [scop/config.py](../scop/config.py).
"""


def render() -> str:
    """The page, as Markdown."""
    return _INTRODUCTION + "".join(_render_section(name, kind) for name, kind in _SECTIONS)


def _render_section(name: str, kind: type[BaseModel]) -> str:
    meanings = _meanings(TrainingSection) | _meanings(kind) if issubclass(kind, TrainingSection) else _meanings(kind)
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    rows = [
        f"| `{key}` | {_default(field.get_default(call_default_factory=True))} | {meanings[key]} |"
        for key, field in kind.model_fields.items()
    ]
    return f"\n## {name}\n\n{summary}\n\n| key | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _default(value: Any) -> str:
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
    for name, kind in _SECTIONS:
        known = _meanings(kind) | (_meanings(TrainingSection) if issubclass(kind, TrainingSection) else {})
        missing += [f"{name}.{key}" for key in kind.model_fields if key not in known]
    return missing


if __name__ == "__main__":
    PATH.write_text(render())
