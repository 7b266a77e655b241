"""Names of tags, metrics and aliases in MLflow."""

from __future__ import annotations

PARENT_TAG = "mlflow.parentRunId"
KFP_TAG = "kfp.run_id"
"""ID of the KFP run, on the MLflow run of the pipeline."""

ERROR_TAG = "scop.error"
DEVICE_TAG, DATASET_TAG = "scop.device", "scop.dataset"
MEASURED_TAG = "scop.measured_on"
"""Device on which step evaluate measured latency, such as ``AMD EPYC (2 threads)``."""
RIGHT_TAG = "scop.right"
"""Per-image correctness of the pruned network on the test split, as `scop.report.correctness.packed` encodes it."""
LONGEST_TAG = 8000
"""MLflow's limit for the length of a tag, in characters; enough for the correctness of 50,000 images."""
MODEL_TAG = "scop.model"
"""Registered model, ``models:/NAME/VERSION``, on the run that measured it."""
COST_TAG = "scop.cost"
"""Cost of all steps of a pipeline run by device, including failed steps: JSON of `scop.system.cost.Spent`."""

SECONDS, ENERGY = "total_device_seconds", "total_energy_joules"
"""Metrics of a pipeline run: sums over its devices."""

CANDIDATE = "candidate"
"""Alias of the newest version of a registered model."""

STEP_TAGS = {"scop.step", "scop.variant", "scop.uri", "scop.run", "mlflow.source.name", "mlflow.source.git.commit"}
"""Tags of a step's own run; all others are set on the pipeline run only."""
NOT_OF_THE_RUN = {"scop.step", "scop.variant", "scop.uri", "mlflow.source.name"}
"""Tags that hold for one step and not for the whole pipeline run."""
