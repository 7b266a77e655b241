"""Step 6: evaluation."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    evaluate: dict[str, Any],
    variant: dict[str, Any],
    dataset: Input[Dataset],
    dense: Input[Model],
    pruned: Input[Model],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    confusion: Output[ClassificationMetrics],
) -> None:
    """Measure the dense and the pruned network on the test split.

    Args:
        evaluate: section `evaluate` of the configuration.
        variant: one entry of `variants` in the configuration.
        dataset: output of prepare_data.
        dense: output of train_dense.
        pruned: output of finetune.
        evaluation: all measurements.
        metrics: the headline metrics.
        confusion: confusion matrix of the pruned network.
    """
    from scop.runtime.execution import execute

    result = execute(
        "evaluate",
        {"evaluate": evaluate, "variant": variant},
        {"dataset": dataset.path, "dense": dense.path, "pruned": pruned.path},
        {"evaluation": evaluation.path},
    )
    metrics.metadata.update(result.metrics)
    result.save(metrics.path)
    confusion.log_confusion_matrix(result.classes, result.confusion)
    result.save(confusion.path)
