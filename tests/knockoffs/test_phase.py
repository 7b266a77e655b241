"""The knockoff phase: it finds redundant channels, reproducibly, and leaves the dense model unchanged."""

import pytest
import torch
from torch import nn

import scop
from scop import UserError, make_model, train_knockoffs
from scop.config import DenseSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, Split
from scop.knockoffs.phase import Competition, gated_layers
from scop.knockoffs.sources import shuffle
from scop.models.history import EpochRecord
from scop.pruning.graph import ChannelGraph
from scop.selection.strategy import knockoff_threshold
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer

CPU = torch.device("cpu")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_trains_only_the_gates_and_keeps_them_in_bounds(model, batches: Batches) -> None:
    model.train()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    scores = train_knockoffs(model, batches, score="published", epochs=1, lr=0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    gates = torch.cat(list(scores.gate.values()))
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert not torch.equal(gates, torch.full_like(gates, 0.5))

    graph = ChannelGraph(model, (1, 8, 8))
    competition = Competition(model, graph, shuffle, CPU)
    trainable = [p for p in competition._streams.network.parameters() if p.requires_grad]
    assert trainable == []
    assert {p.shape for p in competition.gates.parameters()} == {(16,), (24,), (32,)}


@pytest.mark.parametrize("batch_norm", ["own", "joint"])
@pytest.mark.parametrize("score", ["fisher", "published"])
def test_every_batch_norm_mode_leaves_the_dense_model_unchanged(score, batch_norm, model, batches: Batches) -> None:
    before = state(model)
    scores = train_knockoffs(model, batches, epochs=1, score=score, batch_norm=batch_norm)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    frozen = train_knockoffs(model, batches, epochs=1, score=score)
    assert not torch.allclose(scores["second"], frozen["second"], rtol=0.01)


def silence(model: nn.Module, planted: dict[str, list[int]]) -> None:
    """Make the next layers ignore some channels of the three convolutions, in training too."""
    for layer, reader in (("first", model.second), ("second", model.third), ("third", model.head)):
        silent = torch.ones_like(reader.weight)
        silent[:, planted.get(layer, [])] = 0
        with torch.no_grad():
            reader.weight.mul_(silent)
        reader.weight.register_hook(silent.mul)


def test_dead_channel_scores_zero_and_duplicate_scores_half(model, batches: Batches) -> None:
    with torch.no_grad():
        model.second.weight[:, 5] = 0
    alone = train_knockoffs(model, batches, epochs=1, precision="fp32")["first"]
    with torch.no_grad():
        # Channel 5 becomes a copy of 2, and each is read with half the weight: the function is unchanged.
        for tensor in (model.first.weight, model.first.bias, model.first_norm.weight, model.first_norm.bias):
            tensor[5] = tensor[2]
        for tensor in (model.first_norm.running_mean, model.first_norm.running_var):
            tensor[5] = tensor[2]
        model.second.weight[:, 2] /= 2
        model.second.weight[:, 5] = model.second.weight[:, 2]
    batches.set_epoch(0)
    twice = train_knockoffs(model, batches, epochs=1, precision="fp32")["first"]
    assert alone[5] == 0
    assert twice[2] == pytest.approx(alone[2].item() / 2, rel=0.1)
    assert twice[5] == pytest.approx(twice[2].item(), rel=1e-3)


def test_false_discovery_rate_on_simulated_data_is_near_the_target() -> None:
    """60 of 100 independent features carry no information about the label, but the network reads them.

    The features are independent, so those of another example are Model-X knockoffs.
    """
    generator = torch.Generator().manual_seed(1)
    null = torch.arange(100) >= 40
    effects = torch.where(null, 0.0, 0.4) * torch.randn(100, generator=generator).sign()
    mixed, head = nn.Conv2d(100, 100, 1), nn.Linear(100, 2)
    network = nn.Sequential(mixed, nn.Flatten(), head).eval()
    proportions: dict[float, list[float]] = {0.1: [], 0.2: []}
    for seed in range(16):
        images = torch.randn(4096, 100, 1, 1, generator=generator)
        labels = torch.rand(4096, generator=generator) < torch.sigmoid(images.flatten(1) @ effects)
        with torch.no_grad():
            mixed.weight.copy_(torch.eye(100)[:, :, None, None])
            mixed.bias.zero_()
            head.weight.zero_()
            head.weight[1] = effects + 0.1 * torch.randn(100, generator=generator)  # as if learned from few examples
        data = list(zip(images.split(256), labels.long().split(256), strict=True))
        w = train_knockoffs(network, data, epochs=1, seed=seed).signed["0"]
        for q, found in proportions.items():
            kept = w >= knockoff_threshold(w, q)
            found.append(float((kept & null).sum() / kept.sum().clamp_min(1)))
            assert int((kept & ~null).sum()) >= 34
    for q, found in proportions.items():
        assert 0.5 * q < sum(found) / len(found) < 1.3 * q


class NoiseFed(nn.Module):
    """Half of the first layer's channels see the image; the others see a second image of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 32, 3, padding=1, groups=2), nn.BatchNorm2d(32)
        self.second, self.second_norm = nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second_norm(self.second(x))).mean((2, 3)))


def test_finds_channels_that_read_noise(batches: Batches) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def with_noise() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (torch.cat([images, torch.randn(images.shape, generator=generator)], 1), labels)
            for _ in range(4)
            for images, labels in batches
        ]

    model = NoiseFed()
    section = DenseSection(epochs=4, batch_size=64, lr=0.1)
    fit(Supervised(model, CPU, section), with_noise(), make_optimizer(model, section), Schedule(4), label="noise-fed")
    # Fresh noise: the network has partly memorised the training noise, which therefore predicts labels a little.
    scores = train_knockoffs(model.eval(), with_noise(), epochs=1)
    seen, fed_noise = scores["first"][:16], scores["first"][16:]
    assert fed_noise.max() < seen.median()
    # Real features clearly beat their knockoffs; noise does not.
    assert (scores.signed["first"][:16] > 3).sum() >= 12
    assert (scores.signed["first"][16:] > 3).sum() == 0
    # The knockoff filter keeps noise channels within its rate, and keeps most channels that see the image.
    kept = []
    for _ in range(4):
        w = train_knockoffs(model, with_noise(), epochs=1).signed["first"]
        kept.append(w >= knockoff_threshold(w, 0.2))
    false = [float(own[16:].sum() / own.sum().clamp_min(1)) for own in kept]
    assert sum(false) / len(false) <= 0.2
    assert min(int(own[:16].sum()) for own in kept) >= 12


def recall(planted: list[int], removed: list[int]) -> float:
    return len(set(planted) & set(removed)) / len(planted)


@pytest.mark.parametrize(("score", "epochs"), [("fisher", 1), ("published", 10)])
def test_finds_planted_redundant_channels(score: str, epochs: int, model, batches: Batches) -> None:
    """Unread channels gain nothing over their knockoffs: SCOP removes them; chance would remove a third."""
    generator = torch.Generator().manual_seed(4)
    planted = {}
    for layer in ("first", "second", "third"):
        channels = model.get_submodule(layer).out_channels
        planted[layer] = torch.randperm(channels, generator=generator)[: channels // 3].tolist()
    silence(model, planted)
    # The other channels learn to compensate, so that the network is accurate again.
    section = DenseSection(epochs=6, batch_size=64, lr=0.05)
    optimizer = make_optimizer(model, section)
    fit(Supervised(model, CPU, section), batches, optimizer, Schedule(6, "cosine"), label="planted")
    model.zero_grad()

    scores = train_knockoffs(model, batches, score=score, epochs=epochs, lr=0.02)
    plan = scop.select_channels(model, scores, prune_rate=1 / 3)
    for layer, channels in planted.items():
        assert recall(channels, plan.removed(layer)) >= 0.8, layer
        # The filters of these channels look like any other's; only their use gives them away.
        by_norm = scop.select_channels(model, method="l1", prune_rate=1 / 3, input_shape=(1, 8, 8))
        assert recall(channels, by_norm.removed(layer)) < 0.7, layer


def test_same_seed_reproduces_bit_for_bit(model, batches: Batches) -> None:
    def gates(seed: int) -> torch.Tensor:
        batches.set_epoch(0)
        return torch.cat(list(train_knockoffs(model, batches, epochs=1, seed=seed).values()))

    assert torch.equal(gates(0), gates(0))
    assert not torch.equal(gates(0), gates(1))


def test_rejects_empty_and_one_pass_batches(model, batches: Batches) -> None:
    with pytest.raises(UserError, match="batches are empty"):
        train_knockoffs(model, [], epochs=1)
    with pytest.raises(UserError, match="support repeated iteration, .* a generator does not"):
        train_knockoffs(model, (batch for batch in batches), epochs=1)


def test_rejects_images_that_are_their_own_knockoffs(model, batches: Batches) -> None:
    images, labels = next(iter(batches))
    single = [(images[index : index + 1], labels[index : index + 1]) for index in range(4)]
    with pytest.raises(UserError, match="all scores are 0: .* several images"):
        train_knockoffs(model, single, epochs=1)


def test_scores_cover_every_residual_rule() -> None:
    for name, shape in (("resnet20", (3, 16, 16)), ("torchvision:resnet18", (3, 32, 32))):
        graph = ChannelGraph(make_model(name), shape)
        gated = set(gated_layers(graph))
        for rule in ("scatter", "inner", "coupled"):
            assert all(gated.intersection(prunable.convs) for prunable in graph.prunable(rule))
    # On a CIFAR ResNet, as in the paper, the stem and the shortcuts have no gates.
    assert not {"conv1", "layer2.0.downsample.0"} & set(gated_layers(ChannelGraph(make_model("resnet20"), (3, 16, 16))))


class Mixer(nn.Module):
    """Adds a branch after its activation: only the whole stream can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + torch.relu(self.norm(self.branch(x)))).mean((2, 3)))


