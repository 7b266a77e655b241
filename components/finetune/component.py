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
    """Take the channels out, prove that this was exact, and train the small network.

    Args:
        finetune: the configuration's section `finetune`.
        variant: one entry of the configuration's list `variants`.
        dataset: from prepare_data.
        dense: from train_dense.
        plan: from select_channels.
        model: the pruned, fine-tuned network.
        metrics: parameters, MACs, accuracy on the validation split.
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
