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
    """Measure the dense and the pruned network on the test split, side by side.

    Args:
        evaluate: the configuration's section `evaluate`.
        variant: one entry of the configuration's list `variants`.
        dataset: from prepare_data.
        dense: from train_dense.
        pruned: from finetune.
        evaluation: all figures.
        metrics: the headline figures.
        confusion: the pruned network's confusion matrix.
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
