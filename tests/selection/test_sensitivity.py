"""Sensitivity: the accuracy with one layer pruned."""

import pytest
import torch

import scop
from scop import make_model, train_knockoffs
from scop.data.batches import Batches
from scop.models.evaluation import measure_accuracy
from scop.selection.sensitivity import measure_sensitivity
from tests.helpers import randomise_batch_norms

CPU = torch.device("cpu")


def test_sensitivity_is_the_accuracy_with_one_layer_pruned(model, batches: Batches) -> None:
    scores = train_knockoffs(model, batches, epochs=1)
    images = list(batches)
    found = measure_sensitivity(model, scores, [0.0, 0.5, 0.75], images, CPU, (1, 8, 8))
    dense = measure_accuracy(model, images, CPU).top1
    for layer in scores:
        pruned = scop.prune(model, scop.select_channels(model, scores, prune_rate=0.5, include=[layer]))
        assert found[layer][0] == pytest.approx(dense, abs=0.01)
        assert found[layer][1] == pytest.approx(measure_accuracy(pruned, images, CPU).top1, abs=0.01)
        assert found[layer][2] <= found[layer][0]
    assert min(top1 for _, _, top1 in found.values()) < dense - 0.05


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        ("tests.networks:small_convnext", (3, 32, 32)),
        ("tests.networks:small_densenet", (3, 16, 16)),
        ("tests.networks:GroupsAndBias", (3, 16, 16)),
    ],
)
def test_sensitivity_matches_surgery(make: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # In bf16, if the CPU supports it, masked and pruned differ by rounding, which is large for random networks.
    monkeypatch.setattr("scop.selection.sensitivity.autocast_dtype", lambda *_: torch.float32)
    torch.manual_seed(0)
    model = make_model(make)
    randomise_batch_norms(model.eval())
    images = torch.randn(64, *shape)
    with torch.no_grad():
        batches = [(images, model(images).argmax(1))]
    scores = train_knockoffs(model, batches, epochs=1)
    found = measure_sensitivity(model, scores, [0.5], batches, CPU, shape)
    assert found
    for layer, (top1,) in found.items():
        plan = scop.select_channels(model, scores, prune_rate=0.5, include=[layer], residual="coupled")
        assert top1 == pytest.approx(measure_accuracy(scop.prune(model, plan).eval(), batches, CPU).top1, abs=0.02), (
            layer
        )
