"""PNG plots of a step's results, for MLflow and the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scop.report.figures.axes import AXES
from scop.report.figures.networks import Confusion, Histograms, confusion, histograms

if TYPE_CHECKING:
    from torch import Tensor

    from scop.data.dataset import DatasetInfo
    from scop.pruning.plan import ChannelPlan

_KEPT, _REMOVED = "#2563a8", "#d5dbe3"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object interface: pyplot keeps global state and looks for a display.
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a class may be named $10_$20
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def kept_channels(plan: ChannelPlan, path: Path) -> None:
    """Plot kept and removed channels, one bar per layer."""
    layers = list(plan.kept)
    figure, axes = _figure(8, max(2.5, 0.22 * len(layers) + 0.9))
    kept = [len(plan.kept[layer]) for layer in layers]
    axes.barh(layers, [plan.channels[layer] for layer in layers], color=_REMOVED, label="removed")
    doubtful = [[len(part) for part in plan.doubtful(layer)] for layer in layers]
    unsure = {"xerr": list(zip(*doubtful, strict=True)), "error_kw": {"elinewidth": 0.8}} if plan.unsure else {}
    axes.barh(layers, kept, color=_KEPT, label="kept (whiskers: uncertain)" if plan.unsure else "kept", **unsure)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("channels")
    axes.set_title(f"{plan.method}, rate {plan.prune_rate}, {plan.residual}: kept channels", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def score_histograms(scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot the histogram of the scores of each layer."""
    if (found := histograms(scores)) is not None:
        draw_histograms(found, path)


def draw_histograms(found: Histograms, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Plot the histograms of the scores of the layers: a row per layer, a stronger colour for more channels."""
    import numpy as np

    layers = len(found.layers)
    figure, axes = _figure(8, max(2.5, 0.22 * layers + 0.9))
    shares = np.array(found.shares, dtype=float)  # an empty bin is NaN: not drawn
    axes.pcolormesh(found.centres, range(layers), shares, cmap="Blues", vmin=0, edgecolors="white", linewidth=0.5)
    axes.set_yticks(range(layers), found.layers, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel(found.axis.title)
    axes.set_title("Score histograms", loc="left", fontsize=10)
    figure.savefig(path, metadata=metadata)


def sensitivity_curves(top1: Mapping[str, Sequence[float]], rates: Sequence[float], path: Path) -> None:
    """Plot top-1 with a single layer pruned: one row per layer, one column per rate."""
    import numpy as np

    layers, values = list(top1), np.asarray(list(top1.values()))
    figure, axes = _figure(2.5 + 0.9 * len(rates), max(2.5, 0.26 * len(layers) + 1.0))
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(rates)), [f"{rate:.0%}" for rate in rates], fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        axes.text(
            column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color="white" if value > 0.5 else "#334"
        )
    axes.set_xlabel("share of the layer's channels removed")
    axes.set_title("Top-1 with one layer pruned", loc="left", fontsize=10)
    figure.savefig(path)


def knockoff_images(real: Tensor, knockoffs: Tensor, info: DatasetInfo, path: Path) -> None:
    """Plot up to ten images above their knockoffs.

    Args:
        real, knockoffs: (B, C, H, W), normalised.
        info: mean and standard deviation of the normalisation.
        path: PNG file to write.
    """
    import numpy as np

    count = min(10, len(real))
    figure, axes = _figure(count, 2.5)
    rows = []
    for images in (real, knockoffs):
        pixels = images[:count].float().cpu().permute(0, 2, 3, 1).numpy() * np.asarray(info.std) + np.asarray(info.mean)
        padded = np.pad(pixels.clip(0, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        rows.append(np.concatenate(list(padded), axis=1))
    picture = np.concatenate(rows)
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    axes.axis("off")
    axes.set_title("Images (top) and their knockoffs (bottom)", loc="left", fontsize=10)
    figure.savefig(path)


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Plot the counts by true and predicted class: (classes, classes), rows are true classes."""
    draw_confusion(confusion(counts, classes), path)


def draw_confusion(found: Confusion, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Plot a confusion matrix."""
    import numpy as np

    classes, share = found.classes, np.asarray(found.shares)
    side = min(12.0, max(3.5, 0.45 * len(classes) + 1.5))
    figure, axes = _figure(side, side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
        for row, column in np.argwhere(np.asarray(found.counts)):
            colour = "white" if share[row, column] > 0.5 else "#334"
            axes.text(column, row, found.counts[row][column], ha="center", va="center", fontsize=7, color=colour)
    x, y = AXES["confusion"]
    axes.set_xlabel(x.title)
    axes.set_ylabel(y.title)
    axes.set_title("Confusion matrix of the pruned network, test split", loc="left", fontsize=10)
    figure.savefig(path, metadata=metadata)
