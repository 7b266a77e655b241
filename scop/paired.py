"""Is one way of pruning better than another? Differences pair by pair, and an interval for their mean.

Two recipes are compared seed by seed: what the same dense network and the same order of images do to both drops out.
The mean difference has a 95 % interval by Student's t over the pairs. A claim is made only where it leaves 0 out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scop.results import Result

_ACCURACY = "pruned_top1"
_SAME_BUDGET = 0.03
"""MACs may differ by this share and are the same budget."""
_CONFIDENCE = 0.95
_ALIKE = ("network", "dense_seed", "seed")
"""Parameters that both of a pair share."""


@dataclass(frozen=True)
class Paired:
    """A recipe against another one, on the same data.

    Attributes:
        first, second: names of the variants.
        difference: mean of the first's top-1 less the second's, a share.
        low, high: its 95 % interval; None of one pair.
        pairs: so many.
        reference: the second is the unpruned network, fine-tuned just as long, and no control.
    """

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    pairs: int
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
            return f"{self.first} against {self.second} at the same MACs: {evidence}; no difference can be told"
        word = "better" if self.difference > 0 else "worse"
        return f"{self.first} is {word} than {self.second} at the same MACs: {evidence}"


def compare_pairs(results: Sequence[Result]) -> list[Paired]:
    """SCOP's recipes against each control at the same MACs, and against the unpruned network.

    Args:
        results: any; those on other data, or of another network, are never paired.
    """
    recipes: dict[str, list[Result]] = {}
    for result in results:
        if _ACCURACY in result.metrics and "pruned_macs" in result.metrics and "recipe" in result.params:
            recipes.setdefault(result.identity, []).append(result)
    ours = [own for own in recipes.values() if own[0].params.get("method") == "scop"]
    others = [
        (fmean(r.metrics["pruned_macs"] for r in own), own)
        for own in recipes.values()
        if own[0].params.get("method") != "scop"
    ]
    found = []
    for first in ours:
        macs = fmean(result.metrics["pruned_macs"] for result in first)
        for cost, second in others:  # of which there may be thousands
            if second[0].params.get("method") == "none" or abs(macs / cost - 1) <= _SAME_BUDGET:
                found.append(_paired(first, second))
    return sorted((one for one in found if one), key=lambda one: (one.first, one.reference, one.second))


def _paired(first: Sequence[Result], second: Sequence[Result]) -> Paired | None:
    # From scratch it takes longer, so that is compared whatever the epochs.
    alike = [*_ALIKE] if second[0].params["method"] == "scratch" else [*_ALIKE, "finetune_epochs"]
    ours, theirs = ({_pair(result, alike): result for result in own} for own in (first, second))
    common = [key for key in ours if key in theirs]
    if not common:
        return None
    differences = [ours[key].metrics[_ACCURACY] - theirs[key].metrics[_ACCURACY] for key in common]
    low, high = interval(differences)
    reference = second[0].params["method"] == "none"
    return Paired(first[0].name, second[0].name, fmean(differences), low, high, len(common), reference)


def _pair(result: Result, alike: Sequence[str]) -> tuple[object, ...]:
    """What both of a pair have in common."""
    return (result.dataset, *(result.params.get(key) for key in alike))


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean by Student's t; None for each where there is but one."""
    if len(differences) < 2:
        return None, None
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes five times as long to import

    mean, n = fmean(differences), len(differences)
    half = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(n)
    return mean - half, mean + half
