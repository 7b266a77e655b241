"""SCOP: prune a convolutional network by scientific control, and get back a smaller, faster, verified one.

scores = scop.train_knockoffs(model, batches)             # dict layer -> W, the model left as it was
plan   = scop.select_channels(model, scores, prune_rate=0.45)
pruned = scop.prune(model, plan)                          # a smaller nn.Module
scop.save_model(pruned, "small/"); net = scop.load_model("small/")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from scop.artifacts import load_model as load_model
    from scop.artifacts import save_model as save_model
    from scop.errors import UserError as UserError
    from scop.knockoff import train_knockoffs as train_knockoffs
    from scop.models import make_model as make_model
    from scop.plan import ChannelPlan as ChannelPlan
    from scop.scores import Scores as Scores
    from scop.selection import select_channels as select_channels
    from scop.surgery import prune as prune

# Imported when first used: `scop --help` should not wait for torch.
_HOMES = {
    "ChannelPlan": "scop.plan",
    "Scores": "scop.scores",
    "UserError": "scop.errors",
    "load_model": "scop.artifacts",
    "make_model": "scop.models",
    "prune": "scop.surgery",
    "save_model": "scop.artifacts",
    "select_channels": "scop.selection",
    "train_knockoffs": "scop.knockoff",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
