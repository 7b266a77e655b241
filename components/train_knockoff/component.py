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
    """Score every channel against its knockoff.

    Args:
        knockoff: section `knockoff` of the configuration.
        dataset: output of prepare_data.
        dense: output of train_dense; not modified.
        scores: gates and scores of each layer.
    """
    from scop.runtime.execution import execute

    execute(
        "train_knockoff",
        {"knockoff": knockoff},
        {"dataset": dataset.path, "dense": dense.path},
        {"scores": scores.path},
    )
