"""Distillation: losses, attention maps, stages and the teacher."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scop
from scop import UserError, make_model, prune, select_channels
from scop.config import DistillationSection, FinetuneSection
from scop.data.batches import Batches
from scop.data.dataset import Dataset
from scop.models.history import EpochRecord
from scop.training.distillation import Distillation, attention, find_stages
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer
from tests.networks import small_convnext

CPU = torch.device("cpu")


def test_label_smoothing_and_distillation_follow_their_formulas(batches: Batches, model: nn.Module) -> None:
    images, labels = next(iter(batches))
    student, teacher = copy.deepcopy(model).eval(), make_model("tests.networks:Plain").eval()
    logits, target = student(images), teacher(images)
    section = FinetuneSection(label_smoothing=0.1, precision="fp32")
    objective = Supervised(student, CPU, section, teacher, DistillationSection(weight=0.25, temperature=2))
    loss = objective.loss(images, labels)[0].detach()

    hard = torch.full_like(logits, 0.1 / 10).scatter(1, labels[:, None], 0.9 + 0.1 / 10)
    cross_entropy = -(hard * logits.log_softmax(1)).sum(1).mean()
    soft, log_soft = (target / 2).softmax(1), (target / 2).log_softmax(1)
    divergence = (soft * (log_soft - (logits / 2).log_softmax(1))).sum(1).mean()
    assert float(loss) == pytest.approx((0.75 * cross_entropy + 0.25 * 4 * divergence).item(), rel=1e-4)


def test_mirroring_teacher_averages_the_logits_of_both_views(batches: Batches, model: nn.Module) -> None:
    images, labels = next(iter(batches))
    student, teacher = copy.deepcopy(model).eval(), make_model("tests.networks:Plain").eval()
    section = FinetuneSection(flip=True, precision="fp32", distillation=DistillationSection(weight=1, mirror=True))
    objective = Supervised(student, CPU, section, teacher, section.distillation)
    loss = objective.loss(images, labels)[0].detach()

    mirrored = torch.from_numpy(images.numpy()[..., ::-1].copy())
    soft = ((teacher(images) + teacher(mirrored)) / 2 / 4).softmax(1)
    divergence = (soft * (soft.log() - (student(images) / 4).log_softmax(1))).sum(1).mean()
    assert float(loss) == pytest.approx(16 * divergence.item(), rel=1e-4)
    assert not torch.allclose(teacher(images), teacher(mirrored), atol=1e-3)


def test_attention_loss_compares_stages_of_different_widths(batches: Batches, model: nn.Module) -> None:
    images, labels = next(iter(batches))
    teacher = copy.deepcopy(model).eval()
    plan = scop.select_channels(model, method="l1", prune_rate=0.5, input_shape=(1, 8, 8))
    student = scop.prune(model, plan).eval()
    section = FinetuneSection(precision="fp32")
    objective = Supervised(student, CPU, section, teacher, DistillationSection(attention=3.0))
    loss = objective.loss(images, labels)[0]

    # The activation works in place, so these maps become those after it.
    seen: dict[str, list[torch.Tensor]] = {"first_norm": [], "second_norm": [], "third_norm": []}
    for network in (student, teacher):
        for name, kept in seen.items():
            network.get_submodule(name).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
    logits = student(images)
    teacher(images)
    distances = []
    for own, target in seen.values():
        maps = [(part**2).mean(1).flatten(1) for part in (own, target)]
        first, second = (part / part.norm(dim=1, keepdim=True) for part in maps)
        distances.append(((first - second) ** 2).sum(1).mean())
    expected = F.cross_entropy(logits, labels) + 3 * sum(distances) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert student.first.weight.grad.abs().sum() > 0
    objective.finish()
    assert sum(len(module._forward_hooks) for module in student.modules()) == len(seen)  # only the hooks of this test


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_attention_gradient_matches_its_formula(memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    own = torch.randn(2, 5, 4, 3).to(memory_format=memory).requires_grad_()
    target = torch.randn(2, 7, 4, 3)
    maps = [F.normalize(part.square().sum(1).flatten(1)) for part in (own, target)]
    (expected,) = torch.autograd.grad((maps[0] - maps[1]).square().sum(1).mean(), own)
    (gradient,) = torch.autograd.grad(attention(own, target), own)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.stride() == own.stride()


def test_folds_a_copy_of_the_teacher_if_it_can_be_traced(model: nn.Module) -> None:
    images = torch.randn(4, 1, 8, 8)
    teacher = copy.deepcopy(model).eval()
    before = copy.deepcopy(teacher.state_dict())
    expected = teacher(images)
    distillation = Distillation(teacher, model, DistillationSection(), torch.float32, images)
    batch_norms = [m for m in distillation.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not batch_norms
    assert torch.allclose(distillation.teacher(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())

    class Untraceable(nn.Module):  # rejects the batches that tracing uses
        def __init__(self) -> None:
            super().__init__()
            self.network = teacher

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) != len(images):
                raise ValueError("another batch")
            return self.network(x)

    untraceable = Distillation(Untraceable(), model, DistillationSection(), torch.float32, images)
    assert torch.equal(untraceable.teacher(images)[0], expected)


def test_stages_end_where_the_resolution_changes() -> None:
    model = make_model("resnet20")
    for size in ((32, 32), (33, 32), (60, 45), (28, 100), (135, 240)):
        assert find_stages(model, model, torch.zeros(2, 3, *size)) == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(
    ("network", "stages"),
    [
        ("resnet50", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features"]),
    ],
)
def test_stages_do_not_end_in_the_middle_of_a_block(network: str, stages: list[str]) -> None:
    model = make_model(f"torchvision:{network}", num_classes=10)
    assert find_stages(model, model, torch.zeros(2, 3, 64, 64)) == stages


def test_stages_exclude_maps_that_cannot_be_compared() -> None:
    """Maps with channels as the last dimension, which pruning may change, and branches not yet scattered."""
    dense = small_convnext().eval()
    for module in dense.modules():
        if hasattr(module, "layer_scale"):
            nn.init.ones_(module.layer_scale)  # at 1e-6, the blocks would not affect the maps
    shape = (3, 64, 64)
    pruned = prune(dense, select_channels(dense, method="l1", prune_rate=0.5, input_shape=shape))
    images = torch.randn(2, *shape)
    stages = find_stages(dense, pruned, images)
    assert stages[-1] == "features"
    assert not [stage for stage in stages if ".block." in stage]
    section = FinetuneSection.model_validate({"distillation": {"attention": 100.0}, "precision": "fp32"})
    objective = Supervised(pruned, CPU, section, dense.requires_grad_(False), section.distillation)
    objective.start_epoch(0)
    loss, _ = objective.loss(images, torch.arange(2))
    section = section.model_copy(update={"distillation": DistillationSection()})
    without, _ = Supervised(pruned, CPU, section).loss(images, torch.arange(2))
    assert math.isfinite(loss.item())
    assert loss.item() > without.item() + 1e-3
    objective.finish()

    flat = make_model("resnet20")
    modes = [module.training for module in flat.modules()]
    narrow = prune(flat, select_channels(flat, method="l1", prune_rate=0.5, input_shape=(3, 32, 32)))
    narrow.train()
    before = narrow.bn1.running_mean.clone()
    assert find_stages(flat, narrow, torch.randn(2, 3, 32, 32)) == ["layer1", "layer2", "layer3"]
    assert [module.training for module in flat.modules()] == modes
    assert narrow.training
    assert torch.equal(narrow.bn1.running_mean, before)


def test_attention_ends_after_the_first_part_of_the_epochs(digits: Dataset, model: nn.Module) -> None:
    plan = scop.select_channels(model, method="l1", prune_rate=0.5, input_shape=(1, 8, 8))
    student, teacher = scop.prune(model, plan), copy.deepcopy(model).eval().requires_grad_(False)
    section = FinetuneSection.model_validate(
        {"epochs": 5, "lr": 0.01, "precision": "fp32", "distillation": {"attention": 10.0, "attention_until": 0.4}}
    )
    objective = Supervised(student, CPU, section, teacher, section.distillation)
    batches = Batches(digits["train"], digits.info, 64, CPU, seed=0)
    images, labels = next(iter(batches))
    attended: list[bool] = []

    def record_attention(record: EpochRecord) -> None:
        loss, logits = objective.loss(images, labels)
        attended.append(loss.item() - F.cross_entropy(logits, labels).item() > 1e-3)

    fit(objective, batches, make_optimizer(student, section), Schedule(5), label="attention", on_epoch=record_attention)
    assert attended == [True, True, False, False, False]


def test_rejects_attention_without_feature_maps(digits: Dataset) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    section = FinetuneSection.model_validate({"distillation": {"attention": 1.0}})
    objective = Supervised(flat, CPU, section, copy.deepcopy(flat).eval(), section.distillation)
    batches = Batches(digits["train"], digits.info, 64, CPU)
    with pytest.raises(UserError, match=r"distillation\.attention: .* set it to 0"):
        fit(objective, batches, make_optimizer(flat, section), Schedule(1), label="flat")


def test_compiled_training_matches_eager_training(digits: Dataset, model: nn.Module) -> None:
    """Includes attention, whose hooks run inside the compiled network."""
    import shutil

    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    plan = scop.select_channels(model, method="l1", prune_rate=0.5, input_shape=(1, 8, 8))
    losses = []
    for attention_weight, flag in ((0.0, False), (3.0, False), (3.0, True)):
        distillation = DistillationSection(weight=0.5, attention=attention_weight)
        student, teacher = scop.prune(model, plan), copy.deepcopy(model).eval().requires_grad_(False)
        section = FinetuneSection(compile=flag, precision="fp32", lr=0.05)
        objective = Supervised(student, CPU, section, teacher, distillation)
        batches = Batches(digits["train"], digits.info, 64, CPU, seed=0)
        (record,) = fit(objective, batches, make_optimizer(student, section), Schedule(1), label="compiled")
        losses.append(record.loss)
    without_attention, eager, compiled = losses
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert compiled > 1.05 * without_attention
