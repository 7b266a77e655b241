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
    """Write ONNX and .pt2 files, load each again and compare it with the network it came from.

    Args:
        export: the configuration's section `export`.
        variant: one entry of the configuration's list `variants`.
        dataset: from prepare_data.
        pruned: from finetune.
        evaluation: from evaluate.
        exported: the deliverables.
    """
    from scop.runtime.execution import execute

    execute(
        "export",
        {"export": export, "variant": variant},
        {"dataset": dataset.path, "pruned": pruned.path, "evaluation": evaluation.path},
        {"exported": exported.path},
    )
