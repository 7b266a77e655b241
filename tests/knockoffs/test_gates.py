"""Gates: scores and standard errors against their formulas."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scop import make_model, train_knockoffs
from scop.data.batches import Batches
from scop.knockoffs.phase import Competition
from scop.knockoffs.sources import shuffle
from scop.pruning.graph import ChannelGraph
from scop.selection.scores import Scores
from tests.helpers import randomise_batch_norms

CPU = torch.device("cpu")


def naive_loss(model: nn.Module, gates: dict[str, torch.Tensor], real, knockoff, labels) -> torch.Tensor:
    """Compute the loss as the paper draws it: two streams side by side, mixed between convolution and batch norm."""
    model = copy.deepcopy(model).eval()
    features: dict[str, torch.Tensor] = {}
    mixing = False

    def hook(name: str):
        def mix(module, inputs, output):
            if not mixing:
                features[name] = output.clone()
                return output
            s = gates[name].view(1, -1, 1, 1)
            return s * output + (1 - s) * features[name]

        return mix

    for name in gates:
        model.get_submodule(name).register_forward_hook(hook(name))
    model(knockoff)
    mixing = True
    return F.cross_entropy(model(real), labels)


@pytest.mark.parametrize("name", ["plain", "resnet"])
def test_loss_and_gradients_match_the_naive_implementation(name: str) -> None:
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain") if name == "plain" else make_model("resnet20", in_channels=1)
    randomise_batch_norms(model.eval())
    graph = ChannelGraph(model, (1, 8, 8))
    real, fake, labels = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8), torch.arange(6)
    competition = Competition(model, graph, lambda images, _: fake, CPU, score="published", precision="fp32")
    gates = {layer: torch.rand(gate.shape).requires_grad_() for layer, gate in competition.gates.named()}
    with torch.no_grad():
        for layer, gate in competition.gates.named():
            gate.copy_(gates[layer])
    loss, _ = competition.loss(real, labels)
    loss.backward()
    expected = naive_loss(model, gates, real, fake, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for layer, gate in competition.gates.named():
        assert torch.allclose(gate.grad, gates[layer].grad, rtol=1e-3, atol=1e-5), layer


@pytest.mark.parametrize("mode", ["frozen", "own", "joint"])
def test_batch_norms_normalise_according_to_the_mode(mode: str) -> None:
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain")
    randomise_batch_norms(model.eval())
    real, fake, labels = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8), torch.arange(6)
    graph = ChannelGraph(model, (1, 8, 8))
    settings = {"score": "published", "batch_norm": mode, "precision": "fp32"}
    competition = Competition(model, graph, lambda images, _: fake, CPU, **settings)
    for _, gate in competition.gates.named():
        torch.nn.init.ones_(gate)
    _, logits = competition.loss(real, labels)
    plain = copy.deepcopy(model).train(mode != "frozen")
    expected = plain(torch.cat([real, fake]))[:6] if mode == "joint" else plain(real)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_fisher_score_is_the_rms_of_per_example_derivatives() -> None:
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain")
    randomise_batch_norms(model.eval())
    graph = ChannelGraph(model, (1, 8, 8))
    real, fake, labels = torch.randn(12, 1, 8, 8), torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    competition = Competition(model, graph, shuffle, CPU, mixing=0.7, precision="fp32")
    for part in (slice(0, 6), slice(6, 12)):  # in two steps, as in training
        competition.source = lambda images, _, part=part: fake[part]
        loss, _ = competition.loss(real[part], labels[part])
        loss.backward()
        competition.after_step()
    at_mixing, at_half = range(0, 12, 2), range(1, 12, 2)

    def derivatives(mixing: float, examples: range) -> dict[str, torch.Tensor]:
        """Return the derivatives for each example, by plain autograd: (examples, channels) per layer."""
        gates = {layer: torch.full(gate.shape, mixing).requires_grad_() for layer, gate in competition.gates.named()}
        each = []
        for i in examples:
            one = slice(i, i + 1)
            loss = naive_loss(model, gates, real[one], fake[one], labels[one])
            each.append(torch.autograd.grad(loss, [*gates.values()]))
        return {layer: torch.stack(g) for layer, g in zip(gates, zip(*each, strict=True), strict=True)}

    score, error, signed = competition.gates.scores()
    for layer, g in derivatives(0.7, at_mixing).items():
        root = g.square().mean(0).sqrt()
        of_root = g.square().std(0, correction=0) / 6**0.5 / (2 * root)
        assert torch.allclose(score[layer], root, rtol=1e-3, atol=1e-5), layer
        assert torch.allclose(error[layer], of_root.nan_to_num(0), rtol=1e-2, atol=1e-5), layer  # 0 for a dead channel
    for layer, g in derivatives(0.5, at_half).items():
        t = (-g.mean(0) / (g.std(0, correction=0) / 6**0.5)).nan_to_num(0)  # 0 for a dead channel
        assert torch.allclose(signed[layer], t, rtol=1e-2, atol=1e-3), layer


def test_published_score_is_gamma_times_the_gate_difference(model, batches: Batches, tmp_path: Path) -> None:
    scores = train_knockoffs(model, batches, score="published", epochs=2)
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(Scores.load(tmp_path / "scores.safetensors").signed["second"], scores["second"])
    gamma = model.second_norm.weight.detach().abs()
    assert torch.allclose(scores["second"], gamma * (2 * scores.gate["second"] - 1))
    assert torch.equal(scores.signed["second"], scores["second"])
    assert torch.isnan(scores.error["second"]).all()  # one late epoch has no standard deviation
    late = train_knockoffs(model, batches, score="published", epochs=4).error["second"]
    assert 0 < late.max() < 0.2


def test_standard_errors_match_the_spread_between_seeds(model, batches: Batches) -> None:
    """The standard errors of one pass match the spread over seven seeds, within the accuracy that seven allow."""
    runs = [train_knockoffs(model, batches, epochs=1, seed=seed, precision="fp32") for seed in range(7)]
    for layer in runs[0]:
        between = torch.stack([run[layer] for run in runs]).std(0).median()
        within = torch.stack([run.error[layer] for run in runs]).mean(0).median()
        assert 0.3 < between / within < 2, layer


def test_repeated_images_do_not_reduce_standard_errors(model, batches: Batches) -> None:
    once = train_knockoffs(model, batches, epochs=1, precision="fp32")
    often = train_knockoffs(model, batches, epochs=8, precision="fp32")
    for layer in once:
        assert often.error[layer].median() > 0.6 * once.error[layer].median(), layer


def test_only_frozen_batch_norms_mix_gate_values_within_a_batch(model) -> None:
    graph = ChannelGraph(model, (1, 8, 8))
    for batch_norm, counts in (("own", [1, 1, 1, 1]), ("joint", [1, 1, 1, 1]), ("frozen", [2, 2, 2, 2])):
        competition = Competition(model, graph, shuffle, CPU, batch_norm=batch_norm, precision="fp32")
        distinct: list[int] = []
        gates = competition.gates
        for _ in range(4):
            gate = gates.opened("first", 6)
            distinct.append(len(torch.unique(gate.detach()[:, 0])))
            loss, _ = competition.loss(torch.randn(6, 1, 8, 8), torch.arange(6))
            loss.backward()
            competition.after_step()
        assert distinct == counts
        assert gates.examples.tolist() == [12, 12]  # the same number for scores and for W
