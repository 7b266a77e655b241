"""The spec of a network: what is needed, besides its weights, to rebuild it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue
from torch import nn

from scop.pruning.plan import ChannelPlan


class LayerCut(BaseModel):
    """The channels that one layer loses, as indices in the unpruned layer.

    Attributes:
        out: removed output channels; for layers with only one kind of channel, such as norms, the removed channels.
        into: removed input channels.
        scatter: whether the remaining output channels are added to a full-width residual stream, at their original
            indices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: list[int] = []
    into: list[int] = []
    scatter: bool = False


class ModelSpec(BaseModel):
    """The description from which a network is rebuilt.

    Attributes:
        factory, arguments: see `scop.models.factories.make_model`; the factory is None if it is unknown.
        cuts: the channels that surgery removed, by layer; empty for a dense network.
        plan: the plan from which the cuts were made.
        input_shape: (C, H, W) of an image.
        mean, std: per channel, of pixels in [0, 1].
        classes: class names, in the order of the outputs.
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
    """Return the spec of a network made by `scop.make_model`, `scop.prune` or `scop.load_model`, else None."""
    spec: ModelSpec | None = model.__dict__.get("scop_spec")
    return spec


def attach_spec(model: nn.Module, spec: ModelSpec) -> nn.Module:
    """Attach a spec to a network and return the network; copies of the network keep it."""
    model.__dict__["scop_spec"] = spec
    return model
