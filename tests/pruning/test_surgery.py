import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from scop import ChannelPlan, UserError, load_model, make_model, prune, save_model, select_channels
from scop.models.evaluation import count_macs, count_parameters
from scop.models.export import export_onnx, export_pt2
from scop.pruning.cuts import cuts_of
from scop.pruning.exactness import exactness, masked_twin
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from tests.helpers import randomise_batch_norms
from tests.networks import GroupsAndBias, Offset

# name, factory, arguments, input shape
NETWORKS = [
    ("resnet20", "resnet20", {"num_classes": 10}, (3, 32, 32)),
    ("resnet56", "resnet56", {"num_classes": 10}, (3, 16, 16)),
    ("resnet50", "torchvision:resnet50", {"num_classes": 10}, (3, 32, 32)),
    ("mobilenet_v2", "torchvision:mobilenet_v2", {"num_classes": 10}, (3, 32, 32)),
    ("densenet", "tests.networks:small_densenet", {"num_classes": 10}, (3, 32, 32)),
    ("groups_and_bias", "tests.networks:GroupsAndBias", {"num_classes": 5}, (3, 16, 16)),
]


def made(factory: str, arguments: dict[str, int]) -> nn.Module:
    torch.manual_seed(1)
    model = make_model(factory, **arguments)
    randomise_batch_norms(model)
    return model.eval()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize(("name", "factory", "arguments", "shape"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_masked_pruned_and_reloaded_are_one_function(name, factory, arguments, shape, rule, tmp_path) -> None:
    model = made(factory, arguments)
    plan = select_channels(model, method="random", prune_rate=0.45, residual=rule, input_shape=shape)
    cuts = cuts_of(ChannelGraph(model, shape), plan)
    assert exactness(model, cuts, shape) < 1e-4

    pruned = prune(model, plan).eval()
    assert count_parameters(pruned) < 0.9 * count_parameters(model) or name == "groups_and_bias"
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = pruned(images)
        scale = max(1.0, float(expected.abs().max()))
        assert largest(masked_twin(model, cuts)(images), expected) < 1e-4 * scale
        save_model(pruned, tmp_path / "small")
        assert torch.equal(load_model(tmp_path / "small")(images), expected)
        # Channels-last takes another way through the addition of a scattered branch.
        last = copy.deepcopy(pruned).to(memory_format=torch.channels_last)
        assert largest(last(images.to(memory_format=torch.channels_last)), expected) < 1e-4 * scale


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize(
    ("factory", "arguments", "shape"),
    [("resnet20", {"num_classes": 10}, (3, 32, 32)), ("tests.networks:GroupsAndBias", {"num_classes": 5}, (3, 16, 16))],
)
def test_exported_is_the_same_function(factory, arguments, shape, rule, tmp_path: Path) -> None:
    model = made(factory, arguments)
    pruned = prune(model, select_channels(model, method="l1", residual=rule, input_shape=shape)).eval()
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    assert export_onnx(pruned, images, tmp_path / "model.onnx") < 1e-4
    assert export_pt2(pruned, images, tmp_path / "model.pt2") < 1e-4


def test_vgg_with_batch_norm_flattens_into_its_classifier() -> None:
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(0)
    model = VGG(make_layers([16, "M", 32, "M"], batch_norm=True), num_classes=10)  # type: ignore[list-item]
    model.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))
    randomise_batch_norms(model.eval())
    plan = select_channels(model, method="l1", input_shape=(3, 28, 28))
    assert exactness(model, cuts_of(ChannelGraph(model, (3, 28, 28)), plan), (3, 28, 28)) < 1e-4
    assert prune(model, plan).classifier[0].in_features == 18 * 7 * 7


@pytest.mark.parametrize(
    ("name", "params_removed", "macs_removed"),
    [("resnet20", 0.563, 0.558), ("resnet32", 0.562, 0.559), ("resnet56", 0.561, 0.560), ("resnet110", 0.560, 0.560)],
)
def test_scatter_at_rate_045_removes_what_the_reference_says(name, params_removed, macs_removed) -> None:
    model = make_model(name, num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.45, input_shape=(3, 32, 32)))
    assert 1 - count_parameters(pruned) / count_parameters(model) == pytest.approx(params_removed, abs=6e-4)
    macs = count_macs(pruned, (3, 32, 32))
    assert 1 - macs / count_macs(model, (3, 32, 32)) == pytest.approx(macs_removed, abs=6e-4)
    # There the scattered channels are added by a convolution, of zeros and ones.
    assert count_macs(pruned.to(memory_format=torch.channels_last), (3, 32, 32)) == macs


