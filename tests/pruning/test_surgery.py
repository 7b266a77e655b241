"""`prune`: sizes, export, saving and refusals."""

from pathlib import Path

import pytest
import torch

from scop import UserError, load_model, make_model, prune, save_model, select_channels
from scop.models.evaluation import count_macs, count_parameters
from scop.models.export import export_onnx, export_pt2
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from tests.helpers import ROOT
from tests.networks import GroupsAndBias, Offset
from tests.pruning.helpers import Own, make_random_model


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize(
    ("factory", "arguments", "shape"),
    [("resnet20", {"num_classes": 10}, (3, 32, 32)), ("tests.networks:GroupsAndBias", {"num_classes": 5}, (3, 16, 16))],
)
def test_exported_network_computes_the_same_function(factory, arguments, shape, rule, tmp_path: Path) -> None:
    model = make_random_model(factory, arguments)
    pruned = prune(model, select_channels(model, method="l1", residual=rule, input_shape=shape)).eval()
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    assert export_onnx(pruned, images, tmp_path / "model.onnx") < 1e-4
    assert export_pt2(pruned, images, tmp_path / "model.pt2") < 1e-4
    assert str(ROOT).encode() not in (tmp_path / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("name", "params_removed", "macs_removed"),
    [("resnet20", 0.563, 0.558), ("resnet32", 0.562, 0.559), ("resnet56", 0.561, 0.560), ("resnet110", 0.560, 0.560)],
)
def test_scatter_at_rate_045_matches_the_reference_reductions(name, params_removed, macs_removed) -> None:
    model = make_model(name, num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.45, input_shape=(3, 32, 32)))
    assert 1 - count_parameters(pruned) / count_parameters(model) == pytest.approx(params_removed, abs=6e-4)
    macs = count_macs(pruned, (3, 32, 32))
    assert 1 - macs / count_macs(model, (3, 32, 32)) == pytest.approx(macs_removed, abs=6e-4)
    # There, a convolution with zeros and ones adds the scattered channels; it must not count.
    assert count_macs(pruned.to(memory_format=torch.channels_last), (3, 32, 32)) == macs


def test_resnet50_at_rate_045_matches_the_reference_parameters() -> None:
    model = make_model("torchvision:resnet50", num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.45, input_shape=(3, 32, 32)))
    assert count_parameters(pruned) == 10_180_582


def test_prunes_saves_and_loads_a_users_network(tmp_path: Path) -> None:
    model = Own().eval()
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.5, input_shape=(3, 8, 8))).eval()
    with pytest.raises(UserError, match="needs the factory of this Own"):
        save_model(pruned, tmp_path / "small")
    save_model(pruned, tmp_path / "small", factory="tests.pruning.helpers:Own", arguments={"width": 8})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_model(tmp_path / "small")(images), pruned(images))


def test_rejects_an_unimportable_factory_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_package.nets'"):
        save_model(GroupsAndBias(), tmp_path / "small", factory="no_such_package.nets:make")
    assert not (tmp_path / "small").exists()


def test_rejects_a_model_that_is_already_pruned() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="l1", input_shape=(3, 16, 16), residual="inner")
    with pytest.raises(UserError, match="is already pruned"):
        prune(prune(model, plan), plan)


def test_rejects_inexact_pruning_with_the_reason() -> None:
    with pytest.raises(UserError, match="channels of 'conv' cannot be removed exactly"):
        model = Offset(in_channels=3)
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))
    refusals = [g.refusal for g in ChannelGraph(Own(kind="layer_norm"), (3, 8, 8)).groups]
    assert any("'layer_norm' (ln), which is not supported" in (refusal or "") for refusal in refusals)
