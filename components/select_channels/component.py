"""Step 4: channel selection."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select_channels(
    variant: dict[str, Any],
    dense: Input[Model],
    scores: Input[Artifact],
    plan: Output[Artifact],
) -> None:
    """Choose the channels to keep.

    Args:
        variant: one entry of `variants` in the configuration.
        dense: output of train_dense.
        scores: output of train_knockoff.
        plan: kept channels of each layer.
    """
    from scop.runtime.execution import execute

    execute(
        "select_channels",
        {"variant": variant},
        {"dense": dense.path, "scores": scores.path},
        {"plan": plan.path},
    )
