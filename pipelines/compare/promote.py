"""Promoting a registered model to champion, if its measurements are within the limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.compare.experiments import Mlflow, Source
from scop.errors import UserError, first_line

CHAMPION = "champion"
LIMITS = ("max_top1_drop", "tolerance")
"""Settings of section `export` that limit a version; each version has them as tags."""
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_VERSION = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:/(?P<number>\d+)|@(?P<alias>[\w.-]+))")


@dataclass(frozen=True)
class Gate:
    """A condition on a model.

    Attributes:
        what: name of the setting with the limit.
        value: measured value.
        limit: maximum value.
        text: description of value and limit.
    """

    what: str
    value: float
    limit: float
    text: str

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Promotion:
    """The decision on a version of a model.

    Attributes:
        name, number: name of the model and number of the version.
        before: number of the previous champion, or None.
        gates: the conditions.
        tracking_uri: URI of MLflow, to load the model.
    """

    name: str
    number: str
    before: str | None
    gates: list[Gate]
    tracking_uri: str

    @property
    def promoted(self) -> bool:
        return all(gate.holds for gate in self.gates)


def promote(version: str, source: Source, limits: Mapping[str, float] | None = None) -> Promotion:
    """Give a version of a model the alias `champion` if all conditions hold.

    Args:
        version: ``NAME/3`` or ``NAME@candidate``, with or without ``models:/``.
        source: location of MLflow.
        limits: `max_top1_drop` and `tolerance`; by default those at export.

    Raises:
        UserError: there is no such version, it was not exported by this pipeline, or MLflow cannot be reached.
    """
    if (found := _VERSION.fullmatch(version)) is None:
        raise UserError(f"{version!r} does not name a version of a model; write NAME/NUMBER or NAME@ALIAS")
    mlflow, name = Mlflow(source, "promote"), found["name"]
    with mlflow.asking():
        entry = _entry(mlflow.client, version, name, found["number"], found["alias"])
        gates = _gates(entry.tags, limits or {}, version)
        champion = _champion(mlflow.client, name)
        promotion = Promotion(name, str(entry.version), champion, gates, mlflow.uri)
        if promotion.promoted:
            mlflow.client.set_registered_model_alias(name, CHAMPION, promotion.number)
    return promotion


def _entry(client: Any, version: str, name: str, number: str | None, alias: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        if number is not None:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        names = sorted(model.name for model in client.search_registered_models(max_results=20))
        raise UserError(
            f"there is no {version!r} in MLflow's registry ({first_line(error)}); it has: {', '.join(names) or 'none'}"
        ) from error


def _gates(tags: Mapping[str, str], limits: Mapping[str, float], version: str) -> list[Gate]:
    try:
        drop, difference = float(tags["top1_drop"]), float(tags["difference"])
        max_drop, tolerance = (float(limits[key] if key in limits else tags[key]) for key in LIMITS)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{version} has no measurements (tag {error}); promote a version that step export registered"
        ) from error
    return [
        Gate("top-1 drop", drop, max_drop, f"top-1 drop {100 * drop:.2f} points, at most {100 * max_drop:.2f}"),
        Gate("exactness", difference, tolerance, f"exported logits differ by {difference:.2g}, at most {tolerance:g}"),
    ]


def _champion(client: Any, name: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        return None
