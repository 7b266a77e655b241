"""Knockoff sources and the diagnostic of knockoff quality."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scop import UserError, train_knockoffs
from scop.config import GaussianSection, KnockoffSection
from scop.data.batches import Batches
from scop.errors import Stopped
from scop.knockoffs.generator import train_generator
from scop.knockoffs.quality import measure_quality, swap_test
from scop.knockoffs.sources import Gaussian, make_source, shuffle
from scop.storage.checkpoints import Checkpoints
from scop.training.checkpointing import Checkpointing

CPU = torch.device("cpu")


def correlated(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 2x4x4 images with correlated pixels and non-zero means."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) / 4
    mean = torch.linspace(-1, 1, 32)
    images = (torch.randn(count, 32, generator=generator) @ mixing + mean).view(count, 2, 4, 4)
    labels = torch.zeros(count, dtype=torch.long)
    return list(zip(images.split(500), labels.split(500), strict=True))


def test_shuffle_permutes_the_images() -> None:
    images = torch.arange(32.0).view(32, 1, 1, 1)
    knockoffs = shuffle(images, torch.zeros(32))
    assert sorted(knockoffs.flatten().tolist()) == images.flatten().tolist()
    assert not torch.equal(knockoffs, images)


@pytest.mark.parametrize("distance", [1.0, 0.4])
@pytest.mark.parametrize("components", [32, 12])
def test_gaussian_knockoffs_have_the_moments_of_model_x_knockoffs(components: int, distance: float) -> None:
    """Same mean and covariance as the images; their cross-covariance is the covariance minus d times the variances."""
    torch.manual_seed(0)
    batches = correlated(20_000, 0)
    source = Gaussian.fit(batches, GaussianSection(components=components, distance=distance))
    assert source.basis.shape == (32, components)
    torch.testing.assert_close(source.basis.T @ source.basis, torch.eye(components), rtol=0, atol=1e-4)
    images = torch.cat([images for images, _ in correlated(20_000, 1)])
    knockoffs = source(images, torch.zeros(len(images)))
    assert knockoffs.shape == images.shape
    x, y = images.flatten(1), knockoffs.flatten(1)
    torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=0.06)
    scale = float(torch.cov(x.T).diagonal().mean())
    torch.testing.assert_close(torch.cov(y.T), torch.cov(x.T), rtol=0, atol=0.08 * scale)
    z, z_knock = x @ source.basis, y @ source.basis
    cross = torch.cov(torch.cat([z, z_knock], 1).T)[:components, components:]
    expected = (1 - distance) * torch.cov(z.T).diagonal().diag()
    torch.testing.assert_close(cross, expected, rtol=0, atol=0.1 * float(torch.cov(z.T).diagonal().max()))


def test_few_images_limit_the_number_of_components() -> None:
    source = Gaussian.fit(correlated(40, 0), GaussianSection())
    assert source.basis.shape == (32, 20)


def test_generator_draws_images_like_the_training_images(batches: Batches) -> None:
    section = KnockoffSection.model_validate(
        {"source": "generator", "generator": {"epochs": 8, "images": 600, "width": 16, "steps": 8}}
    )
    drawn = train_generator(batches, section, CPU)
    assert drawn.shape == (600, 1, 8, 8)
    real = torch.cat([images for images, _ in batches])
    assert drawn.mean().item() == pytest.approx(real.mean().item(), abs=0.1)
    assert drawn.std().item() == pytest.approx(real.std().item(), abs=0.15)
    torch.testing.assert_close(drawn.mean(0), real.mean(0), rtol=0, atol=0.4)
    # They are closer to real images than images whose pixels are drawn independently.
    each = real[torch.randint(len(real), (600, 64)), 0, torch.arange(64) // 8, torch.arange(64) % 8]
    near, far = (torch.cdist(images.flatten(1), real.flatten(1)).amin(1).mean() for images in (drawn, each))
    assert near < 0.85 * far


def test_generator_resumes_after_a_stop_with_identical_knockoffs(batches: Batches, tmp_path: Path) -> None:
    section = KnockoffSection.model_validate(
        {"source": "generator", "precision": "fp32", "generator": {"epochs": 2, "images": 8, "steps": 2, "width": 8}}
    )

    def drawn(path: Path, steps: int | None = None) -> Tensor:
        seen = 0

        def stopping() -> bool:
            nonlocal seen
            seen += 1
            return seen == steps

        batches.set_epoch(0)
        source = make_source(section, batches, CPU, Checkpointing(Checkpoints(str(path), "abc"), stopping))
        torch.manual_seed(0)
        return source(torch.zeros(20, 1, 8, 8), torch.zeros(20))

    whole = drawn(tmp_path / "whole")
    with pytest.raises(Stopped):
        drawn(tmp_path / "stopped", steps=30)
    assert torch.equal(drawn(tmp_path / "stopped"), whole)
    # The generator's checkpoints are separate from those of the gates, and are removed with them.
    checkpoints = Checkpoints(str(tmp_path / "stopped"), "abc")
    assert checkpoints.load() is None
    checkpoints.remove()
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("shape", [(3, 40, 28), (1, 5, 7), (3, 17, 16)])
def test_generator_accepts_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = torch.rand(16, *shape)
    section = KnockoffSection.model_validate({"generator": {"epochs": 1, "images": 3, "steps": 2, "width": 8}})
    drawn = train_generator([(images, torch.zeros(16))], section, CPU)
    assert drawn.shape == (3, *shape)
    assert torch.isfinite(drawn).all()


def noise(batches):
    """A user-defined factory."""
    assert len(next(iter(batches))) == 2
    return lambda images, labels: torch.randn_like(images)


def nothing(batches) -> None:
    return None


def test_imports_a_source_by_name(model, batches: Batches) -> None:
    named = train_knockoffs(model, batches, source="shuffle", epochs=1)
    own = train_knockoffs(model, batches, KnockoffSection(source="tests.knockoffs.test_sources:noise", epochs=1))
    assert own.keys() == named.keys()
    with pytest.raises(UserError, match="knockoff source 'shufle' is unknown"):
        make_source(KnockoffSection(source="shufle"), batches, CPU)
    with pytest.raises(UserError, match="cannot be imported"):
        make_source(KnockoffSection(source="tests.nowhere:noise"), batches, CPU)
    with pytest.raises(UserError, match="returned a NoneType; a factory takes the batches and returns a function"):
        make_source(KnockoffSection(source="tests.knockoffs.test_sources:nothing"), batches, CPU)


def pairs(valid: bool) -> tuple[Tensor, Tensor]:
    """Return coordinates with correlation 0.8 and copies: valid knockoffs, or independent of the originals."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    d = 0.3 * torch.eye(2)
    cross = sigma - d if valid else torch.zeros(2, 2)
    joint = torch.cat([torch.cat([sigma, cross], 1), torch.cat([cross.T, sigma], 1)])
    values = torch.randn(1000, 4, generator=generator) @ torch.linalg.cholesky(joint).T
    return values[:, :2], values[:, 2:]


