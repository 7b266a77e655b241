"""Reading and validating configuration: YAML files, overrides, and error messages of one line.

Sections are pydantic models. pydantic finds the mistake; this module reports it with the entry's path, its value and,
for a misspelt key, the most similar valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from scop.errors import UserError


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's entries with changes merged in, nested mappings included."""
    both = {key: values[key] for key in changes if isinstance(values.get(key), Mapping)}
    deeper = {key: merged(old, changes[key]) for key, old in both.items() if isinstance(changes[key], Mapping)}
    return {**values, **changes, **deeper}


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], values: Mapping[str, Any], where: str = "", what: str = "configuration") -> S:
    """Validate a section.

    Args:
        kind: class of the section.
        values: entries of the section.
        where: path of the section, for the message.
        what: what contains the section, for the message.

    Raises:
        UserError: an entry is invalid; the message names the first one, its value and what is valid.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_explain(error, kind, where, what)) from error


def _explain(error: ValidationError, kind: type[BaseModel], where: str, what: str) -> str:
    first = error.errors()[0]
    path = [*filter(None, [where]), *map(str, first["loc"])]
    field = ".".join(path) or what
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, first["loc"][:-1])
        hint = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        meant = f"did you mean {hint[0]!r}?" if hint else f"valid keys: {', '.join(sorted(known))}"
        return f"{what} key {field!r} is unknown ({meant})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        if not first["loc"]:
            return f"{what}: {message}"
        given = f" is {first['input']!r}" if isinstance(first["input"], str | int | float) else ""
        return f"{what} {field!r}{given}: {message}"
    if first["type"] == "missing":
        return f"{what} {field!r} is missing"
    return f"{what} {field!r} is {first['input']!r}: {message[:1].lower()}{message[1:]}"


def _fields_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys at a path within a section."""
    current: Any = kind
    for part in path:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        current = next((a for a in (annotation, *_arguments(annotation)) if _is_model(a)), None)
        if current is None:
            return []
    return list(current.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for argument in getattr(annotation, "__args__", ()):
        found += [argument, *_arguments(argument)]
    return found


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


# YAML is imported inside the functions that read it: training from Python does not need the package.


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file; raise UserError if it does not hold a mapping."""
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _strict_loader())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    return values


def _strict_loader() -> Any:
    """Return a variant of YAML's safe loader that refuses duplicate keys; the original silently uses the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(problem=f"duplicate key {key!r}", problem_mark=node.start_mark)
        found: dict[Any, Any] = loader.construct_mapping(node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def override(values: dict[str, Any], change: str) -> None:
    """Set a ``section.key=value`` entry in a configuration's values, in place; raise UserError if it is invalid."""
    import yaml

    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set {change!r} must have the form section.key=value")
    parts = key.split(".")
    last = parts[-1]
    target: Any = values
    try:
        for part, following in pairwise(parts):
            if isinstance(target, dict) and target.get(part) is None:  # missing or null
                target[part] = [{}] if following == "0" else {}
            target = target[int(part) if isinstance(target, list) else part]
        target[int(last) if isinstance(target, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"--set {key!r}: there is no such entry in the configuration") from error
    except yaml.YAMLError as error:
        raise UserError(f"--set {key!r}: {text!r} is not valid YAML") from error
