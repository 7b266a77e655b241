"""The configuration, in sections that are validated separately.

A pipeline step receives only the sections that it uses, so a change re-executes only the steps that depend on it.
Unknown keys and invalid values are reported by name. KFP passes all numbers as doubles; where an integer is expected,
they are converted back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from scop.config.data import DataSection
from scop.config.knockoff import GaussianSection, GeneratorSection, KnockoffSection, SensitivitySection
from scop.config.output import EvaluateSection, ExportSection, RunSection
from scop.config.parsing import Section, merged, override, parse, read_yaml
from scop.config.training import CIFAR_RESNETS, DenseSection, DistillationSection, FinetuneSection, TrainingSection
from scop.config.values import BatchNormMode, PositiveInt, Precision, ResidualRule, ScoreKind
from scop.config.variants import BudgetSection, VariantSection

__all__ = [
    "CIFAR_RESNETS",
    "BatchNormMode",
    "BudgetSection",
    "Config",
    "ConfigWithoutFinetuning",
    "DataSection",
    "DenseSection",
    "DistillationSection",
    "EvaluateSection",
    "ExportSection",
    "FinetuneSection",
    "GaussianSection",
    "GeneratorSection",
    "KnockoffSection",
    "PositiveInt",
    "Precision",
    "ResidualRule",
    "RunSection",
    "ScoreKind",
    "SensitivitySection",
    "TrainingSection",
    "VariantSection",
    "finetune_for",
    "load_config",
]


class Config(Section):
    """A complete configuration."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    dense: DenseSection = DenseSection()
    knockoff: KnockoffSection = KnockoffSection()
    variants: Annotated[list[VariantSection], Field(min_length=1)] = [VariantSection()]
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="before")
    @classmethod
    def _colour_for_torchvision(cls, values: Any) -> Any:
        """Set `data.channels` to 3 by default for torchvision networks, which expect colour images."""
        data, dense = (values.get(name) or {} for name in ("data", "dense")) if isinstance(values, dict) else ({}, {})
        if not isinstance(data, dict) or not isinstance(dense, dict) or data.get("channels") is not None:
            return values
        torchvision = str(dense.get("model", "")).startswith("torchvision:")
        return {**values, "data": {**data, "channels": 3}} if torchvision else values

    @field_validator("variants")
    @classmethod
    def _seed_by_seed(cls, value: list[VariantSection]) -> list[VariantSection]:
        return [one for variant in value for one in variant.each_seed]

    @model_validator(mode="after")
    def _labels_differ(self) -> Config:
        labels = [variant.label for variant in self.variants]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"variants: the name {label!r} is used twice; give each variant its own name")
        return self

    @model_validator(mode="after")
    def _variants_fit(self) -> Config:
        for variant in self.variants:
            finetune_for(self.finetune, variant)
        return self


class ConfigWithoutFinetuning(Config):
    """A configuration for commands that do not fine-tune: the `finetune` entries of variants are not validated."""

    @model_validator(mode="after")
    def _variants_fit(self) -> ConfigWithoutFinetuning:
        return self


def finetune_for(section: FinetuneSection, variant: VariantSection) -> FinetuneSection:
    """Return section `finetune` with the variant's overrides applied; raise UserError if one of them is invalid."""
    return parse(
        FinetuneSection, merged(section.model_dump(), variant.finetune), f"variants ({variant.label}).finetune"
    )


def load_config(path: Path | None, overrides: list[str] | None = None, kind: type[Config] = Config) -> Config:
    """Read a configuration file and apply overrides.

    Args:
        path: the file, or None for the defaults.
        overrides: entries ``section.key=value``; values are YAML.
        kind: class to validate against.

    Raises:
        UserError: the file is missing or not valid YAML, or the configuration is invalid.
    """
    values = {} if path is None else read_yaml(path)
    for change in overrides or []:
        override(values, change)
    return parse(kind, values)
