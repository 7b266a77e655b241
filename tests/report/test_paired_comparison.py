"""Tests of paired comparisons: a claim requires an interval that excludes 0."""

import numpy as np
import pytest

from scop.report.correctness import packed, unpacked
from scop.report.paired_comparison import compare_pairs, interval, share_right
from scop.report.results import Result
from tests.fakes.results import result


def results(tops: dict[str, list[float]], **macs: float) -> list[Result]:
    """Return one recipe per method, with one seed per accuracy."""
    found = []
    for method, values in tops.items():
        for seed, top1 in enumerate(values):
            row = result("scop", 0.5, seed)
            params = dict(row.params) | {"method": method, "recipe": f"alike-{method}"}
            metrics = dict(row.metrics) | {"pruned_top1": top1, "pruned_macs": macs.get(method, 10e6)}
            found.append(Result(method, params, metrics, row.dataset, row.device))
    return found


def test_interval_is_students_t() -> None:
    # By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.3027.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert interval([1.0]) == (None, None)


def test_interval_has_its_nominal_coverage() -> None:
    generator = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (interval(list(generator.normal(size=4))) for _ in range(1000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_interval_covers_other_test_images_if_answers_are_known() -> None:
    """Simulate two networks of equal expected accuracy with different weaknesses."""
    generator = np.random.default_rng(0)
    images, seeds = 400, 3
    with_answers, without = [], []
    for _ in range(1000):
        ease = 1.5 + generator.normal(size=images)
        first, second = (
            ease + generator.normal(size=images) + 0.3 * generator.normal(size=(seeds, images)) > 0 for _ in range(2)
        )
        differences = (first.mean(1) - second.mean(1)).tolist()
        low, high = interval(
            differences, share_right([packed(r) for r in first]) - share_right([packed(r) for r in second])
        )
        with_answers.append(low <= 0 <= high)
        low, high = interval(differences)
        without.append(low <= 0 <= high)
    assert np.mean(with_answers) == pytest.approx(0.95, abs=0.03)
    assert np.mean(without) < 0.75  # seeds alone ignore that the images are a sample


def test_interval_of_two_seeds_has_its_nominal_coverage() -> None:
    """Simulate seeds that shift all images alike, as retraining does."""
    generator = np.random.default_rng(0)
    images, seeds = 200, 2
    covered = []
    for _ in range(2000):
        by_seed = 0.1 * generator.normal(size=seeds)
        by_image = generator.normal(size=images)
        low, high = interval((by_seed + by_image.mean()).tolist(), by_image + by_seed.mean())
        covered.append(low <= 0 <= high)
    assert np.mean(covered) > 0.94


def test_averages_results_that_differ_only_in_knockoff_seed() -> None:
    rows = results({"scop": [0.90, 0.92], "l1": [0.89, 0.90]})
    worse = [
        Result(**{**vars(r), "metrics": {**r.metrics, "pruned_top1": 0.80}, "params": {**r.params, "knockoff_seed": 1}})
        for r in rows
        if r.name == "scop"
    ]
    found, reversed_order = compare_pairs([*rows, *worse]), compare_pairs([*worse, *rows])
    assert [one.difference for one in found] == [one.difference for one in reversed_order]
    assert found[0].difference == pytest.approx((0.85 + 0.86) / 2 - (0.89 + 0.90) / 2)
    assert found[0].pairs == 2


def answered(rows: list[Result], right: dict[str, np.ndarray]) -> list[Result]:
    """Add each method's correctness per image to the results."""
    tops = {method: {"pruned_top1": float(answers.mean())} for method, answers in right.items()}
    return [
        Result(**{**vars(r), "metrics": {**r.metrics, **tops[r.name]}, "right": packed(right[r.name])}) for r in rows
    ]


def test_a_difference_of_one_image_is_not_significant() -> None:
    every = np.ones(360, bool)
    one_wrong, forty_wrong = every.copy(), every.copy()
    one_wrong[7] = False
    forty_wrong[100:140] = False
    rows = results({"scop": [0.0] * 3, "l1": [0.0] * 3, "random": [0.0] * 3})
    l1, random = compare_pairs(answered(rows, {"scop": every, "l1": one_wrong, "random": forty_wrong}))
    assert l1.difference == pytest.approx(1 / 360)
    assert not l1.significant
    assert random.significant
    # The same holds if correctness per image is unknown and the differences are equal except for rounding.
    for one in ([1.0] * 3, [0.92, 0.57, 0.71]):
        (unknown,) = compare_pairs(results({"scop": one, "l1": [top1 - 0.01 for top1 in one]}))
        assert not unknown.significant
        assert "3 pairs, for these test images only)" in str(unknown)


def test_packed_answers_round_trip() -> None:
    for count in (1, 8, 359, 10_000):
        right = np.random.default_rng(count).random(count) < 0.87
        assert np.array_equal(unpacked(packed(right)), right)
    # MLflow limits a tag to 8000 characters: enough for ImageNet's validation split at 75 % accuracy.
    assert len(packed(np.random.default_rng(0).random(50_000) < 0.75)) < 8000


def test_a_difference_that_holds_in_each_pair_is_significant() -> None:
    # Seeds differ more than methods, but each pair shows nearly the same difference.
    (found,) = compare_pairs(results({"scop": [0.90, 0.92, 0.94], "l1": [0.89, 0.9095, 0.9305]}))
    assert found.significant
    assert str(found).startswith("scop is better than l1 at the same MACs: +1.00 points of top-1 (95% CI +0.")
    assert str(found).endswith("3 pairs, for these test images only)")
    (other,) = compare_pairs(results({"scop": [0.89, 0.9095, 0.9305], "l1": [0.90, 0.92, 0.94]}))
    assert str(other).startswith("scop is worse than l1 at the same MACs: -1.00 points")


def test_names_recipes_of_several_seeds_without_the_seed() -> None:
    rows = results({"scop": [0.90, 0.92], "l1": [0.89, 0.90]})
    seeded = [Result(**{**vars(row), "name": f"{row.name}-seed{row.params['seed']}"}) for row in rows]
    assert [(one.first, one.second) for one in compare_pairs(seeded)] == [("scop", "l1")]
    assert [(one.first, one.second) for one in compare_pairs([seeded[0], seeded[2]])] == [("scop-seed0", "l1-seed0")]


def test_claims_nothing_if_the_interval_includes_zero_or_is_unknown() -> None:
    (found,) = compare_pairs(results({"scop": [0.90, 0.91, 0.95], "l1": [0.89, 0.92, 0.93]}))
    assert not found.significant
    assert str(found).endswith("no significant difference")
    (one,) = compare_pairs(results({"scop": [0.95], "l1": [0.5]}))
    assert not one.significant
    assert str(one).endswith("only one pair: not enough to compare")


def changed(rows: list[Result], method: str, **params: str) -> list[Result]:
    return [Result(**{**vars(r), "params": {**r.params, **params}}) if r.name == method else r for r in rows]


def test_compares_only_networks_trained_alike() -> None:
    rows = results({"scop": [0.90, 0.92], "l1": [0.80, 0.82], "none": [0.93, 0.95], "scratch": [0.70, 0.71]})
    assert [one.second for one in compare_pairs(rows)] == ["l1", "scratch", "none"]
    # Networks with another training recipe are not compared, except those trained from scratch.
    longer = rows
    for method in ("l1", "none", "scratch"):
        longer = changed(longer, method, recipe=f"longer-{method}")
    assert [one.second for one in compare_pairs(longer)] == ["scratch"]
    unknown = changed(rows, "l1", recipe="fromanearlierversion")
    assert [one.second for one in compare_pairs(unknown)] == ["scratch", "none"]


def test_names_settings_that_differ_besides_the_method() -> None:
    rows = results({"scop": [0.90, 0.92], "fpgm": [0.82, 0.839], "l1": [0.80, 0.819], "none": [0.93, 0.95]})
    rows = changed(changed(rows, "scop", selection="global"), "fpgm", selection="global")
    rows = changed(changed(rows, "l1", selection="uniform", exclude="layer3.*"), "none", selection="uniform")
    alike, unlike, reference = (str(one) for one in compare_pairs(rows))
    assert alike.startswith("scop is better than fpgm at the same MACs: ")
    cause = "(selection: global vs. uniform, exclude: none vs. layer3.*)"
    assert unlike.startswith(f"scop is better than l1 at the same MACs {cause}: ")
    assert "uniform" not in reference


def test_same_budget_means_macs_parameters_or_latency() -> None:
    def claims(**metrics: float) -> list[str]:
        rows = results({"scop": [0.90, 0.92], "l1": [0.89, 0.90]})
        l1 = [Result(**{**vars(r), "metrics": {**r.metrics, **metrics}}) if r.name == "l1" else r for r in rows]
        return [str(one) for one in compare_pairs(l1)]

    scop = results({"scop": [0.9]})[0].metrics
    assert "at the same MACs" in claims()[0]
    assert "at the same number of parameters" in claims(pruned_macs=20e6)[0]
    assert "at the same latency (batch 1)" in claims(pruned_macs=20e6, pruned_params=1e6)[0]
    assert claims(pruned_macs=20e6, pruned_params=1e6, speedup_batch1=scop["speedup_batch1"] * 1.1) == []


def test_compares_equal_budgets_and_the_unpruned_reference() -> None:
    tops = {"scop": [0.90, 0.92], "l1": [0.89, 0.90], "random": [0.80, 0.82], "none": [0.93, 0.95]}
    rows = results(tops, l1=12e6, none=40e6)
    costs = {"pruned_params": 250e3, "speedup_batch1": 1.0}
    rows = [Result(**{**vars(r), "metrics": {**r.metrics, **costs}}) if r.name in ("l1", "none") else r for r in rows]
    found = compare_pairs(rows)
    assert [(one.second, one.reference) for one in found] == [("random", False), ("none", True)]
    assert "scop vs. none (unpruned, same fine-tuning): -3.00 points" in str(found[1])


def test_ignores_seeds_without_a_counterpart() -> None:
    rows = results({"scop": [0.90, 0.92, 0.94], "l1": [0.89, 0.91]})
    (found,) = compare_pairs(rows)
    assert found.pairs == 2
    other_data = [Result(**{**vars(row), "dataset": "other"}) if row.name == "l1" else row for row in rows]
    assert compare_pairs(other_data) == []
