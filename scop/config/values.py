"""Types of configuration entries: number ranges, names, choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

LONGEST_NAME = 60
"""Maximum length of the name of a run or variant, in characters."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Pattern for names of runs, experiments and variants, which become part of paths and of registered models' names."""

ResidualRule = Literal["scatter", "inner", "coupled"]
Method = Literal["scop", "random", "l1", "bn_gamma", "fpgm", "scratch", "none"]
SelectionRule = Literal["uniform", "global", "knockoff_plus"]
Precision = Literal["auto", "bf16", "fp32"]
ScoreKind = Literal["fisher", "published"]
BatchNormMode = Literal["frozen", "own", "joint"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("must be in [0, 1): at least 0 and below 1")
    return value


Fraction = Annotated[float, AfterValidator(_below_one)]


def whole(value: Any) -> Any:
    """Return the value with all whole numbers converted to integers, including those in nested mappings and lists."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: whole(entry) for key, entry in value.items()}
    return [whole(entry) for entry in value] if isinstance(value, list) else value
