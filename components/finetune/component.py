"""Step 5: surgery and fine-tuning."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finetune(
    finetune: dict[str, Any],
    variant: dict[str, Any],
    dataset: Input[Dataset],
    dense: Input[Model],
    plan: Input[Artifact],
    model: Output[Model],
    metrics: Output[Metrics],
) -> None:
    """Remove the channels, verify that this is exact, and fine-tune the pruned network.

    Args:
        finetune: section `finetune` of the configuration.
        variant: one entry of `variants` in the configuration.
        dataset: output of prepare_data.
        dense: output of train_dense.
        plan: output of select_channels.
        model: the pruned, fine-tuned network.
        metrics: parameters, MACs and accuracy on the validation split.
    """
    from scop.runtime.execution import execute

    result = execute(
        "finetune",
        {"finetune": finetune, "variant": variant},
        {"dataset": dataset.path, "dense": dense.path, "plan": plan.path},
        {"model": model.path},
    )
    metrics.metadata.update(result.metrics)
    result.save(metrics.path)
