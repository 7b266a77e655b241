"""The channel plan: the kept output channels of each convolution. Selection returns it; surgery applies it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from scop.config import ResidualRule
from scop.errors import UserError
from scop.pruning.graph import out_channels


class ChannelPlan(BaseModel):
    """The kept output channels of each convolution.

    Attributes:
        input_shape: (C, H, W) of the images for which the plan was made.
        residual: the residual rule of the plan.
        kept: for each pruned convolution, the indices of the kept channels, ascending.
        channels: for each pruned convolution, its number of channels before pruning.
        method, selection: how the channels were selected, for the record.
        prune_rate: the requested rate, or the rate that meets the budget; for knockoff_plus the resulting rate.
        unsure: for each convolution whose scores have standard errors, the channels within two standard errors of the
            cut, whose selection is uncertain.
        latency_ms: measured latency of the pruned network in milliseconds, if the budget is a latency.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_shape: tuple[int, int, int]
    residual: ResidualRule
    kept: dict[str, Annotated[list[int], Field(min_length=1)]]
    channels: dict[str, int]
    method: str = "scop"
    selection: str = "uniform"
    prune_rate: float | None = None
    unsure: dict[str, list[int]] = {}
    latency_ms: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kept.keys() != self.channels.keys():
            raise ValueError("'kept' and 'channels' name different layers")
        for name, kept in self.kept.items():
            if kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.channels[name]:
                raise ValueError(
                    f"kept channels of {name!r} must be ascending, distinct and below {self.channels[name]}"
                )
        return self

    def removed(self, layer: str) -> list[int]:
        """Return the removed channels of a layer, ascending."""
        kept = set(self.kept[layer])
        return [channel for channel in range(self.channels[layer]) if channel not in kept]

    def doubtful(self, layer: str) -> tuple[list[int], list[int]]:
        """Return the kept and the removed channels of a layer whose selection is uncertain, each ascending."""
        kept = set(self.kept[layer])
        unsure = self.unsure.get(layer, [])
        return [c for c in unsure if c in kept], [c for c in unsure if c not in kept]

    @property
    def removes_nothing(self) -> bool:
        return all(len(kept) == self.channels[name] for name, kept in self.kept.items())

    def check(self, model: nn.Module) -> None:
        """Raise UserError unless the model has every layer of the plan, with the same number of channels."""
        layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        for name, channels in self.channels.items():
            if name not in layers:
                hint = difflib.get_close_matches(name, layers, n=1)
                meant = f" (did you mean {hint[0]!r}?)" if hint else ""
                raise UserError(f"layer {name!r} is in the plan but not in the model{meant}")
            if (own := out_channels(layers[name])) != channels:
                raise UserError(
                    f"layer {name!r} has {own} channels in the model but {channels} in the plan; was the plan made for "
                    "another network?"
                )

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ChannelPlan:
        """Read a plan from a JSON file; raises UserError if the file is missing or not a valid plan."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is not a channel plan: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"
    return str(error)
