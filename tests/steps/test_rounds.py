"""Several rounds of pruning and fine-tuning, and the control that trains from scratch."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scop import load_model, make_model, prune, select_channels, train_knockoffs
from scop.config import VariantSection
from scop.knockoffs.phase import gated_layers
from scop.pruning.cuts import expand
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import spec_of
from scop.selection.rounds import Round
from scop.selection.scores import Scores
from tests.helpers import ROOT, randomise_batch_norms, run_step
from tests.networks import GroupsAndBias


@pytest.mark.parametrize("residual", RESIDUAL_RULES)
@pytest.mark.parametrize("name", ["resnet20", "groups"])
def test_expanded_network_computes_the_same_function_with_zeros_in_removed_channels(name: str, residual: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = make_model("resnet20") if name == "resnet20" else GroupsAndBias()
    randomise_batch_norms(model.eval())
    plan = select_channels(model, method="random", prune_rate=0.5, residual=residual, input_shape=(3, 16, 16))
    pruned = prune(model, plan)
    for parameter in pruned.parameters():  # stands for training
        parameter.data += 0.01 * torch.randn_like(parameter)
    grown = expand(pruned, model)
    images = torch.randn(3, 3, 16, 16)
    assert torch.allclose(grown(images), pruned(images), atol=1e-4)
    trained = (copy.deepcopy(network).to(memory_format=torch.channels_last) for network in (pruned, model))
    assert all(map(torch.equal, expand(*trained).state_dict().values(), grown.state_dict().values()))
    layer = next(iter(plan.kept))
    assert not grown.get_submodule(layer).weight[plan.removed(layer)].any()
    again = prune(grown, plan)
    assert torch.equal(again(images), pruned(images))


def test_expanding_restores_other_buffers() -> None:
    model = make_model("resnet20")
    model.register_buffer("mask", torch.arange(400) % 3 == 0)
    model.register_buffer("table", (torch.arange(400) % 251).to(torch.uint8))
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.5, input_shape=(3, 16, 16)))
    grown = expand(pruned, model)
    for name in ("mask", "table"):
        assert torch.equal(grown.get_buffer(name), model.get_buffer(name))
        assert grown.get_buffer(name).dtype == model.get_buffer(name).dtype


@pytest.mark.parametrize(
    ("method", "selection"),
    [
        *((method, {"prune_rate": 0.75}) for method in ("scop", "l1", "bn_gamma", "fpgm", "random")),
        ("scop", {"selection": "global", "budget": {"macs": 0.25}}),
        ("l1", {"selection": "global", "budget": {"params": 50_000}}),
    ],
)
def test_later_rounds_keep_no_channel_that_an_earlier_one_removed(method: str, selection: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, shape = make_model("resnet20"), (3, 32, 32)
    variant = VariantSection.model_validate({"method": method, "floor": 0.1, **selection})

    layers = gated_layers(ChannelGraph(model, shape))

    def scores() -> dict[str, torch.Tensor]:
        return {layer: torch.rand(model.get_submodule(layer).out_channels) for layer in layers}

    first = select_channels(model, scores(), input_shape=shape, variant=variant, round=Round(1, 2))
    grown = expand(prune(model, first), model)
    other_seed, last = variant.model_copy(update={"seed": 1}), Round(2, 2, first)
    second = select_channels(grown, scores(), input_shape=shape, variant=other_seed, round=last)
    for layer, kept in second.kept.items():
        assert set(kept) <= set(first.kept[layer])
    at_once = select_channels(model, scores(), input_shape=shape, variant=variant)
    if "budget" not in selection:
        assert [*map(len, second.kept.values())] == [*map(len, at_once.kept.values())]
        assert [len(kept) for layer, kept in first.kept.items()] == [n // 2 for n in first.channels.values()]
    else:
        assert sum(map(len, second.kept.values())) < sum(map(len, first.kept.values()))


def finetune(dataset: Path, dense: Path, folder: Path, variant: dict[str, object], **settings: object) -> Path:
    """Select and fine-tune; return the folder of the pruned model."""
    knockoff = {"epochs": 1, "batch_size": 64}
    inputs = {"dense": str(dense)}
    run_step(
        "train_knockoff",
        {"knockoff": knockoff},
        inputs | {"dataset": str(dataset)},
        {"scores": f"{folder}/scores"},
    )
    run_step(
        "select_channels", {"variant": variant}, inputs | {"scores": f"{folder}/scores"}, {"plan": f"{folder}/plan"}
    )
    section = {"epochs": 2, "batch_size": 64, "lr": 0.02} | settings
    run_step(
        "finetune",
        {"finetune": section, "variant": variant},
        inputs | {"dataset": str(dataset), "plan": f"{folder}/plan"},
        {"model": f"{folder}/model"},
    )
    return folder / "model"


def test_rounds_alternate_pruning_and_training(
    digits_folder: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    competed: list[torch.Tensor] = []

    def watched(network: nn.Module, *args: Any, **settings: Any) -> Scores:
        competed.append(network.get_submodule("first").weight.detach().clone())
        return train_knockoffs(network, *args, **settings)

    monkeypatch.setattr("scop.steps.finetune.train_knockoffs", watched)
    variant = {"method": "scop", "prune_rate": 0.875, "rounds": 3, "residual": "coupled"}
    folder = finetune(digits_folder, model_folder, tmp_path, variant, round_epochs=1)
    printed = capsys.readouterr().out
    assert "scop-0.875, round 1: epoch 1/1" in printed
    assert "scop-0.875, round 3: epoch 2/2" in printed
    first = ChannelPlan.load(tmp_path / "plan" / "plan.json")
    assert [len(kept) for kept in first.kept.values()] == [8, 12, 16]
    model = load_model(folder)
    spec = spec_of(model)
    assert spec is not None
    assert spec.plan is not None
    assert [len(kept) for kept in spec.plan.kept.values()] == [2, 3, 4]
    assert spec.plan.prune_rate == 0.875
    assert all(set(kept) <= set(first.kept[layer]) for layer, kept in spec.plan.kept.items())
    epochs = [record["epoch"] for record in json.loads((folder / "history.json").read_text())]
    assert epochs == [1, 2, 3, 4]
    surgery = json.loads((folder / "surgery.json").read_text())
    assert surgery["masked_pruned"] < 1e-4
    # The knockoff phase ran again before rounds 2 and 3, on the remaining, trained channels.
    assert [int(weight.flatten(1).any(1).sum()) for weight in competed] == [8, 4]
    remaining = competed[1].flatten(1).any(1)
    assert not torch.equal(competed[0][remaining], competed[1][remaining])


def test_scratch_trains_a_narrow_network_from_random_weights(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    variant = {"method": "scratch", "prune_rate": 0.5}
    untrained = load_model(finetune(digits_folder, model_folder, tmp_path, variant, epochs=0))
    spec = spec_of(untrained)
    assert spec is not None
    assert spec.plan is not None
    assert spec.plan.method == "scratch"
    dense = load_model(model_folder)
    assert untrained.first.out_channels == dense.first.out_channels // 2
    assert not torch.equal(untrained.first.weight, dense.first.weight[: untrained.first.out_channels])


@pytest.mark.slow
def test_a_killed_round_resumes_with_identical_weights(digits_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    variant = {"method": "scop", "prune_rate": 0.75, "rounds": 3}
    finetune(digits_folder, model_folder, tmp_path, variant, epochs=0, round_epochs=0)  # for scores and plan
    section = {"epochs": 20, "round_epochs": 10, "batch_size": 64, "lr": 0.02, "precision": "fp32"}
    config = {"finetune": section, "variant": variant}
    inputs = {"dataset": str(digits_folder), "dense": str(model_folder), "plan": f"{tmp_path}/plan"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = (
        "from scop.runtime.execution import execute; "
        f"execute('finetune', {config!r}, {inputs!r}, {{'model': {str(killed)!r}}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(killed.glob("checkpoints/*/round2/*.json")):
            assert process.poll() is None
        process.kill()
    for folder in (killed, whole):
        run_step("finetune", config, inputs, {"model": str(folder)})
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list(killed.glob("checkpoints/*/*"))
    assert len(json.loads((killed / "history.json").read_text())) == 40
