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
    """Decide which channels stay.

    Args:
        variant: one entry of the configuration's list `variants`.
        dense: from train_dense.
        scores: from train_knockoff.
        plan: kept channels, layer by layer.
    """
    from scop.runtime.execution import execute

    execute(
        "select_channels",
        {"variant": variant},
        {"dense": dense.path, "scores": scores.path},
        {"plan": plan.path},
    )
