"""The plots of single networks: kept channels, learning curves, confusion matrix and histograms of scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scop.report.figures.axes import STYLES, Axis, method_of, method_styles
from scop.report.figures.points import ranked
from scop.report.results import Result

SHOWN_TOGETHER = 6
"""Maximum number of networks in one plot of layers or learning curves."""
_BINS = 50
# Entries of an evaluation that the plots of a single network show.
_DETAILS = ("kept", "channels", "unsure", "history", "dense_history", "confusion", "classes")


@dataclass(frozen=True)
class KeptChannels:
    """Share of the channels that each layer keeps.

    Attributes:
        layers: names of the layers.
        shares: share of channels kept.
        below, above: share of the channels that were kept, or removed, with an uncertain score: the error bars.
        texts: numbers of channels and the uncertain ones.
    """

    layers: Sequence[str]
    shares: Sequence[float]
    below: Sequence[float]
    above: Sequence[float]
    texts: Sequence[str]


@dataclass(frozen=True)
class Curve:
    """Accuracy by epoch.

    Attributes:
        split: ``validation``; ``training`` if there was no validation split.
        epochs: epochs, from 1.
        top1: top-1 after each epoch.
    """

    split: str
    epochs: Sequence[int]
    top1: Sequence[float]

    def label(self, name: str) -> str:
        """Return the name of the curve in the legend."""
        return name if self.split == "validation" else f"{name} ({self.split})"


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix; rows are true classes.

    Attributes:
        classes: names of the classes.
        counts: number of images, (classes, classes).
        shares: share of the images of each true class: the colours, so that they do not depend on the class's size.
    """

    classes: Sequence[str]
    counts: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float]]

    def worst(self) -> tuple[str, str, int] | None:
        """Return the most frequent error: true class, predicted class, count; None if there is no error."""
        errors = np.asarray(self.counts) * (1 - np.eye(len(self.classes), dtype=int))
        true, predicted = np.unravel_index(errors.argmax(), errors.shape)
        count = int(errors[true, predicted])
        return (self.classes[true], self.classes[predicted], count) if count else None


@dataclass(frozen=True)
class Histograms:
    """Histogram of the scores of each layer, with the same bins for all layers.

    Attributes:
        axis: axis of the scores.
        layers: names of the layers.
        centres: centres of the bins.
        counts: number of channels, (layers, bins).
        shares: share of the layer's channels; None for an empty bin.
    """

    axis: Axis
    layers: Sequence[str]
    centres: Sequence[float]
    counts: Sequence[Sequence[int]]
    shares: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Network:
    """A result with plots of its own.

    Attributes:
        name: name of the result, with a number if another one has the same.
        index: index of the result.
        colour: colour in plots of several networks: that of the method if the methods differ.
        kept, curve, dense_curve, confusion, scores: what the plots show; None if it is unknown.
    """

    name: str
    index: int
    colour: str
    kept: KeptChannels
    curve: Curve | None
    dense_curve: Curve | None
    confusion: Confusion
    scores: Histograms | None


def networks(results: Sequence[Result], details: Mapping[int, Mapping[str, Any]]) -> list[Network]:
    """Return the results with complete evaluations, best first. Earlier versions wrote incomplete ones.

    Args:
        results: all results.
        details: index of a result -> its evaluation and, as ``scores``, the scores of its run.
    """
    order = [index for index in ranked(results) if all(key in details.get(index, {}) for key in _DETAILS)]
    methods = [method_of(results[index]) for index in order]
    styles = method_styles(results)
    alike: dict[str, int] = {}
    found = []
    for number, index in enumerate(order):
        name, own = results[index].name, details[index]
        alike[name] = alike.get(name, 0) + 1
        distinct = len(set(methods)) == len(methods)
        style = styles[methods[number]] if distinct else STYLES[number % len(STYLES)]
        found.append(
            Network(
                name=name if alike[name] == 1 else f"{name} ({alike[name]})",
                index=index,
                colour=style.colour,
                kept=kept_channels(own),
                curve=curve(own["history"]),
                dense_curve=curve(own["dense_history"]),
                confusion=confusion(own["confusion"], own["classes"]),
                scores=histograms(own.get("scores") or {}),
            )
        )
    return found


def with_own_scores(found: Iterable[Network]) -> list[Network]:
    """Return the first network of each knockoff phase: the variants of a run share their scores."""
    own: list[Network] = []
    for network in found:
        if network.scores and all(network.scores != other.scores for other in own):
            own.append(network)
    return own


def kept_channels(evaluation: Mapping[str, Any]) -> KeptChannels:
    """Return the kept channels of an evaluation."""
    channels, kept = evaluation["channels"], evaluation["kept"]
    unsure = {layer: evaluation["unsure"].get(layer, {"kept": [], "removed": []}) for layer in channels}
    texts = []
    for layer, count in channels.items():
        lines = [f"{kept.get(layer, count)} of {count} channels"]
        if any(unsure[layer].values()):
            lines += [f"{part}, uncertain: {', '.join(map(str, own)) or 'none'}" for part, own in unsure[layer].items()]
        texts.append("\n".join(lines))
    return KeptChannels(
        layers=list(channels),
        shares=[kept.get(layer, count) / count for layer, count in channels.items()],
        below=[len(unsure[layer]["kept"]) / count for layer, count in channels.items()],
        above=[len(unsure[layer]["removed"]) / count for layer, count in channels.items()],
        texts=texts,
    )


def curve(history: Sequence[Mapping[str, Any]] | None) -> Curve | None:
    """Return the learning curve of a training; None if nothing was trained."""
    if not history:
        return None
    validated = all(record.get("validation_top1") is not None for record in history)
    key, split = ("validation_top1", "validation") if validated else ("top1", "training")
    return Curve(split, [record["epoch"] for record in history], [record[key] for record in history])


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Confusion:
    """Return a confusion matrix from its counts, (classes, classes)."""
    matrix = np.asarray(counts)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    return Confusion(list(classes), matrix.tolist(), shares.round(4).tolist())


def histograms(scores: Mapping[str, Sequence[float]]) -> Histograms | None:
    """Return the histogram of the scores of each layer that has any; None without scores.

    If no score is negative, each is divided by its layer's mean, clipped below at 1/1000, and converted to log10.
    Otherwise the scores are unchanged.
    """
    layers = {layer: np.asarray(own, dtype=float) for layer, own in scores.items() if len(own)}
    if not layers:
        return None
    title = "knockoff score W"
    if all(own.min() >= 0 for own in layers.values()):
        title = "log10 of knockoff score / mean of its layer"
        layers = {name: np.log10((own / max(own.mean(), 1e-30)).clip(min=1e-3)) for name, own in layers.items()}
    everything = np.concatenate(list(layers.values()))
    edges = np.linspace(min(everything.min(), 0), max(everything.max(), 0) + 1e-9, _BINS + 1)
    counts = [np.histogram(own, edges)[0].tolist() for own in layers.values()]
    return Histograms(
        axis=Axis(title),
        layers=list(layers),
        centres=[round(float(centre), 6) for centre in (edges[:-1] + edges[1:]) / 2],
        counts=counts,
        shares=[[round(count / sum(own), 4) or None for count in own] for own in counts],
    )
