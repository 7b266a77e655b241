"""Paired comparison of pruning recipes: mean difference in accuracy, with a 95 % confidence interval.

Two recipes are compared seed by seed, so the effects of the dense network and of the image order cancel. Only networks
with the same training and the same cost are compared. Settings other than the method that differ, such as the
selection, are reported, because they may explain the difference. The confidence interval covers other seeds and other
test images from the same distribution. A recipe is called better or worse only if the interval excludes 0.
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
"""Relative difference up to which two costs count as the same budget."""
_COSTS = {"pruned_macs": "MACs", "pruned_params": "number of parameters"}
"""Costs that define a budget, in order of preference. Latency, as the speed-up over the dense network, comes last."""
_SPEED = "speedup_batch"
_CONFIDENCE = 0.95
_ROUNDING = 1e-9
_ALIKE = ("network", "dense_seed", "seed")
"""Parameters that both results of a pair must share, besides their training."""
_CHOICE = ("selection", "residual", "floor", "round_to", "min_channels")
"""Parameters that, with the method, decide which channels are removed; missing from results of earlier versions."""
_OF_LAYERS = ("include", "exclude", "rates")
"""Further such parameters, which a result has only if they are set."""
_Key = tuple[Value | None, ...]
"""Data set and values of `_ALIKE`: equal for both results of a pair."""


@dataclass(frozen=True)
class Paired:
    """Comparison of two recipes on the same data.

    Attributes:
        first, second: names of the variants.
        difference: mean top-1 of the first minus that of the second, as a fraction.
        low, high: 95 % confidence interval of `difference`; None for a single pair.
        pairs: number of pairs.
        images: whether the interval covers other test images, too; if not, it covers only other seeds.
        same: the cost that both share, for display; empty if `reference`.
        reference: whether the second is the unpruned network with the same fine-tuning, not a control.
        differing: settings that differ besides the method, such as "selection: global vs. uniform".
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
    def significant(self) -> bool:
        """Whether the interval excludes 0. A zero width does not count: rounding made the differences equal."""
        return self.low is not None and self.high is not None and self.low < self.high and self.low * self.high > 0

    def __str__(self) -> str:
        """The comparison as a sentence; it says "better" or "worse" only if the interval excludes 0."""
        points = f"{100 * self.difference:+.2f} points of top-1"
        if self.low is None or self.high is None:
            return f"{self.first} vs. {self.second}: {points}; only one pair: not enough to compare"
        between = f"95% CI {100 * self.low:+.2f} to {100 * self.high:+.2f}"
        what = f"{self.pairs} pairs" if self.images else f"{self.pairs} pairs, for these test images only"
        evidence = f"{points} ({between}, {what})"
        if self.reference:
            return f"{self.first} vs. {self.second} (unpruned, same fine-tuning): {evidence}"
        same = f"at the same {self.same}" + (f" ({self.differing})" if self.differing else "")
        if not self.significant:
            return f"{self.first} vs. {self.second} {same}: {evidence}; no significant difference"
        word = "better" if self.difference > 0 else "worse"
        return f"{self.first} is {word} than {self.second} {same}: {evidence}"


