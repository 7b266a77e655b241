"""The configuration: one section per step, each validated on its own.

A section is the parameter of exactly one component, so a change re-executes only what depends on it. Unknown keys and
bad values are refused by name. On a KFP backend all numbers of a section arrive as doubles; they are integers again
here wherever an integer is meant.
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
    """A whole configuration."""

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
        """Torchvision's networks take colour images: grey ones are given to them in three equal channels."""
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
                raise ValueError(f"variants: the name {label!r} is used twice; give them names")
        return self

    @model_validator(mode="after")
    def _variants_fit(self) -> Config:
        for variant in self.variants:
            finetune_for(self.finetune, variant)
        return self


class ConfigWithoutFinetuning(Config):
    """For what does not fine-tune: whether the variants' entries fit section `finetune`, which need not be there, is
    not looked at."""

    @model_validator(mode="after")
    def _variants_fit(self) -> ConfigWithoutFinetuning:
        return self


def finetune_for(section: FinetuneSection, variant: VariantSection) -> FinetuneSection:
    """The section `finetune` with a variant's own entries put in, however deep."""
    return parse(
        FinetuneSection, merged(section.model_dump(), variant.finetune), f"variants ({variant.label}).finetune"
    )


def load_config(path: Path | None, overrides: list[str] | None = None, kind: type[Config] = Config) -> Config:
    """Read a configuration file, or take the defaults, and put ``section.key=value`` entries in; values are YAML.

    Args:
        path: of the file.
        overrides: the entries.
        kind: what is checked.

    Raises:
        UserError: the file is missing or no YAML, or the configuration is bad.
    """
    values = {} if path is None else read_yaml(path)
    for change in overrides or []:
        override(values, change)
    return parse(kind, values)
