"""Sections `run`, `evaluate` and `export`: where things go, what is measured, what is delivered."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scop.config.parsing import Section
from scop.config.values import LONGEST_NAME, NAME, Fraction, PositiveFloat, PositiveInt


class RunSection(Section):
    """How the run is named.

    Attributes:
        name: name of the pipeline run; made of the configuration's file name by default.
        experiment: the MLflow experiment; models are registered as EXPERIMENT-VARIANT.
        checkpoints: folder or s3:// URI for checkpoints; with the runs by default. One that was killed goes on from
            there when it is started again.
        keep_checkpoints: so many of each training are kept until it succeeds.
        artifact_root: folder or s3:// URI for the artifacts of a new MLflow experiment; as the server has it, or with
            the runs, by default.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)] | None = None
    experiment: Annotated[str, Field(pattern=NAME, max_length=100)] = "scop"
    checkpoints: str | None = None
    keep_checkpoints: PositiveInt = 2
    artifact_root: str | None = None


class EvaluateSection(Section):
    """Measuring.

    Attributes:
        batch_sizes: latency is measured at each.
        repeats: timed passes of dense and of pruned, alternately.
        threads: CPU threads for latency; all by default.
    """

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 64]
    repeats: PositiveInt = 30
    threads: PositiveInt | None = None


class ExportSection(Section):
    """The deliverables.

    Attributes:
        tolerance: largest difference allowed between the PyTorch model and what is loaded again, in logits; as a share
            of the largest logit where that is above 1.
        max_top1_drop: `scop promote` takes a model whose top-1 accuracy on the test split is lower than the dense one's
            by at most this share.
        register_model: enter the ONNX model into MLflow's registry with the alias `candidate`.
    """

    tolerance: PositiveFloat = 1e-4
    max_top1_drop: Fraction = 0.01
    register_model: bool = True
