"""Step 3: knockoff training."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_knockoff(
    knockoff: dict[str, Any],
    dataset: Input[Dataset],
    dense: Input[Model],
    scores: Output[Artifact],
) -> None:
    """Let every channel compete with its knockoff, and score it.

    Args:
        knockoff: the configuration's section `knockoff`.
        dataset: from prepare_data.
        dense: from train_dense; it is left as it is.
        scores: gates and scores, layer by layer.
    """
    from scop.runtime.execution import execute

    execute(
        "train_knockoff",
        {"knockoff": knockoff},
        {"dataset": dataset.path, "dense": dense.path},
        {"scores": scores.path},
    )
