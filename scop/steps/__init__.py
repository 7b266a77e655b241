"""The pipeline's steps, one module each, and the runtime that gives every one the same life."""

STEPS = (
    "prepare_data",
    "train_dense",
    "train_knockoff",
    "select_channels",
    "finetune",
    "evaluate",
    "export",
    "compare",
)