def test_swap_test_separates_knockoffs_from_independent_copies() -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.tensor([True, False])
    both = torch.tensor([True, True])
    assert swap_test(*pairs(True), first, generator).p > 0.05
    # Swaps of all coordinates of independent copies go undetected, but not swaps of one of two correlated coordinates.
    assert swap_test(*pairs(False), both, generator).p > 0.05
    assert swap_test(*pairs(False), first, generator).p < 0.01


@pytest.mark.parametrize("seed", range(10))
def test_swap_test_accepts_identical_copies_despite_rounding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(300, 5, generator=generator)
    assert swap_test(same, same, torch.tensor([True, False, True, True, False]), generator).p == 1


def test_p_values_are_uniform_for_valid_knockoffs() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([True, False, True, False])
    ps = [swap_test(*torch.randn(2, 60, 4, generator=generator), half, generator).p for _ in range(100)]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.08)
    assert np.mean(ps) == pytest.approx(0.5, abs=0.1)


def test_quality_p_values_are_calibrated_for_perfect_knockoffs() -> None:
    """For shuffled independent images, p is small as often as it should be, and large as often."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    ps = []
    for seed in range(60):
        torch.manual_seed(seed)
        coarse = torch.randn(160, 1, 4, 4)
        images = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear") + 0.3 * torch.randn(160, 1, 8, 8)
        batches = [(part, torch.arange(len(part)) % 10) for part in images.split(80)]
        found = measure_quality(shuffle, model, batches, CPU, seed)
        ps.append((found.swap_all.p, found.swap_half.p))
    for of_swap in torch.tensor(ps).T:
        assert (of_swap <= 0.05).float().mean() < 0.15
        assert 0.3 < of_swap.median() < 0.7


def test_swap_test_is_calibrated_with_few_pairs() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    ps = []
    for seed in range(40):
        batches = [(torch.randn(20, 3, 8, 8), torch.arange(20) % 10)]
        ps.append(
            measure_quality(lambda images, labels: torch.randn_like(images), model, batches, CPU, seed).swap_all.p
        )
    assert (torch.tensor(ps) <= 0.05).float().mean() < 0.2


def quality(source, model: nn.Module, batches: Batches):
    torch.manual_seed(0)
    return measure_quality(source, model.eval(), batches, CPU)


def test_diagnostic_separates_good_knockoffs_from_bad_ones(model, batches: Batches) -> None:
    good = quality(shuffle, model, batches)
    assert good.swap_all.p > 0.05
    assert good.swap_half.p > 0.05
    assert good.swap_pixels.p < 0.01  # a pixel of another image does not match its neighbours
    assert good.label_p > 0.05
    assert good.correlation == pytest.approx(good.correlation_expected, rel=0.5)
    same = quality(lambda images, labels: images, model, batches)
    assert same.swap_pixels.p > 0.05
    assert same.correlation > 0.99
    assert same.label_agreement > 0.9
    assert same.label_p < 0.01
    grey = quality(lambda images, labels: torch.randn_like(images), model, batches)
    assert grey.swap_all.p < 0.01
    faint = quality(lambda images, labels: 0.7 * images[torch.randperm(len(images))], model, batches)
    assert faint.swap_all.p < 0.01


def test_quality_is_available_as_metrics_and_json(model, batches: Batches) -> None:
    measured = quality(shuffle, model, batches)
    # No image is in two pairs.
    assert 0.35 < measured.pairs / sum(len(labels) for _, labels in batches) <= 0.5
    assert measured.as_dict()["swap_half"]["p"] == measured.metrics()["knockoff_swap_half_p"]
