"""Step 2: train the dense network or load given weights, and measure it."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scop.config import DenseSection
from scop.config.parsing import Section
from scop.data.dataset import Dataset, load_dataset
from scop.errors import UserError, first_line
from scop.knockoffs.phase import gated_layers
from scop.models.artifacts import SETTINGS, load_pretrained, load_weights, save_model, save_settings
from scop.models.evaluation import count_macs, count_parameters
from scop.models.factories import network_for
from scop.pruning.graph import ChannelGraph
from scop.pruning.spec import attach_spec, spec_of
from scop.pruning.surgery import prune
from scop.report.formatting import human
from scop.runtime.result import StepResult
from scop.runtime.step import Context
from scop.selection.select import select_channels
from scop.steps.common import train_supervised, validation_accuracy
from scop.storage.fetch import local_path
from scop.storage.manifest import sha256_of

logger = logging.getLogger(__name__)


class Config(Section):
    dense: DenseSection


@dataclass(frozen=True)
class Inputs:
    dataset: Path


@dataclass(frozen=True)
class Outputs:
    model: Path


def run(config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> StepResult:
    section, dataset = config.dense, load_dataset(inputs.dataset)
    torch.manual_seed(section.seed)
    model = build(section, dataset)
    check(model, dataset)
    if section.weights is not None:
        load_weights(model, local_path(section.weights, context.cache))
        history = []
    else:
        if section.pretrained is not None:
            path = local_path(section.pretrained, context.cache)
            replaced = load_pretrained(model, path, len(dataset.info.classes))
            but = f", except {' and '.join(replaced)}, which had other classes" if replaced else ""
            logger.info("dense: starts from %s%s", section.pretrained, but)
        history = train_supervised(model, dataset, section, context, label="dense")
    save_settings(outputs.model, dense=_settings(section, dataset, context))
    save_model(model, outputs.model, history=history, device=context.device, others=[SETTINGS])

    metrics = {
        "params": float(count_parameters(model)),
        "macs": float(count_macs(model, dataset.info.shape)),
    }
    if (accuracy := validation_accuracy(model, dataset, context)) is not None:
        metrics |= {"validation_top1": accuracy.top1, "validation_loss": accuracy.loss}
    accuracy_text = f", validation top-1 {metrics['validation_top1']:.2%}" if "validation_top1" in metrics else ""
    logger.info("dense: %s parameters, %s MACs%s", human(metrics["params"]), human(metrics["macs"]), accuracy_text)
    return StepResult(metrics)


def _settings(section: DenseSection, dataset: Dataset, context: Context) -> dict[str, Any]:
    """Return everything that the network depends on, except the images; files are identified by their content."""
    made = section.model_dump(mode="json", exclude={"weights", "pretrained"})
    for name in ("weights", "pretrained"):
        if (uri := getattr(section, name)) is not None:
            made[name] = sha256_of(local_path(uri, context.cache))[:16]
    return made | {"mean": list(dataset.info.mean), "std": list(dataset.info.std)}


def check(model: torch.nn.Module, dataset: Dataset) -> None:
    """Check, before training, requirements of later steps.

    Raises:
        UserError: the network does not run on these images, has outputs for other classes, or cannot be pruned.
    """
    info = dataset.info
    gated_layers(ChannelGraph(model, info.shape))
    try:
        prune(model, select_channels(model, method="random", input_shape=info.shape))
    except UserError as error:  # other settings of a variant may work
        logger.warning("with the defaults of a variant this network cannot be pruned: %s", error)
    network, images = copy.deepcopy(model).eval(), torch.zeros(2, *info.shape)
    with torch.no_grad():
        logits = network(images)
        try:
            network.to(memory_format=torch.channels_last)(images)
        except RuntimeError as error:
            raise UserError(
                "the model does not run in channels-last memory format, which training uses: in its forward, replace "
                f".view by .reshape or .flatten ({first_line(error)})"
            ) from error
    if isinstance(logits, torch.Tensor) and logits.shape == (2, len(info.classes)):
        return
    got = "x".join(map(str, logits.shape)) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    raise UserError(
        f"the model returns {got} for two images; 2x{len(info.classes)} logits are needed, one for each class"
    )


def build(section: DenseSection, dataset: Dataset) -> torch.nn.Module:
    """Return the dense network for a dataset, with random weights and a complete spec.

    Raises:
        UserError: there is no such network, or it does not take images of this number of channels.
    """
    info = dataset.info
    model = network_for(section, info.shape, len(info.classes))
    spec = spec_of(model)
    assert spec is not None
    description = {"input_shape": info.shape, "mean": info.mean, "std": info.std, "classes": info.classes}
    return attach_spec(model, spec.model_copy(update=description))
