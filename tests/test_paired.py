"""Claims are made only where the interval of paired differences leaves 0 out."""

import numpy as np
import pytest

from scop.paired import compare_pairs, interval
from scop.results import Result
from tests.results import result


def results(tops: dict[str, list[float]], **macs: float) -> list[Result]:
    """One recipe per method, a seed for each accuracy."""
    found = []
    for method, values in tops.items():
        for seed, top1 in enumerate(values):
            row = result("scop", 0.5, seed)
            params = dict(row.params) | {"method": method, "recipe": method}
            metrics = dict(row.metrics) | {"pruned_top1": top1, "pruned_macs": macs.get(method, 10e6)}
            found.append(Result(method, params, metrics, row.dataset, row.device))
    return found


def test_the_interval_is_students() -> None:
    # By hand: mean 2, standard deviation 1, t(0.975, 2) = 4.3027.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert interval([1.0]) == (None, None)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = [low <= 0 <= high for low, high in (interval(list(generator.normal(size=4))) for _ in range(1000))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_a_difference_that_holds_in_each_pair_is_told() -> None:
    # Between seeds there is more than between methods; within a pair there is not.
    (found,) = compare_pairs(results({"scop": [0.90, 0.92, 0.94], "l1": [0.89, 0.9095, 0.9305]}))
    assert found.told
    assert str(found).startswith("scop is better than l1 at the same MACs: +1.00 points of top-1 (95% interval +0.")
    assert str(found).endswith("3 pairs)")
    (other,) = compare_pairs(results({"scop": [0.89, 0.9095, 0.9305], "l1": [0.90, 0.92, 0.94]}))
    assert str(other).startswith("scop is worse than l1 at the same MACs: -1.00 points")


def test_nothing_is_claimed_that_the_interval_does_not_say() -> None:
    (found,) = compare_pairs(results({"scop": [0.90, 0.91, 0.95], "l1": [0.89, 0.92, 0.93]}))
    assert not found.told
    assert str(found).endswith("no difference can be told")
    (one,) = compare_pairs(results({"scop": [0.95], "l1": [0.5]}))
    assert not one.told
    assert str(one).endswith("one pair, from which nothing can be told")


def test_only_what_costs_the_same_is_compared_and_the_unpruned_network_is_the_reference() -> None:
    tops = {"scop": [0.90, 0.92], "l1": [0.89, 0.90], "random": [0.80, 0.82], "none": [0.93, 0.95]}
    found = compare_pairs(results(tops, l1=12e6, none=40e6))
    assert [(one.second, one.reference) for one in found] == [("random", False), ("none", True)]
    assert "scop against none, which is not pruned and fine-tuned just as long: -3.00 points" in str(found[1])


def test_seeds_that_only_one_has_are_left_out() -> None:
    rows = results({"scop": [0.90, 0.92, 0.94], "l1": [0.89, 0.91]})
    (found,) = compare_pairs(rows)
    assert found.pairs == 2
    other_data = [Result(**{**vars(row), "dataset": "other"}) if row.name == "l1" else row for row in rows]
    assert compare_pairs(other_data) == []
