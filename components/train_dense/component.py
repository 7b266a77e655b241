"""Step 2: dense training."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_dense(
    dense: dict[str, Any],
    dataset: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Train the dense network, or load the given weights, and measure it.

    Args:
        dense: section `dense` of the configuration.
        dataset: output of prepare_data.
        model: the dense network.
        metrics: parameters, MACs and accuracy on the validation split.
    """
    from scop.runtime.execution import execute

    result = execute("train_dense", {"dense": dense}, {"dataset": dataset.path}, {"model": model.path})
    metrics.metadata.update(result.metrics)
    result.save(metrics.path)
