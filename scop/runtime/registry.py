"""The pipeline's steps by name, with their inputs and outputs. Importing this module imports no step."""

from __future__ import annotations

from typing import NamedTuple


class Signature(NamedTuple):
    """Names of the folders that a step reads and writes.

    Attributes:
        inputs: names of its input folders; ``...`` marks those that take several.
        output: name of its output folder.
    """

    inputs: tuple[str, ...]
    output: str


STEPS = {
    "prepare_data": Signature((), "dataset"),
    "train_dense": Signature(("dataset",), "model"),
    "train_knockoff": Signature(("dataset", "dense"), "scores"),
    "select_channels": Signature(("dense", "scores"), "plan"),
    "finetune": Signature(("dataset", "dense", "plan"), "model"),
    "evaluate": Signature(("dataset", "dense", "pruned"), "evaluation"),
    "export": Signature(("dataset", "pruned", "evaluation"), "exported"),
    "compare": Signature(("scores", "evaluations...", "exports..."), "report"),
}
"""The steps, in execution order."""

VARIANT_STEPS = ("select_channels", "finetune", "evaluate", "export")
"""Steps that run once for each variant."""

TRAINING_STEPS = ("train_dense", "train_knockoff", "finetune")
"""Steps that benefit from GPUs and support several processes."""