def test_resnet50_at_rate_045_keeps_the_parameters_of_the_reference() -> None:
    model = make_model("torchvision:resnet50", num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.45, input_shape=(3, 32, 32)))
    assert count_parameters(pruned) == 10_180_582


def test_layers_keep_their_attributes_and_the_dense_model_its_weights() -> None:
    model = GroupsAndBias()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = prune(model, select_channels(model, method="l1", residual="coupled", input_shape=(3, 16, 16)))
    assert (pruned.grouped.dilation, pruned.grouped.groups) == ((2, 2), 4)
    assert pruned.grouped.bias.shape == (pruned.grouped.out_channels,)
    assert (pruned.stem_norm.eps, pruned.stem_norm.momentum) == (1e-3, 0.3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_kept_channels_keep_their_order_and_weights() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="random", prune_rate=0.3, input_shape=(3, 32, 32))
    pruned = prune(model, plan)
    kept = plan.kept["layer1.0.conv1"]
    assert kept == sorted(kept)
    assert torch.equal(pruned.layer1[0].bn1.weight, model.layer1[0].bn1.weight[kept])
    assert torch.equal(pruned.layer1[0].conv1.weight, model.layer1[0].conv1.weight[kept])


def test_scattering_works_in_training_and_under_autocast() -> None:
    model = make_model("resnet20").to(memory_format=torch.channels_last)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 16, 16))).train()
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        pruned(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_scattering_network_goes_through_torch_compile(layout: torch.memory_format) -> None:
    model = made("resnet20", {"num_classes": 10})
    pruned = prune(model, select_channels(model, method="random", prune_rate=0.45, input_shape=(3, 8, 8)))
    pruned = pruned.to(memory_format=layout).train()
    images = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(pruned), backend="aot_eager", fullgraph=True)  # needs no C++ compiler
    expected, actual = pruned(images), compiled(images)
    assert largest(expected, actual) < 1e-4
    actual.sum().backward()
    expected.sum().backward()
    for (name, mine), theirs in zip(pruned.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-3), name


def test_a_branch_with_stochastic_depth_is_scattered_in_training_too() -> None:
    model = make_model("torchvision:efficientnet_b0", num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 32, 32))).train()
    assert pruned(torch.randn(2, 3, 32, 32)).shape == (2, 10)


