"""The channel plan: which output channels of which convolutions stay. The result of selection, the input of surgery."""

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
    """Kept output channels, layer by layer.

    Attributes:
        input_shape: (C, H, W) of the images for which the plan was made.
        residual: the rule for residual streams under which the plan is carried out.
        kept: for each pruned convolution the indices that stay, ascending.
        channels: for each pruned convolution how many channels it had.
        method, selection: what selected them, for the record.
        prune_rate: the rate that was asked for, or that meets a budget; for knockoff_plus that which came of it.
        unsure: for each convolution with known standard errors the channels whose scores lie within two of them of the
            cut: others might have gone as well.
        latency_ms: of the network that it leaves, measured when a budget of latency was met.
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
        """The channels of a layer that go, ascending."""
        kept = set(self.kept[layer])
        return [channel for channel in range(self.channels[layer]) if channel not in kept]

    def doubtful(self, layer: str) -> tuple[list[int], list[int]]:
        """The channels of a layer that stay and those that go of which the selection was not sure, ascending."""
        kept = set(self.kept[layer])
        unsure = self.unsure.get(layer, [])
        return [c for c in unsure if c in kept], [c for c in unsure if c not in kept]

    @property
    def removes_nothing(self) -> bool:
        return all(len(kept) == self.channels[name] for name, kept in self.kept.items())

    def check(self, model: nn.Module) -> None:
        """Raise UserError unless every layer of the plan is one of the model with that many channels."""
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
        """Read a plan; raises UserError where it is not one."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is not a channel plan: {_first_line(error)}") from error


def _first_line(error: Any) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"
    return str(error)
