"""Step 8: comparison."""

from typing import List

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare(
    scores: Input[Artifact],
    evaluations: Input[List[Artifact]],
    exports: Input[List[Model]],
    report: Output[Artifact],
) -> None:
    """Summarise all variants in summary.json and report.html.

    Args:
        scores: output of train_knockoff.
        evaluations: outputs of evaluate, one per variant.
        exports: outputs of export, one per variant.
        report: summary.json and report.html.
    """
    from scop.runtime.execution import execute

    execute(
        "compare",
        {},
        {
            "scores": scores.path,
            "evaluations": [artifact.path for artifact in evaluations],
            "exports": [artifact.path for artifact in exports],
        },
        {"report": report.path},
    )
