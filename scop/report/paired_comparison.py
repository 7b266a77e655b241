"""Is one way of pruning better than another? Differences pair by pair, and an interval for their mean.

Two recipes are compared seed by seed: what the same dense network and the same order of images do to both drops out.
Only networks that were trained alike are, and only at the same cost. What they differ in besides their method, such as
the selection, is said: a lead may come from that. The mean difference has a 95 % interval for other seeds and for other
test images of the kind. A claim is made only where it leaves 0 out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scop.report.correctness import unpacked
from scop.report.results import Result, Value

_ACCURACY = "pruned_top1"
_SAME_BUDGET = 0.03
"""Costs may differ by this share and are the same budget."""
_COSTS = {"pruned_macs": "MACs", "pruned_params": "number of parameters"}
"""What a budget may be of, in the order of preference; then latency, as the speed-up over the dense network."""
_SPEED = "speedup_batch"
_CONFIDENCE = 0.95
_ROUNDING = 1e-9
_ALIKE = ("network", "dense_seed", "seed")
"""Parameters that both of a pair share, besides their training."""
_CHOICE = ("selection", "residual", "floor", "round_to", "min_channels")
"""Parameters that decide with the method which channels go; unknown in results of an earlier version."""
_OF_LAYERS = ("include", "exclude", "rates")
"""The same, and left out where there are none."""
_Key = tuple[Value | None, ...]
"""What both of a pair have in common."""


@dataclass(frozen=True)
class Paired:
    """A recipe against another one, on the same data.

    Attributes:
        first, second: names of the variants.
        difference: mean of the first's top-1 less the second's, a share.
        low, high: its 95 % interval; None of one pair.
        pairs: so many.
        images: the interval is for other test images too, and not for other seeds on these alone.
        same: what both cost the same of.
        reference: the second is the unpruned network, fine-tuned just as long, and no control.
        differing: in what else they differ than in the method, as "selection global against uniform".
    """

    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    pairs: int
    images: bool
    same: str
    reference: bool
    differing: str = ""

    @property
    def told(self) -> bool:
        """Whether the interval leaves 0 out; one of no width is none, but of differences that were rounded alike."""
        return self.low is not None and self.high is not None and self.low < self.high and self.low * self.high > 0

    def __str__(self) -> str:
        """A sentence that claims no more than the interval does."""
        points = f"{100 * self.difference:+.2f} points of top-1"
        if self.low is None or self.high is None:
            return f"{self.first} against {self.second}: {points}, one pair, from which nothing can be told"
        between = f"95% interval {100 * self.low:+.2f} to {100 * self.high:+.2f}"
        what = f"{self.pairs} pairs" if self.images else f"{self.pairs} pairs, on these very test images"
        evidence = f"{points} ({between}, {what})"
        if self.reference:
            return f"{self.first} against {self.second}, which is not pruned and fine-tuned just as long: {evidence}"
        same = f"at the same {self.same}" + (f", {self.differing}" if self.differing else "")
        if not self.told:
            return f"{self.first} against {self.second} {same}: {evidence}; no difference can be told"
        word = "better" if self.difference > 0 else "worse"
        return f"{self.first} is {word} than {self.second} {same}: {evidence}"


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
    every = [_Recipe(own) for own in recipes.values()]
    controls = [recipe for recipe in every if recipe.method != "scop"]
    keys = [*_COSTS, *sorted({key for recipe in controls for key in recipe.costs} - set(_COSTS))]
    table = np.array([[recipe.costs.get(key, np.nan) for key in keys] for recipe in controls]).reshape(-1, len(keys))
    found = []
    for ours in every:
        if ours.method != "scop":
            continue
        # All controls at once, for there may be thousands; what is missing equals nothing.
        equal = np.abs(np.array([ours.costs.get(key, np.nan) for key in keys]) / table - 1) <= _SAME_BUDGET
        reference = np.array([recipe.method == "none" for recipe in controls], bool)
        first = equal.argmax(axis=1)
        for place in np.flatnonzero(equal.any(axis=1) | reference):
            same = "" if reference[place] else _named(keys[first[place]])
            found.append(_paired(ours, controls[place], same))
    # Like with like first: there the method alone makes the difference.
    key = attrgetter("first", "reference", "differing", "second")
    return sorted((one for one in found if one), key=key)


class _Recipe:
    """Results that differ in nothing but their seeds."""

    def __init__(self, results: Sequence[Result]) -> None:
        name, self.method = results[0].name, results[0].params.get("method")
        self.name = re.sub(r"-seed\d+$", "", name) if len(results) > 1 else name
        self.training, self.params = results[0].training, results[0].params
        self.costs = _costs(results)
        # By what both of a pair have in common.
        # Several with the same key differ in the scores' seeds or were run again; in a pair they count as their mean.
        same: dict[_Key, list[Result]] = {}
        for result in results:
            same.setdefault((result.dataset, *(result.params.get(key) for key in _ALIKE)), []).append(result)
        self.top1 = {key: fmean(result.metrics[_ACCURACY] for result in own) for key, own in same.items()}
        right = {key: [result.right for result in own if result.right] for key, own in same.items()}
        self.right = {key: answers for key, answers in right.items() if len(answers) == len(same[key])}
        self._shares: dict[tuple[_Key, ...], NDArray[np.float32]] = {}

    def share_right(self, keys: tuple[_Key, ...]) -> NDArray[np.float32]:
        """Of these results, how many are right on each test image: (images,), in [0, 1]."""
        if keys not in self._shares:
            self._shares[keys] = np.mean([share_right(self.right[key]) for key in keys], axis=0)
        return self._shares[keys]


def _costs(results: Sequence[Result]) -> dict[str, float]:
    """Means of what networks of one recipe cost; speed-ups only where all were measured on one device."""
    device = results[0].device if len({result.device for result in results}) == 1 else None
    keys = [key for key in results[0].metrics if key in _COSTS or (device and key.startswith(_SPEED))]
    named = {key: key if key in _COSTS else f"{device} {key}" for key in keys}
    return {
        named[key]: fmean(r.metrics[key] for r in results) for key in keys if all(key in r.metrics for r in results)
    }


def _named(cost: str) -> str:
    """What two recipes cost the same of, for people."""
    return _COSTS.get(cost, f"latency (batch {cost.rpartition(_SPEED)[2]})")


def _paired(first: _Recipe, second: _Recipe, same: str) -> Paired | None:
    if second.method != "scratch" and first.training != second.training:
        return None
    differences = [top1 - second.top1[key] for key, top1 in first.top1.items() if key in second.top1]
    if not differences:
        return None
    known = tuple(key for key in first.right if key in second.right)
    images = first.share_right(known) - second.share_right(known) if known else None
    low, high = interval(differences, images)
    reference = second.method == "none"
    differing = "" if reference else _differing(first, second)
    return Paired(
        first=first.name,
        second=second.name,
        difference=fmean(differences),
        low=low,
        high=high,
        pairs=len(differences),
        images=images is not None,
        same=same,
        reference=reference,
        differing=differing,
    )


def _differing(first: _Recipe, second: _Recipe) -> str:
    keys = [*(key for key in _CHOICE if key in first.params and key in second.params), *_OF_LAYERS]
    pairs = {key: (first.params.get(key, "none"), second.params.get(key, "none")) for key in keys}
    if "uniform" in pairs.get("selection", ()):
        pairs.pop("floor", None)  # that selection does not look at it
    return ", ".join(f"{key} {ours} against {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs)


def share_right(answers: Sequence[str]) -> NDArray[np.float32]:
    """How many of some networks are right on each test image: (images,), in [0, 1].

    Args:
        answers: of each, as `scop.report.correctness` packs them.
    """
    return np.mean([unpacked(text) for text in answers], axis=0, dtype=np.float32)


def interval(
    differences: Sequence[float], images: NDArray[np.floating[Any]] | None = None
) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean over pairs by Student's t; None for each where there is but one.

    Seeds differ by chance, and so do the images that happen to be in the test split: accuracies on few images may
    agree to the last digit by several seeds, and would differ on others. The variances of both means are added, each
    with the quantile of its own degrees of freedom (Banerjee, 1961): ``half^2 = sum of t_k^2 v_k``. The quantile of a
    common number of them, as Welch has it, is too small for two or three seeds that happen to agree. What seeds do to
    single images is in both variances, so the interval errs on the wide side.

    Args:
        differences: in accuracy, pair by pair.
        images: the same image by image, the one's `share_right` less the other's, in the same unit; where None, the
            interval is for other seeds on the very same images.
    """
    if len(differences) < 2:
        return None, None
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes five times as long to import

    samples = [np.asarray(differences), *([] if images is None or len(images) < 2 else [images])]
    quantiles = [float(stdtrit(len(sample) - 1, (1 + _CONFIDENCE) / 2)) for sample in samples]
    # Equal differences are so but for rounding, which is no variance.
    errors = [0.0 if np.ptp(s) < _ROUNDING else float(s.std(ddof=1)) / math.sqrt(len(s)) for s in samples]
    half = math.hypot(*(quantile * error for quantile, error in zip(quantiles, errors, strict=True)))
    mean = fmean(differences)
    return mean - half, mean + half
