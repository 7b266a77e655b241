"""The record of a step."""

from pathlib import Path

from scop.environment import StepEnvironment
from scop.runtime.record import StepRecord, flat
from scop.runtime.result import StepResult


def test_a_record_with_a_nan_metric_can_be_read(tmp_path: Path) -> None:
    result = StepResult({"validation_loss": float("nan"), "top1": 0.5})
    record = StepRecord.start("train_dense", {}, {}, {"model": str(tmp_path)}, StepEnvironment())
    record = record.model_copy(update={"result": result})
    read = StepRecord.parse(record.model_dump_json().encode(), "step.json")
    assert read.result is not None
    assert read.result.metrics == {"top1": 0.5}


def test_flat_keeps_rates_by_pattern_as_one_parameter() -> None:
    values = {"variant": {"rates": {"layer3.*": 0.3, "layer3.?": 0.2}, "seed": 0}}
    assert flat(values) == {"variant.rates": {"layer3.*": 0.3, "layer3.?": 0.2}, "variant.seed": 0}
