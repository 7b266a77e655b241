"""Learning rate schedules."""

import pytest

from scop.training.learning_rate import lr_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0.0: 1, 0.5: 1, 1.0: 1}),
        ("cosine", {0.0: 1, 0.5: 0.5, 1.0: 0}),
        ("poly", {0.0: 1, 0.5: 0.5**0.9, 1.0: 0}),
        ("step", {0.0: 1, 0.49: 1, 0.5: 0.1, 0.75: 0.01}),
        ("one_cycle", {0.0: 1 / 25, 0.3: 1, 1.0: 1e-4}),
    ],
)
def test_schedules_follow_their_formulas(schedule: str, expected: dict[float, float]) -> None:
    for done, factor in expected.items():
        assert lr_factor(schedule, done, warmup=0.0) == pytest.approx(factor)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "poly", "step", "one_cycle"])
def test_warmup_rises_to_the_peak(schedule: str) -> None:
    rates = [lr_factor(schedule, done / 100, warmup=0.2) for done in range(21)]
    assert rates == sorted(rates)
    assert rates[0] < 0.05
    assert rates[-1] == pytest.approx(1)
