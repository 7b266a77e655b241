"""Sections `run`, `evaluate` and `export`: a run's name and storage, latency measurement, exported models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scop.config.parsing import Section
from scop.config.values import LONGEST_NAME, NAME, Fraction, PositiveFloat, PositiveInt


class RunSection(Section):
    """Name and storage of the run.

    Attributes:
        name: name of the pipeline run, to which its start time is appended; by default that of the configuration file.
        experiment: MLflow experiment; models are registered as EXPERIMENT-VARIANT.
        checkpoints: folder or s3:// URI for checkpoints, from which an interrupted training resumes; by default next to
            the runs.
        keep_checkpoints: number of checkpoints kept per training until it succeeds.
        artifact_root: folder or s3:// URI for the artifacts of a new MLflow experiment; by default that of the MLflow
            server, or next to the runs if there is no server.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)] | None = None
    experiment: Annotated[str, Field(pattern=NAME, max_length=100)] = "scop"
    checkpoints: str | None = None
    keep_checkpoints: PositiveInt = 2
    artifact_root: str | None = None


class EvaluateSection(Section):
    """Measurement of latency.

    Attributes:
        batch_sizes: batch sizes at which latency is measured.
        repeats: number of timed forward passes of each network; the dense and the pruned network alternate.
        threads: number of CPU threads; by default all.
    """

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 64]
    repeats: PositiveInt = 30
    threads: PositiveInt | None = None


class ExportSection(Section):
    """The exported models.

    Attributes:
        tolerance: maximum difference in logits between the pruned PyTorch model and its exported files; relative to the
            largest logit if that is above 1.
        max_top1_drop: maximum drop in top-1 accuracy on the test split at which `scop promote` accepts a model; 0.01 is
            one percentage point.
        register_model: register the ONNX model in MLflow with the alias `candidate`.
    """

    tolerance: PositiveFloat = 1e-4
    max_top1_drop: Fraction = 0.01
    register_model: bool = True