def test_scores_a_network_that_only_coupled_can_prune(batches: Batches) -> None:
    model = Mixer()
    scores = train_knockoffs(model, batches, epochs=1)
    assert set(scores) == {"stem", "branch"}
    assert len(scop.select_channels(model, scores, residual="coupled", prune_rate=0.5).kept["stem"]) == 4
    with pytest.raises(UserError, match="to which no branch is added directly"):
        scop.select_channels(model, scores, residual="scatter")


def test_scoring_uses_at_least_10240_images(digits: Dataset, model: nn.Module) -> None:
    few = Split(digits["train"].images[:100], digits["train"].labels[:100])
    batches = Batches(few, digits.info, 50, CPU, Augmentation())
    seen: list[EpochRecord] = []
    train_knockoffs(model, batches, on_epoch=seen.append)
    assert len(seen) == 10_240 // 100 + 1  # whole passes
    many = [*Batches(digits["train"], digits.info, 1024, CPU, Augmentation())] * 20
    shown = []

    def source(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shown.append(len(images))
        return shuffle(images, labels)

    assert len(train_knockoffs(model, many, source=source).history) == 1
    assert sum(shown) == 10_240


def test_published_score_trains_for_20_epochs_by_default(batches: Batches, model: nn.Module) -> None:
    short = [next(iter(batches))]
    assert len(train_knockoffs(model, short, score="published").history) == 20
