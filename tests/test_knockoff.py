import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scop
from scop import UserError, make_model, train_knockoffs
from scop.batches import Batches
from scop.config import DenseSection
from scop.graph import ChannelGraph
from scop.knockoff import Competition, Scores, folded_copy, gated_layers, shuffle
from scop.supervised import Supervised, make_optimizer
from scop.training import fit
from tests.helpers import randomise_batch_norms

CPU = torch.device("cpu")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_only_gates_train_within_bounds_and_the_dense_model_stays_bit_for_bit(model, batches: Batches) -> None:
    model.train()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    scores = train_knockoffs(model, batches, epochs=1, lr=0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    gates = torch.cat(list(scores.gates.values()))
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert not torch.equal(gates, torch.full_like(gates, 0.5))

    graph = ChannelGraph(model, (1, 8, 8))
    competition = Competition(model, graph, shuffle, CPU)
    trainable = [p for p in competition._streams.network.parameters() if p.requires_grad]
    assert trainable == []
    assert {p.shape for p in competition.gates.parameters()} == {(16,), (24,), (32,)}


def naive_loss(model: nn.Module, gates: dict[str, torch.Tensor], real, knockoff, labels) -> torch.Tensor:
    """The two streams as the paper draws them: side by side, mixed between convolution and batch norm."""
    model = copy.deepcopy(model).eval()
    features: dict[str, torch.Tensor] = {}
    mixing = False

    def hook(name: str):
        def meet(module, inputs, output):
            if not mixing:
                features[name] = output.clone()
                return output
            s = gates[name].view(1, -1, 1, 1)
            return s * output + (1 - s) * features[name]

        return meet

    for name in gates:
        model.get_submodule(name).register_forward_hook(hook(name))
    model(knockoff)
    mixing = True
    return F.cross_entropy(model(real), labels)


@pytest.mark.parametrize("name", ["plain", "resnet"])
def test_folding_and_the_written_out_gradient_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = make_model("tests.helpers:Plain") if name == "plain" else make_model("resnet20", in_channels=1)
    randomise_batch_norms(model.eval())
    graph = ChannelGraph(model, (1, 8, 8))
    real, fake, labels = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8), torch.arange(6)
    competition = Competition(model, graph, lambda images, _: fake, CPU, "fp32")
    gates = {layer: torch.rand(gate.shape).requires_grad_() for layer, gate in competition.named_gates()}
    with torch.no_grad():
        for layer, gate in competition.named_gates():
            gate.copy_(gates[layer])
    loss, _ = competition.loss(real, labels)
    loss.backward()
    expected = naive_loss(model, gates, real, fake, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for layer, gate in competition.named_gates():
        assert torch.allclose(gate.grad, gates[layer].grad, rtol=1e-3, atol=1e-5), layer


def test_the_score_is_gamma_times_the_gates_lead_over_its_knockoff() -> None:
    scores = Scores({"a": torch.tensor([1.0, 0.5, 0.0])}, {"a": torch.tensor([2.0, 3.0, 4.0])}, (3, 8, 8))
    assert scores["a"].tolist() == [2.0, 0.0, -4.0]


def test_gamma_is_that_of_the_batch_norm_behind_the_convolution(model, batches: Batches) -> None:
    scores = train_knockoffs(model, batches, epochs=1)
    assert torch.equal(scores.gammas["second"], model.second_norm.weight.detach().abs())


def test_planted_redundant_channels_are_found(model, batches: Batches) -> None:
    """Channels that nothing listens to win nothing over their knockoffs: SCOP drops them, chance would drop a third."""
    generator = torch.Generator().manual_seed(4)
    planted = {}
    for layer, reader in (("first", model.second), ("second", model.third), ("third", model.head)):
        channels = model.get_submodule(layer).out_channels
        planted[layer] = torch.randperm(channels, generator=generator)[: channels // 3].tolist()
        silent = torch.ones_like(reader.weight)
        silent[:, planted[layer]] = 0
        with torch.no_grad():
            reader.weight.mul_(silent)
        reader.weight.register_hook(silent.mul)
    # The others learn to do without them, so that it is a good network and not a broken one.
    section = DenseSection(epochs=6, batch_size=64, lr=0.05)
    optimizer = make_optimizer(model, section)
    fit(Supervised(model, CPU, section), batches, optimizer, epochs=6, label="planted", schedule="cosine")
    model.zero_grad()

    scores = train_knockoffs(model, batches, epochs=10, lr=0.02)
    plan = scop.select_channels(model, scores, prune_rate=1 / 3)
    for layer, channels in planted.items():
        found = len(set(channels) & set(plan.removed(layer))) / len(channels)
        assert found >= 0.8, layer


def test_seeds_reproduce_bit_for_bit(model, batches: Batches) -> None:
    def gates(seed: int) -> torch.Tensor:
        batches.set_epoch(0)
        return torch.cat(list(train_knockoffs(model, batches, epochs=1, seed=seed).gates.values()))

    assert torch.equal(gates(0), gates(0))
    assert not torch.equal(gates(0), gates(1))


def test_shuffled_knockoffs_are_the_same_images_in_another_order() -> None:
    images = torch.arange(32.0).view(32, 1, 1, 1)
    knockoffs = shuffle(images, torch.zeros(32))
    assert sorted(knockoffs.flatten().tolist()) == images.flatten().tolist()
    assert not torch.equal(knockoffs, images)


def noise(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(images)


def test_sources_are_pluggable_by_name(model, batches: Batches) -> None:
    scores = train_knockoffs(model, batches, epochs=1, source=noise)
    named = train_knockoffs(model, batches, scop.knockoff.KnockoffSection(source="tests.test_knockoff:noise", epochs=1))
    assert scores.keys() == named.keys()
    with pytest.raises(UserError, match="knockoff source 'shufle' is unknown"):
        train_knockoffs(model, batches, scop.knockoff.KnockoffSection(source="shufle"))
    with pytest.raises(UserError, match="cannot be imported"):
        train_knockoffs(model, batches, scop.knockoff.KnockoffSection(source="tests.nowhere:noise"))


def test_batches_that_cannot_be_trained_on_are_refused(model, batches: Batches) -> None:
    with pytest.raises(UserError, match="batches are empty"):
        train_knockoffs(model, [], epochs=1)
    with pytest.raises(UserError, match="start anew for each epoch, .* not a generator"):
        train_knockoffs(model, (batch for batch in batches), epochs=1)


def test_every_residual_rule_finds_scores() -> None:
    for name, shape in (("resnet20", (3, 16, 16)), ("torchvision:resnet18", (3, 32, 32))):
        graph = ChannelGraph(make_model(name), shape)
        gated = set(gated_layers(graph))
        for rule in ("scatter", "inner", "coupled"):
            assert all(gated.intersection(prunable.convs) for prunable in graph.prunable(rule))
    # On a CIFAR ResNet these are the paper's: neither stem nor shortcuts.
    assert not {"conv1", "layer2.0.downsample.0"} & set(gated_layers(ChannelGraph(make_model("resnet20"), (3, 16, 16))))


def test_scores_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    scores = Scores({"a.b": torch.rand(3)}, {"a.b": torch.rand(3)}, (3, 8, 9))
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(again["a.b"], scores["a.b"])
    assert again.input_shape == (3, 8, 9)


class Odd(nn.Module):
    """A batch norm that two convolutions share, a convolution nobody runs, and one with weights of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.unused = nn.Conv2d(3, 3, 1)
        self.c, self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.b(torch.relu(self.shared(self.a(x)))))
        return self.head(self.d(torch.relu(self.norm(self.c(torch.relu(x))))).mean((2, 3)))


def test_the_folded_copy_computes_what_the_network_does() -> None:
    torch.manual_seed(0)
    for model in (Odd(), make_model("resnet20", in_channels=1), make_model("tests.helpers:Plain")):
        randomise_batch_norms(model.eval())
        folded = folded_copy(model, ChannelGraph(model, (1, 8, 8)), torch.float32)
        images = torch.randn(4, 1, 8, 8)
        assert torch.allclose(folded(images), model(images), rtol=1e-3, atol=1e-3)


class Mixer(nn.Module):
    """Adds a branch behind its activation: only the whole stream can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + torch.relu(self.norm(self.branch(x)))).mean((2, 3)))


def test_a_network_that_only_coupled_can_prune_is_scored_all_the_same(batches: Batches) -> None:
    model = Mixer()
    scores = train_knockoffs(model, batches, epochs=1)
    assert set(scores) == {"stem", "branch"}
    assert len(scop.select_channels(model, scores, residual="coupled", prune_rate=0.5).kept["stem"]) == 4
    with pytest.raises(UserError, match="no branch is simply added"):
        scop.select_channels(model, scores, residual="scatter")
