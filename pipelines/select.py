"""`scop select`: what a variant removes from each layer, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from pipelines.presets import find_config
from pipelines.runs import CONFIG, records_of
from scop.config import Config, VariantSection, load_config
from scop.config.parsing import override, parse
from scop.data.sources import peek
from scop.errors import UserError
from scop.models.artifacts import load_model, load_pretrained, load_weights
from scop.models.factories import network_for
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import spec_of
from scop.report.formatting import human
from scop.runtime.exit_codes import Status
from scop.selection.latency import describe_latency
from scop.selection.scores import Scores
from scop.selection.select import select_channels
from scop.selection.sizes import Sizes
from scop.storage.cache import Cache
from scop.storage.fetch import local_path
from scop.storage.files import join_uri, read_if_exists
from scop.storage.folders import local_folder
from scop.storage.manifest import write_atomically


@dataclass(frozen=True)
class Dense:
    """A dense network to select from.

    Attributes:
        model: the network.
        shape: (C, H, W) of an image.
        scores: scores of its channels, if the knockoff phase has run.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    scores: Scores | None


def dense_of(config: Config, cache: Cache) -> Dense:
    """Return the network of a configuration before any step has run, with the configured weights or random ones.

    Raises:
        UserError: the images, whose shape is needed, or the network cannot be found.
    """
    data = config.data
    if data.path is not None:
        data = data.model_copy(update={"path": str(local_path(data.path, cache))})
    shape, classes = peek(data)
    torch.manual_seed(config.dense.seed)
    model = network_for(config.dense, shape, classes)
    if config.dense.weights is not None:
        load_weights(model, local_path(config.dense.weights, cache))
    elif config.dense.pretrained is not None:
        load_pretrained(model, local_path(config.dense.pretrained, cache), classes)
    return Dense(model, shape, None)


def dense_of_run(uri: str, cache: Cache) -> Dense:
    """Return the network and the scores of a run.

    Raises:
        UserError: its dense training or its knockoff phase has not finished.
    """
    records = {record.step: record for record in records_of(uri) if record.status is Status.DONE}
    folders: list[Path] = []
    for step, output in (("train_dense", "model"), ("train_knockoff", "scores")):
        if step not in records:
            raise UserError(f"run {uri} has no finished step {step}")
        folders.append(local_folder(records[step].outputs[output].uri, cache, output))
    model = load_model(folders[0])
    spec = spec_of(model)
    assert spec is not None and spec.input_shape is not None
    return Dense(model, spec.input_shape, Scores.load(folders[1] / "scores.safetensors"))


def config_of(given: str | None, run: str | None, changes: Sequence[str], cache: Cache) -> Config:
    """Return the named configuration, that of the run, or the default one, with overrides applied."""
    if given is None and run is not None and (content := read_if_exists(join_uri(run, CONFIG))):
        values = yaml.safe_load(content)
        for change in changes:
            override(values, change)
        return parse(Config, values)
    return load_config(find_config(given or "digits-resnet20", cache), list(changes))


def plan_of(dense: Dense, variant: VariantSection) -> ChannelPlan:
    """Return the plan of a variant; without scores, only the number of kept channels of each layer is meaningful.

    Raises:
        UserError: the number of channels depends on scores, but there are none.
    """
    if dense.scores is None and variant.method == "scop":
        if variant.selection != "uniform":
            raise UserError(
                f"selection {variant.selection} of method scop needs scores: name a run (scop select RUN --dry-run), "
                "or choose another method (--set variants.0.method=l1)"
            )
        # The number of channels does not depend on the scores.
        variant = variant.model_copy(update={"method": "random"})
    return select_channels(dense.model, dense.scores, input_shape=dense.shape, variant=variant)


def save(plan: ChannelPlan, path: Path) -> None:
    """Write a plan that `scop.prune` accepts."""
    write_atomically(path, plan.model_dump_json(indent=1) + "\n")


def print_plan(dense: Dense, plan: ChannelPlan, variant: VariantSection) -> None:
    """Print each pruned layer's kept channels and size, then the totals and why other layers are unpruned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    graph = ChannelGraph(dense.model, dense.shape)
    sizes = Sizes(dense.model, graph)
    whole = plan.model_copy(update={"kept": {layer: list(range(n)) for layer, n in plan.channels.items()}})
    before, after = sizes.by_layer(whole), sizes.by_layer(plan)
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column("layer", no_wrap=True)
    for title in ("channels", "kept", "removed", "parameters", "MACs"):
        view.add_column(title, justify="right", no_wrap=True)
    if plan.unsure:
        view.add_column("unsure", justify="right", no_wrap=True)
    for layer, kept in plan.kept.items():
        channels = plan.channels[layer]
        cells = [layer, str(channels), str(len(kept)), f"{1 - len(kept) / channels:.0%}"]
        cells += [f"{human(old)} -> {human(new)}" for old, new in zip(before[layer], after[layer], strict=True)]
        view.add_row(*map(Text, [*cells, *([str(len(plan.unsure.get(layer, [])))] if plan.unsure else [])]))
    print(f"{variant.label}: residual rule {plan.residual}, selection {plan.selection}, rate {plan.prune_rate:.4g}")
    Console(width=max(Console().width, 100)).print(view)
    for line in graph.unpruned(plan.residual):
        print(f"not pruned: {line}")
    for title, what in (("parameters", "params"), ("MACs", "macs")):
        old, new = sizes.count(what), sizes.count(what, plan)
        print(f"{title}: {human(old)} -> {human(new)}, {1 - new / old:.1%} removed")
    if (latency := describe_latency(plan, variant.budget)) is not None:
        print(f"latency: {latency}")
