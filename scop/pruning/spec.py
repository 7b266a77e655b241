"""What it takes, besides the weights, to build a network again: factory, arguments, and what was cut from it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue
from torch import nn

from scop.pruning.plan import ChannelPlan


class LayerCut(BaseModel):
    """What one layer loses, in indices of the unpruned layer.

    Attributes:
        out: removed output channels (the channels, for layers that have one kind only).
        into: removed input channels.
        scatter: the remaining output channels are added at their old places to a residual stream of full width.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: list[int] = []
    into: list[int] = []
    scatter: bool = False


class ModelSpec(BaseModel):
    """The description of a network.

    Attributes:
        factory, arguments: see `scop.models.factories.make_model`; None where nobody has said how the network is made.
        cuts: what surgery took away, layer by layer; empty for a dense network.
        plan: the plan behind the cuts.
        input_shape: (C, H, W) of an image.
        mean, std: of the images per channel, for pixels in [0, 1].
        classes: class names, by output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    factory: str | None = None
    arguments: dict[str, JsonValue] = {}
    cuts: dict[str, LayerCut] = {}
    plan: ChannelPlan | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: list[float] = []
    std: list[float] = []
    classes: list[str] = []


def spec_of(model: nn.Module) -> ModelSpec | None:
    """The spec of a network made by `scop.make_model`, `scop.prune` or `scop.load_model`, else None."""
    spec: ModelSpec | None = model.__dict__.get("scop_spec")
    return spec


def attach_spec(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """Have a network carry its spec; copies of it carry it too."""
    model.__dict__["scop_spec"] = spec
    return model