def compare_pairs(results: Sequence[Result]) -> list[Paired]:
    """Compare each SCOP recipe with every control at the same budget, and with the unpruned network.

    Args:
        results: any results. Results on different data, of different networks or with different training are never
            paired. Networks trained from scratch are an exception: their training may differ.
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
        # Vectorised, because there may be thousands of controls. A missing cost is NaN, which equals nothing.
        equal = np.abs(np.array([ours.costs.get(key, np.nan) for key in keys]) / table - 1) <= _SAME_BUDGET
        reference = np.array([recipe.method == "none" for recipe in controls], bool)
        first = equal.argmax(axis=1)
        for index in np.flatnonzero(equal.any(axis=1) | reference):
            same = "" if reference[index] else _named(keys[first[index]])
            found.append(_paired(ours, controls[index], same))
    # Pairs that differ only in the method come first.
    key = attrgetter("first", "reference", "differing", "second")
    return sorted((one for one in found if one), key=key)


class _Recipe:
    """Results that differ only in their seeds."""

    def __init__(self, results: Sequence[Result]) -> None:
        name, self.method = results[0].name, results[0].params.get("method")
        self.name = re.sub(r"-seed\d+$", "", name) if len(results) > 1 else name
        self.training, self.params = results[0].training, results[0].params
        self.costs = _costs(results)
        # Results with the same key differ in the seeds of their scores or are reruns; a pair uses their mean.
        same: dict[_Key, list[Result]] = {}
        for result in results:
            same.setdefault((result.dataset, *(result.params.get(key) for key in _ALIKE)), []).append(result)
        self.top1 = {key: fmean(result.metrics[_ACCURACY] for result in own) for key, own in same.items()}
        right = {key: [result.right for result in own if result.right] for key, own in same.items()}
        self.right = {key: answers for key, answers in right.items() if len(answers) == len(same[key])}
        self._shares: dict[tuple[_Key, ...], NDArray[np.float32]] = {}

    def share_right(self, keys: tuple[_Key, ...]) -> NDArray[np.float32]:
        """Return the share of the results at `keys` that classify each test image correctly: (images,), in [0, 1]."""
        if keys not in self._shares:
            self._shares[keys] = np.mean([share_right(self.right[key]) for key in keys], axis=0)
        return self._shares[keys]


def _costs(results: Sequence[Result]) -> dict[str, float]:
    """Return the mean costs of the networks of one recipe; speed-ups only if all were measured on one device."""
    device = results[0].device if len({result.device for result in results}) == 1 else None
    keys = [key for key in results[0].metrics if key in _COSTS or (device and key.startswith(_SPEED))]
    named = {key: key if key in _COSTS else f"{device} {key}" for key in keys}
    return {
        named[key]: fmean(r.metrics[key] for r in results) for key in keys if all(key in r.metrics for r in results)
    }


def _named(cost: str) -> str:
    """Return the name of a cost for display."""
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
        pairs.pop("floor", None)  # a uniform selection ignores it
    return ", ".join(f"{key}: {ours} vs. {theirs}" for key, (ours, theirs) in pairs.items() if ours != theirs)


def share_right(answers: Sequence[str]) -> NDArray[np.float32]:
    """Return the share of networks that classify each test image correctly: (images,), in [0, 1].

    Args:
        answers: correctness of each network, as `scop.report.correctness.packed` encodes it.
    """
    return np.mean([unpacked(text) for text in answers], axis=0, dtype=np.float32)


def interval(
    differences: Sequence[float], images: NDArray[np.floating[Any]] | None = None
) -> tuple[float | None, float | None]:
    """Return the 95 % confidence interval of the mean difference by Student's t; (None, None) for fewer than two pairs.

    Both the seeds and the images of the test split are samples. On few images, several seeds may give exactly the same
    accuracy and still differ on other images. The interval therefore adds the variances of the mean over seeds and of
    the mean over images, each with the t quantile of its own degrees of freedom (Banerjee, 1961):
    ``half^2 = sum of t_k^2 v_k``. Welch's common degrees of freedom give a quantile that is too small if two or three
    seeds agree by chance. The effect of seeds on single images is part of both variances, so the interval is
    conservative.

    Args:
        differences: differences in accuracy, one per pair.
        images: (images,), the first's `share_right` minus the second's. If None, the interval covers other seeds on
            the same images only.
    """
    if len(differences) < 2:
        return None, None
    from scipy.special import stdtrit  # Student's quantile; importing scipy.stats takes five times as long

    samples = [np.asarray(differences), *([] if images is None or len(images) < 2 else [images])]
    quantiles = [float(stdtrit(len(sample) - 1, (1 + _CONFIDENCE) / 2)) for sample in samples]
    # Differences that are equal up to rounding have zero variance.
    errors = [0.0 if np.ptp(s) < _ROUNDING else float(s.std(ddof=1)) / math.sqrt(len(s)) for s in samples]
    half = math.hypot(*(quantile * error for quantile, error in zip(quantiles, errors, strict=True)))
    mean = fmean(differences)
    return mean - half, mean + half
