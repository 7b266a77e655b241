"""SCOP: prune convolutional networks with scientific control. The result is smaller, faster and verified.

scores = scop.train_knockoffs(model, batches)             # layer -> scores; the model is not changed
plan   = scop.select_channels(model, scores, prune_rate=0.45)
pruned = scop.prune(model, plan)                          # a smaller nn.Module
scop.save_model(pruned, "small/"); net = scop.load_model("small/")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scop.errors import UserError as UserError
    from scop.knockoffs.phase import train_knockoffs as train_knockoffs
    from scop.models.artifacts import load_model as load_model
    from scop.models.artifacts import save_model as save_model
    from scop.models.factories import make_model as make_model
    from scop.pruning.plan import ChannelPlan as ChannelPlan
    from scop.pruning.surgery import prune as prune
    from scop.selection.scores import Scores as Scores
    from scop.selection.select import select_channels as select_channels

# Imported when first used: `scop --help` should not wait for torch.
_HOMES = {
    "ChannelPlan": "scop.pruning.plan",
    "Scores": "scop.selection.scores",
    "UserError": "scop.errors",
    "load_model": "scop.models.artifacts",
    "make_model": "scop.models.factories",
    "prune": "scop.pruning.surgery",
    "save_model": "scop.models.artifacts",
    "select_channels": "scop.selection.select",
    "train_knockoffs": "scop.knockoffs.phase",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
