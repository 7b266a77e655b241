"""Names of tags, metrics and aliases in MLflow."""

from __future__ import annotations

PARENT_TAG = "mlflow.parentRunId"
KFP_TAG = "kfp.run_id"
"""The id of a KFP run, on the MLflow run that stands for it."""

ERROR_TAG = "scop.error"
DEVICE_TAG, DATASET_TAG = "scop.device", "scop.dataset"
MEASURED_TAG = "scop.measured_on"
"""The device on which step evaluate measured latency, such as ``AMD EPYC (2 threads)``."""
RIGHT_TAG = "scop.right"
"""The test images that the pruned network gets right, as `scop.report.correctness` packs them."""
LONGEST_TAG = 8000
"""MLflow's limit for a tag, in characters; enough for the answers to 50,000 images."""
MODEL_TAG = "scop.model"
"""The registered model, ``models:/NAME/VERSION``, on the run that measured it."""
COST_TAG = "scop.cost"
"""The cost of all steps of a pipeline run by device, failed ones included: JSON of `scop.system.cost.Spent`."""

SECONDS, ENERGY = "total_device_seconds", "total_energy_joules"
"""Metrics of a pipeline run: sums over its devices."""

CANDIDATE = "candidate"
"""The alias of the newest version of a registered model."""

STEP_TAGS = {"scop.step", "scop.variant", "scop.uri", "scop.run", "mlflow.source.name", "mlflow.source.git.commit"}
"""Tags of a step's own run; all others are set on the pipeline run only."""
NOT_OF_THE_RUN = {"scop.step", "scop.variant", "scop.uri", "mlflow.source.name"}
"""Tags that hold for one step and not for the whole pipeline run."""