class Noisy(nn.Module):
    """A residual block with stochastic depth as timm and the older repositories write it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.head = nn.Linear(16, 10)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        shape = (len(x), 1, 1, 1)
        if not self.training:
            return x
        if self.kind == "new_empty":
            return x * x.new_empty(shape).bernoulli_(0.8).div_(0.8)
        if self.kind == "div":
            return x.div(0.8) * (0.8 + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        return x.clamp(max=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.dropped(self.block(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", ["new_empty", "div"])
def test_other_forms_of_stochastic_depth_are_scattered_too(kind: str) -> None:
    model = Noisy(kind)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8))).train()
    state = torch.get_rng_state()
    assert pruned(torch.randn(64, 3, 8, 8)).shape == (64, 10)
    torch.set_rng_state(state)
    prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_branch_meets_in_training_alone_is_refused_before_it() -> None:
    model = Noisy("clamp")
    with pytest.raises(UserError, match="a residual branch passes through clamp before it is added"):
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))


def test_what_was_frozen_stays_so() -> None:
    model = make_model("resnet20").requires_grad_(False)
    model.fc.requires_grad_(True)
    for rule in RESIDUAL_RULES:
        pruned = prune(model, select_channels(model, method="l1", residual=rule, input_shape=(3, 8, 8)))
        assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_exactness_sees_a_network_that_cannot_be_pruned_exactly() -> None:
    model = Offset(in_channels=3)
    plan = select_channels(model, method="l1", input_shape=(3, 8, 8))
    assert exactness(model, cuts_of(ChannelGraph(model, (3, 8, 8)), plan), (3, 8, 8)) > 1e-3


def plan_for(**changes) -> ChannelPlan:
    plan = select_channels(make_model("resnet20"), method="l1", input_shape=(3, 32, 32))
    return ChannelPlan.model_validate(plan.model_dump() | changes)


def test_plans_that_do_not_fit_are_refused_by_layer() -> None:
    resnet = make_model("resnet20")
    for kept, channels, message in (
        ({"layer1.0.conv9": [0]}, {"layer1.0.conv9": 16}, r"did you mean 'layer1.0.conv\d'"),
        ({"layer1.0.conv1": [0]}, {"layer1.0.conv1": 32}, "has 16 channels in the model but 32 in the plan"),
        ({"conv1": [0]}, {"conv1": 16}, "'conv1' is in the plan but cannot be pruned under residual rule 'scatter'"),
    ):
        with pytest.raises(UserError, match=message):
            prune(resnet, plan_for(kept=kept, channels=channels))
    with pytest.raises(UserError, match="keep the same channels in all of them"):
        prune(resnet, plan_for(kept={"conv1": [0]}, channels={"conv1": 16}, residual="coupled"))


def test_a_group_that_loses_unequally_is_refused() -> None:
    plan = ChannelPlan(
        input_shape=(3, 16, 16), residual="inner", kept={"grouped": list(range(1, 24))}, channels={"grouped": 24}
    )
    with pytest.raises(UserError, match="has 4 groups: remove the same number of channels from each"):
        prune(GroupsAndBias(), plan)


def test_a_damaged_plan_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"input_shape": [3, 32, 32], "residual": "scatter", "kept": {"a": [3, 1]}, "channels": {"a": 4}}')
    with pytest.raises(UserError, match="must be ascending"):
        ChannelPlan.load(path)


class Own(nn.Module):
    """A user's own network, made by nothing of ours."""

    def __init__(self, width: int = 8, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.a, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.other = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.unused = nn.Conv2d(4, 4, 1)
        self.layer_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        y = self.other(self.b(x))
        if self.kind == "dropout":
            y = nn.functional.dropout(y, 0.1, self.training)
        if self.kind != "plain":
            y = x + y
        y = y.mean((2, 3))
        return self.head(self.layer_norm(y) if self.kind == "layer_norm" else y)


def test_a_users_own_network_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    model = Own().eval()
    pruned = prune(model, select_channels(model, method="l1", prune_rate=0.5, input_shape=(3, 8, 8))).eval()
    with pytest.raises(UserError, match="needs the factory of this Own"):
        save_model(pruned, tmp_path / "small")
    save_model(pruned, tmp_path / "small", factory="tests.pruning.test_surgery:Own", arguments={"width": 8})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_model(tmp_path / "small")(images), pruned(images))


def test_a_factory_that_cannot_be_imported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot import 'no_such_package.nets'"):
        save_model(GroupsAndBias(), tmp_path / "small", factory="no_such_package.nets:make")
    assert not (tmp_path / "small").exists()


def test_a_pruned_model_is_not_pruned_again() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="l1", input_shape=(3, 16, 16), residual="inner")
    with pytest.raises(UserError, match="is already pruned"):
        prune(prune(model, plan), plan)


def test_what_cannot_be_pruned_exactly_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="channels of 'conv' cannot be removed exactly"):
        model = Offset(in_channels=3)
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))
    refusals = [g.refusal for g in ChannelGraph(Own(kind="layer_norm"), (3, 8, 8)).groups]
    assert any("'layer_norm' (ln), which is not supported" in (refusal or "") for refusal in refusals)


def test_dropout_before_the_addition_is_refused_by_name() -> None:
    model = Own(kind="dropout")
    with pytest.raises(UserError, match="passes through dropout before it is added"):
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8))).train()(torch.randn(2, 3, 8, 8))
    coupled = prune(model, select_channels(model, method="l1", residual="coupled", input_shape=(3, 8, 8)))
    assert coupled.train()(torch.randn(2, 3, 8, 8)).shape == (2, 4)
