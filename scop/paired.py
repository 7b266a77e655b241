"""Is one way of pruning better than another? Differences pair by pair, and an interval for their mean.

Two recipes are compared seed by seed: what the same dense network and the same order of images do to both drops out.
Only networks that were trained alike are, and only at the same cost. The mean difference has a 95 % interval by
Student's t over the pairs. A claim is made only where it leaves 0 out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scop.results import Result

_ACCURACY = "pruned_top1"
_SAME_BUDGET = 0.03
"""Costs may differ by this share and are the same budget."""
_COSTS = {"pruned_macs": "MACs", "pruned_params": "number of parameters"}
"""What a budget may be of, in the order of preference; then latency, as the speed-up over the dense network."""
_SPEED = "speedup_batch"
_CONFIDENCE = 0.95
_ALIKE = ("network", "dense_seed", "seed")
"""Parameters that both of a pair share, besides their training."""


@dataclass(frozen=True)
class Paired:
    """A recipe against another one, on the same data.

    Attributes:
        first, second: names of the variants.
        difference: mean of the first's top-1 less the second's, a share.
        low, high: its 95 % interval; None of one pair.
        pairs: so many.
        same: what both cost the same of.
        reference: the second is the unpruned network, fine-tuned just as long, and no control.
    """

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    pairs: int
    same: str
    reference: bool

    @property
    def told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        """A sentence that claims no more than the interval does."""
        points = f"{100 * self.difference:+.2f} points of top-1"
        if self.low is None or self.high is None:
            return f"{self.first} against {self.second}: {points}, one pair, from which nothing can be told"
        evidence = f"{points} (95% interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, {self.pairs} pairs)"
        if self.reference:
            return f"{self.first} against {self.second}, which is not pruned and fine-tuned just as long: {evidence}"
        if not self.told:
            return f"{self.first} against {self.second} at the same {self.same}: {evidence}; no difference can be told"
        word = "better" if self.difference > 0 else "worse"
        return f"{self.first} is {word} than {self.second} at the same {self.same}: {evidence}"


def compare_pairs(results: Sequence[Result]) -> list[Paired]:
    """SCOP's recipes against each control at the same budget, and against the unpruned network.

    Args:
        results: any; those on other data, of another network, or trained in another way are never paired. But a
            network from scratch may take its time.
    """
    recipes: dict[str, list[Result]] = {}
    for result in results:
        if _ACCURACY in result.metrics and result.training is not None:
            recipes.setdefault(result.identity, []).append(result)
    costs = {identity: _costs(own) for identity, own in recipes.items()}
    found = []
    for first, ours in recipes.items():
        if ours[0].params.get("method") != "scop":
            continue
        for second, theirs in recipes.items():  # of which there may be thousands
            method = theirs[0].params.get("method")
            same = "" if method == "none" else _same(costs[first], costs[second])
            if method != "scop" and same is not None:
                found.append(_paired(ours, theirs, same))
    return sorted((one for one in found if one), key=lambda one: (one.first, one.reference, one.second))


def _costs(results: Sequence[Result]) -> dict[str, float]:
    """Means of what networks of one recipe cost; speed-ups only where all were measured on one device."""
    device = results[0].device if len({result.device for result in results}) == 1 else None
    keys = [key for key in results[0].metrics if key in _COSTS or (device and key.startswith(_SPEED))]
    named = {key: key if key in _COSTS else f"{device} {key}" for key in keys}
    return {
        named[key]: fmean(r.metrics[key] for r in results) for key in keys if all(key in r.metrics for r in results)
    }


def _same(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str | None:
    """What two recipes cost the same of, or None."""
    for key in [*_COSTS, *(key for key in ours if key not in _COSTS)]:
        if key in ours and key in theirs and abs(ours[key] / theirs[key] - 1) <= _SAME_BUDGET:
            return _COSTS.get(key, f"latency (batch {key.rpartition(_SPEED)[2]})")
    return None


def _paired(first: Sequence[Result], second: Sequence[Result], same: str) -> Paired | None:
    ours, theirs = ({_pair(result, second[0]): result for result in own} for own in (first, second))
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    differences = [ours[key].metrics[_ACCURACY] - theirs[key].metrics[_ACCURACY] for key in common]
    low, high = interval(differences)
    reference = second[0].params["method"] == "none"
    return Paired(_name(first), _name(second), fmean(differences), low, high, len(common), same, reference)


def _name(results: Sequence[Result]) -> str:
    """Of a recipe: that of its variant, without the seed where there are several."""
    name = results[0].name
    return re.sub(r"-seed\d+$", "", name) if len(results) > 1 else name


def _pair(result: Result, other: Result) -> tuple[object, ...]:
    """What both of a pair have in common."""
    training = None if other.params["method"] == "scratch" else result.training
    return (result.dataset, training, *(result.params.get(key) for key in _ALIKE))


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean by Student's t; None for each where there is but one."""
    if len(differences) < 2:
        return None, None
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes five times as long to import

    mean, n = fmean(differences), len(differences)
    half = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(n)
    return mean - half, mean + half
