"""`ChannelGraph`: prunable layers under each residual rule, batch norms and refusals."""

import pytest
import torch
from torch import Tensor, nn

from scop import UserError, make_model
from scop.pruning.graph import ChannelGraph
from tests.networks import GroupsAndBias, OnlyLinear, Plain, small_densenet


def test_scatter_prunes_only_convolutions_in_blocks() -> None:
    graph = ChannelGraph(make_model("resnet20"), (3, 32, 32))
    prunable = graph.prunable("scatter")
    expected = [f"layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3) for block in (0, 1, 2) for conv in (1, 2)]
    assert [p.name for p in prunable] == expected
    assert [p.name for p in prunable if p.scatter] == [name for name in expected if name.endswith("conv2")]


def test_inner_skips_the_last_convolution_of_each_block() -> None:
    graph = ChannelGraph(make_model("resnet20"), (3, 32, 32))
    assert [p.name[-5:] for p in graph.prunable("inner")] == ["conv1"] * 9


def test_coupled_groups_all_layers_that_write_to_a_stream() -> None:
    graph = ChannelGraph(make_model("resnet20"), (3, 32, 32))
    streams = [set(p.convs) for p in graph.prunable("coupled") if len(p.convs) > 1]
    assert streams == [
        {"conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"},
        {"layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2", "layer2.2.conv2"},
        {"layer3.0.downsample.0", "layer3.0.conv2", "layer3.1.conv2", "layer3.2.conv2"},
    ]


def test_scatter_in_bottlenecks_keeps_stem_and_shortcuts() -> None:
    graph = ChannelGraph(make_model("torchvision:resnet50", num_classes=10), (3, 64, 64))
    names = [p.name for p in graph.prunable("scatter")]
    assert "conv1" not in names
    assert not any("downsample" in name for name in names)
    assert [p.name for p in graph.prunable("scatter") if p.scatter] == [n for n in names if n.endswith("conv3")]


def test_finds_batch_norms_by_data_flow() -> None:
    graph = ChannelGraph(Plain(), (1, 8, 8))
    assert graph.batch_norm("first") == "first_norm"
    assert graph.batch_norm("second") == "second_norm"


def test_batch_norm_of_several_convolutions_belongs_to_none() -> None:
    graph = ChannelGraph(small_densenet(), (3, 32, 32))
    assert graph.batch_norm("features.denseblock1.denselayer1.conv1") == "features.denseblock1.denselayer1.norm2"
    assert graph.batch_norm("features.denseblock1.denselayer1.conv2") is None


def test_groups_constrain_a_grouped_convolution_and_its_producer() -> None:
    by_name = {p.name: p for p in ChannelGraph(GroupsAndBias(), (3, 16, 16)).prunable("coupled")}
    assert by_name["stem"].blocks == 4
    assert by_name["grouped"].blocks == 4
    assert by_name["wide"].blocks == 1


def test_tracing_does_not_change_the_model() -> None:
    model = make_model("resnet20").train()
    model.fc.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ChannelGraph(model, (3, 32, 32))
    assert model.training
    assert not model.fc.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rejects_a_network_without_convolutions() -> None:
    with pytest.raises(UserError, match="no prunable layer"):
        ChannelGraph(OnlyLinear(), (1, 8, 8)).prunable("scatter")


def test_rejects_a_wrong_input_shape() -> None:
    with pytest.raises(UserError, match="does not run on 1x8x8 images"):
        ChannelGraph(make_model("resnet20"), (1, 8, 8))


class Shared(nn.Module):
    """Runs one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.last(torch.relu(self.twice(torch.relu(self.twice(x)))))
        return self.head(x.mean((2, 3)))


def test_does_not_prune_a_layer_that_runs_twice_or_its_producers() -> None:
    graph = ChannelGraph(Shared(), (3, 8, 8))
    assert [p.name for p in graph.prunable("scatter")] == ["last"]
    assert any("runs more than once" in (group.refusal or "") for group in graph.groups)


def test_does_not_prune_the_output_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert [p.name for p in ChannelGraph(model, (3, 8, 8)).prunable("scatter")] == ["0"]
