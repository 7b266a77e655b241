"""Supported networks: each is pruned exactly, or refused with the layer and the reason.

It generates the table in docs/networks.md: ``UPDATE_GOLDEN=1 make test-slow ARGS=tests/pruning/test_networks.py``.
"""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop import UserError, make_model, prune, select_channels, train_knockoffs
from scop.knockoffs.phase import gated_layers
from scop.models.evaluation import count_macs, count_parameters
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from scop.pruning.surgery import prune_exactly
from tests.helpers import ROOT, randomise_batch_norms
from tests.networks import padded_resnet, small_convnext

TABLE = ROOT / "docs" / "networks.md"
EXACT = 1e-10
"""Largest difference that counts as exact; float64 rounding errors are far smaller."""


class Odd(nn.Module):
    """Three convolutions; subclasses define what happens between the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.a_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.c, self.c_norm = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)
        self.add_layers()
        self.eval()

    def add_layers(self) -> None:
        """Add the layers of the subclass."""

    def between(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return torch.relu(self.b_norm(self.b(torch.relu(self.a_norm(self.a(x))))))

    def last(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.c_norm(self.c(x))).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Conditional(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 1e9 else x


class Branches(Odd):
    """Has a layer that no example image reaches but other images may."""

    def add_layers(self) -> None:
        self.other = nn.Conv2d(16, 16, 1)

    def between(self, x: Tensor) -> Tensor:
        return self.other(x) if x.mean() > 1e6 else x


class Keywords(Odd):
    def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
        return self.last(self.first(x) * scale)


class SqueezeExcitation(Odd):
    def add_layers(self) -> None:
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)

    def between(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gates[:, :, None, None]


class Difference(Odd):
    def first(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a_norm(self.a(x)))
        return x - torch.relu(self.b_norm(self.b(x)))


class Kernel(Odd):
    def add_layers(self) -> None:
        self.kernel = nn.Parameter(torch.randn(16, 16, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


class Halves(Odd):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :8] * 2, x[:, 8:]], 1)


class Chunks(Odd):
    def between(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([right, left], 1)


class Shuffled(Odd):
    def between(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)


class Twice(Odd):
    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.b_norm(self.b(x)))


class Grouped(Odd):
    def add_layers(self) -> None:
        self.b_norm = nn.GroupNorm(4, 16)  # type: ignore[assignment]


class Detached(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x.detach()


class Tied(Odd):
    def add_layers(self) -> None:
        self.twin = nn.Conv2d(16, 16, 3, padding=1)
        self.twin.weight = self.b.weight

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(self.twin(x))


class Parametrised(Odd):
    def add_layers(self) -> None:
        self.b = nn.utils.parametrizations.weight_norm(self.b)


class Prelu(Odd):
    def add_layers(self) -> None:
        self.slope = nn.PReLU(16)

    def between(self, x: Tensor) -> Tensor:
        return self.slope(x)


class FlatAndPooled(Odd):
    """Passes the same channels to one layer twice, in different orders."""

    def add_layers(self) -> None:
        self.head = nn.Linear(24 * 5, 5)

    def last(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c_norm(self.c(x)))
        return self.head(torch.cat([F.adaptive_avg_pool2d(x, 2).flatten(1), x.mean((2, 3))], 1))


@pytest.mark.parametrize(
    ("network", "pruned", "reason"),
    [
        (
            Tied,
            ["c"],
            [f"{layer}: {tied!r} shares parameters with another layer" for layer, tied in ("ab", "bb", ("twin",) * 2)],
        ),
        (Parametrised, ["c"], ["a: 'b' is parametrised", "b: 'b' is parametrised"]),
        (Prelu, ["a", "c"], "b: its channels pass through 'slope' (prelu), which is not supported"),
        (
            FlatAndPooled,
            ["a", "b"],
            "c: its channels pass through a split, slice, shuffle or concatenation that cannot be traced",
        ),
        (Conditional, ["a", "b", "c"], None),
        (Keywords, ["a", "b", "c"], None),
        (SqueezeExcitation, ["a", "b", "c"], None),
        (Difference, ["a", "c"], None),  # b loses the same channels as a
        (Kernel, ["a", "c"], "b: its channels pass through 'kernel' (parameter), which is not supported"),
        (Halves, ["a", "c"], "b: its channels pass through a slice, which is not supported"),
        (Chunks, ["a", "c"], "b: its channels pass through a split, which is not supported"),
        (Shuffled, ["a", "c"], "b: its channels pass through a reshape other than flattening"),
        (Twice, ["c"], "a: 'b' runs more than once in a forward pass"),
        (Grouped, ["a", "c"], "b: its channels pass through 'b_norm' (gn), which is not supported"),
        (Detached, ["c"], None),
    ],
)
def test_prunes_unusual_forward_passes_where_exact(
    network: type[Odd], pruned: list[str], reason: str | list[str] | None
) -> None:
    model = network()
    found, refusals = ChannelGraph(model, (3, 8, 8)).survey("scatter")
    assert [prunable.name for prunable in found] == pruned
    assert refusals == ([reason] if isinstance(reason, str) else reason or [])
    plan = select_channels(model, method="random", input_shape=(3, 8, 8))
    assert prune_exactly(model, plan)[1] < EXACT
    macs = count_macs(model, (3, 8, 8))
    plan = select_channels(model, method="l1", input_shape=(3, 8, 8), budget={"macs": 0.8})
    assert count_macs(prune_exactly(model, plan)[0], (3, 8, 8)) <= 0.8 * macs


def test_keeps_channels_around_a_layer_that_did_not_run() -> None:
    model = Branches()
    graph = ChannelGraph(model, (3, 8, 8))
    reason = "'other', which may read or write its channels, did not run on the example images"
    assert graph.survey("scatter")[1] == [f"a: {reason}", f"b: {reason}"]
    pruned = prune_exactly(model, select_channels(model, method="random", input_shape=(3, 8, 8)))[0]
    assert pruned(1e10 + torch.rand(2, 3, 8, 8)).shape == (2, 5)  # through the other layer
    assert count_parameters(pruned) < count_parameters(model)


class Sigmoid(Odd):
    def between(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Softmax(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class MeanOverChannels(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean(1, keepdim=True))


class Rolled(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


class Indexed(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x[:, torch.arange(15, -1, -1)]


class PixelShuffled(Odd):
    def add_layers(self) -> None:
        self.c = nn.Conv2d(4, 24, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Sigmoid, "removed exactly: the network without them differs by"),
        (Softmax, "removed exactly"),
        (MeanOverChannels, "removed exactly"),
        (Rolled, "removed exactly"),
        (Indexed, "removed: the pruned Indexed does not run"),
        (PixelShuffled, "removed: the pruned PixelShuffled does not run"),
    ],
)
def test_exactness_check_names_layers_that_tracing_misjudges(network: type[Odd], reason: str) -> None:
    model = network()
    with pytest.raises(UserError, match=f"channels of 'b' cannot be {reason}.*exclude"):
        prune(model, select_channels(model, method="random", input_shape=(3, 8, 8)))
    plan = select_channels(model, method="random", input_shape=(3, 8, 8), exclude=["b"])
    assert prune_exactly(model, plan)[1] < EXACT


def test_prunes_branches_beside_zero_padded_shortcuts() -> None:
    model = padded_resnet()
    randomise_batch_norms(model.eval())
    graph = ChannelGraph(model, (3, 16, 16))
    assert [p.name for p in graph.prunable("scatter")] == [f"{block}.conv{n}" for block in (3, 4, 5) for n in (1, 2)]
    assert [p.name for p in graph.prunable("coupled")] == ["3.conv1", "4.conv1", "5.conv1"]
    for rule in RESIDUAL_RULES:
        plan = select_channels(model, method="l1", residual=rule, input_shape=(3, 16, 16))
        assert prune_exactly(model, plan)[1] < EXACT


@pytest.mark.parametrize("settings", [{}, {"score": "published"}, {"batch_norm": "joint"}, {"batch_norm": "own"}])
def test_scores_and_prunes_linear_layers_at_each_pixel(settings: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = small_convnext().eval()
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 10) for _ in range(3)]
    scores = train_knockoffs(model, batches, epochs=1, **settings)
    layers = ["features.1.0.block.3", "features.1.1.block.3", "features.3.0.block.3", "features.3.1.block.3"]
    assert list(scores) == layers
    assert all(len(torch.unique(scores[layer])) > 1 for layer in layers)
    pruned = prune(model, select_channels(model, scores, prune_rate=0.5))
    assert pruned.get_submodule(layers[0]).out_features == 32
    assert pruned.get_submodule("features.1.0.block.5").in_features == 32


def test_linear_layer_scores_equal_those_of_a_1x1_convolution() -> None:
    class Either(nn.Module):
        def __init__(self, linear: bool) -> None:
            super().__init__()
            self.hidden = nn.Linear(3, 8) if linear else nn.Conv2d(3, 8, 1)
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.hidden, nn.Linear):
                x = self.hidden(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = self.hidden(x)
            return self.last(torch.relu(x)).mean((2, 3))

    torch.manual_seed(0)
    convolution, linear = Either(linear=False), Either(linear=True)
    state = convolution.state_dict()
    linear.load_state_dict(state | {"hidden.weight": state["hidden.weight"].flatten(1)})
    batches = [(torch.randn(16, 3, 4, 4), torch.arange(16) % 5)]
    scores = [
        train_knockoffs(model.eval(), batches, epochs=1, precision="fp32")["hidden"] for model in (convolution, linear)
    ]
    assert torch.allclose(scores[0], scores[1], rtol=1e-4)


NETWORKS = [
    ("resnet20", 32),
    ("tests.networks:padded_resnet", 32),
    *(
        (f"torchvision:{name}", 64)
        for name in (
            "alexnet",
            "vgg11_bn",
            "squeezenet1_1",
            "googlenet",
            "densenet121",
            "resnet18",
            "resnet50",
            "resnext50_32x4d",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mnasnet0_5",
            "shufflenet_v2_x0_5",
            "efficientnet_b0",
            "convnext_tiny",
        )
    ),
]


def untrained(name: str, size: int) -> tuple[nn.Module, ChannelGraph, tuple[int, int, int]]:
    torch.manual_seed(0)
    model, shape = make_model(name, num_classes=10).eval(), (3, size, size)
    return model, ChannelGraph(model, shape), shape


every_network = pytest.mark.parametrize(
    ("name", "size"), NETWORKS, ids=[name.rpartition(":")[2] for name, _ in NETWORKS]
)


@pytest.mark.slow
@every_network
def test_scores_and_prunes_every_network(name: str, size: int) -> None:
    model, graph, shape = untrained(name, size)
    scores = train_knockoffs(model, [(torch.randn(4, *shape), torch.arange(4)) for _ in range(2)], epochs=1)
    assert list(scores) == gated_layers(graph)
    assert all(score.isfinite().all() and score.unique().numel() > 1 for score in scores.values())
    plan = select_channels(model, scores, selection="global", budget={"macs": 0.7})
    assert 0.6 * count_macs(model, shape) < count_macs(prune(model, plan), shape) <= 0.7 * count_macs(model, shape)


@pytest.mark.slow
@every_network
def test_network_table_is_up_to_date(name: str, size: int) -> None:
    model, graph, shape = untrained(name, size)
    cells = [name.removeprefix("torchvision:").removeprefix("tests.networks:")]
    for rule in RESIDUAL_RULES:
        plan = select_channels(model, method="l1", residual=rule, input_shape=shape)
        pruned, difference = prune_exactly(model, plan)
        assert difference < EXACT
        left = count_parameters(pruned) / count_parameters(model)
        cells.append(f"{len(graph.prunable(rule))} ({1 - left:.0%})")
    refusals = graph.survey("coupled")[1]
    reasons = (re.sub(r"'[^']*' \(ln\)", "a layer norm", reason.partition(": ")[2]) for reason in refusals)
    cells.append("; ".join(dict.fromkeys(reasons)))
    row = f"| {' | '.join(cells)} |"
    text = TABLE.read_text()
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [line for line in text.splitlines() if line.startswith(f"| {cells[0]} |")]
        TABLE.write_text(text.replace(rows[0], row) if rows else f"{text.rstrip()}\n{row}\n")
        return
    assert row in text.splitlines()
