"""`make docs`: generate docs/configuration.md from the configuration sections and the environment variables."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scop import environment
from scop.config import Config, TrainingSection

PATH = Path(__file__).parents[1] / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

A configuration is a YAML file with the sections below. Keys that are not set have the default listed here.
`scop run -f FILE` runs a configuration; `--set section.key=value` overrides a value. Presets are in
[pipelines/configs](../pipelines/configs).

`make docs` generates this page from the docstrings in [scop/config](../scop/config) and
[scop/environment.py](../scop/environment.py).
"""
_VARIABLES = """
## Environment variables

[scop/environment.py](../scop/environment.py) defines every variable of the project. Users set those of the
first and the last table; the launcher of a step sets the others. MLflow, boto3 and the Kubernetes client read variables
of their own, such as `MLFLOW_TRACKING_USERNAME`, `AWS_ACCESS_KEY_ID` and `KUBECONFIG`.
"""


def render() -> str:
    """Return the page as Markdown."""
    described = "".join(_render_section(name, kind) for name, kind in sections())
    return _INTRODUCTION + described + _VARIABLES + "".join(map(_render_variables, environment.ALL))


def sections(kind: type[BaseModel] = Config, within: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the name and the class of each section, followed by those of its nested sections."""
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


def _render_variables(kind: type[BaseModel]) -> str:
    summary, meanings = (inspect.getdoc(kind) or "").split("\n\n")[0].rstrip("."), _meanings(kind)
    own = [key for key in kind.model_fields if key in kind.__annotations__]  # without the inherited ones
    rows = [
        f"| `{environment.name_of(kind, key)}` | {_default(kind.model_fields[key])} | {meanings[key]} |" for key in own
    ]
    return f"\n{summary}:\n\n| variable | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return "" if value is None else f"`{json.dumps(value)}`"


def _meanings(kind: type[BaseModel]) -> dict[str, str]:
    """Return attribute -> description from the docstring's "Attributes"; an entry may list several attributes."""
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
    """Return the settings that no docstring describes. A test requires that there are none."""
    missing = []
    for name, kind in sections():
        known = _meanings(kind) | (_meanings(TrainingSection) if issubclass(kind, TrainingSection) else {})
        missing += [f"{name}.{key}" for key in kind.model_fields if key not in known]
    for kind in environment.ALL:
        missing += [environment.name_of(kind, key) for key in kind.__annotations__ if key not in _meanings(kind)]
    return missing


if __name__ == "__main__":
    PATH.write_text(render())
