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
    """Bring all variants together in summary.json and report.html.

    Args:
        scores: from train_knockoff.
        evaluations: from evaluate, one for each variant.
        exports: from export, one for each variant.
        report: the page and its figures.
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
