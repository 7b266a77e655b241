"""The pipeline's steps by name, with their inputs and outputs."""

from __future__ import annotations

STEPS = {
    "prepare_data": ("", "dataset"),
    "train_dense": ("dataset", "model"),
    "train_knockoff": ("dataset dense", "scores"),
    "select_channels": ("dense scores", "plan"),
    "finetune": ("dataset dense plan", "model"),
    "evaluate": ("dataset dense pruned", "evaluation"),
    "export": ("dataset pruned evaluation", "exported"),
    "compare": ("scores evaluations... exports...", "report"),
}
"""The steps in their order, with the names of their inputs and outputs, for help texts that must not import them."""


TRAINING_STEPS = ("train_dense", "train_knockoff", "finetune")
"""Those that gain by GPUs, and that several processes can share."""
