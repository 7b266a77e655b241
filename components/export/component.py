"""Step 7: export."""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(
    export: dict[str, Any],
    variant: dict[str, Any],
    dataset: Input[Dataset],
    pruned: Input[Model],
    evaluation: Input[Artifact],
    exported: Output[Model],
) -> None:
    """Export the pruned network to ONNX and .pt2, reload the files and compare their outputs with the network's.

    Args:
        export: section `export` of the configuration.
        variant: one entry of `variants` in the configuration.
        dataset: output of prepare_data.
        pruned: output of finetune.
        evaluation: output of evaluate.
        exported: the exported models.
    """
    from scop.runtime.execution import execute

    execute(
        "export",
        {"export": export, "variant": variant},
        {"dataset": dataset.path, "pruned": pruned.path, "evaluation": evaluation.path},
        {"exported": exported.path},
    )
