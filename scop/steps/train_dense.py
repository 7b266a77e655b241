"""Step 2: train the dense network, or take the weights that are given; measure it either way."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scop.config import DenseSection
from scop.config.parsing import Section
from scop.data.dataset import Dataset, load_dataset
from scop.errors import UserError
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
from scop.storage.files import local
from scop.storage.manifest import sha256_of


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
        load_weights(model, local(section.weights))
        history = []
    else:
        if section.pretrained is not None:
            begun_anew = load_pretrained(model, local(section.pretrained), len(dataset.info.classes))
            but = f", but for {' and '.join(begun_anew)}, which had other classes" if begun_anew else ""
            print(f"dense: starts from {section.pretrained}{but}", flush=True)
        history = train_supervised(model, dataset, section, context, label="dense")
    save_settings(outputs.model, dense=_made_by(section, dataset))
    save_model(model, outputs.model, history=history, device=context.device, others=[SETTINGS])

    metrics = {
        "params": float(count_parameters(model)),
        "macs": float(count_macs(model, dataset.info.shape)),
    }
    if (accuracy := validation_accuracy(model, dataset, context)) is not None:
        metrics |= {"validation_top1": accuracy.top1, "validation_loss": accuracy.loss}
    accuracy_text = f", validation top-1 {metrics['validation_top1']:.2%}" if "validation_top1" in metrics else ""
    print(f"dense: {human(metrics['params'])} parameters, {human(metrics['macs'])} MACs{accuracy_text}", flush=True)
    return StepResult(metrics)


def _made_by(section: DenseSection, dataset: Dataset) -> dict[str, Any]:
    """All that the network comes from, but for the images; of files what they hold, for they lie anywhere."""
    made = section.model_dump(mode="json", exclude={"weights", "pretrained"})
    for name in ("weights", "pretrained"):
        if (place := getattr(section, name)) is not None:
            made[name] = sha256_of(local(place))[:16]
    return made | {"mean": list(dataset.info.mean), "std": list(dataset.info.std)}


def check(model: torch.nn.Module, dataset: Dataset) -> None:
    """Find out before any training what would stop the pipeline after it.

    Raises:
        UserError: the network does not run on these images, answers for other classes, or cannot be pruned.
    """
    info = dataset.info
    gated_layers(ChannelGraph(model, info.shape))
    try:
        prune(model, select_channels(model, method="random", input_shape=info.shape))
    except UserError as error:  # other variants may do
        print(f"warning: with a variant's defaults this network cannot be pruned: {error}", flush=True)
    network, images = copy.deepcopy(model).eval(), torch.zeros(2, *info.shape)
    with torch.no_grad():
        logits = network(images)
        try:
            network.to(memory_format=torch.channels_last)(images)
        except RuntimeError as error:
            raise UserError(
                "the model does not run where channels lie last in memory, as they do in training: in its forward, "
                f"take .reshape or .flatten for .view ({str(error).splitlines()[0]})"
            ) from error
    if isinstance(logits, torch.Tensor) and logits.shape == (2, len(info.classes)):
        return
    got = "x".join(map(str, logits.shape)) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
    raise UserError(f"the model answers two images with {got}; 2x{len(info.classes)} logits are needed, one per class")


def build(section: DenseSection, dataset: Dataset) -> torch.nn.Module:
    """The dense network for a dataset, with random weights, and a spec that tells all about it.

    Raises:
        UserError: no such network, or it is not made for so many channels.
    """
    info = dataset.info
    model = network_for(section, info.shape, len(info.classes))
    spec = spec_of(model)
    assert spec is not None
    description = {"input_shape": info.shape, "mean": info.mean, "std": info.std, "classes": info.classes}
    return attach_spec(model, spec.model_copy(update=description))
