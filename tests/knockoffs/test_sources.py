"""Sources of knockoffs have the moments that they claim, and the diagnostic tells good ones from bad ones."""

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
    """Batches of 2x4x4 images whose pixels are correlated, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) / 4
    mean = torch.linspace(-1, 1, 32)
    images = (torch.randn(count, 32, generator=generator) @ mixing + mean).view(count, 2, 4, 4)
    labels = torch.zeros(count, dtype=torch.long)
    return list(zip(images.split(500), labels.split(500), strict=True))


def test_shuffled_knockoffs_are_the_same_images_in_another_order() -> None:
    images = torch.arange(32.0).view(32, 1, 1, 1)
    knockoffs = shuffle(images, torch.zeros(32))
    assert sorted(knockoffs.flatten().tolist()) == images.flatten().tolist()
    assert not torch.equal(knockoffs, images)


@pytest.mark.parametrize("distance", [1.0, 0.4])
@pytest.mark.parametrize("components", [32, 12])
def test_gaussian_knockoffs_have_the_moments_of_model_x_knockoffs(components: int, distance: float) -> None:
    """Mean and covariance of the images; covariance with them that of the images less d times each variance."""
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


def test_few_images_carry_few_components() -> None:
    source = Gaussian.fit(correlated(40, 0), GaussianSection())
    assert source.basis.shape == (32, 20)


def test_a_generator_draws_images_like_those_that_it_saw(batches: Batches) -> None:
    section = KnockoffSection.model_validate(
        {"source": "generator", "generator": {"epochs": 8, "images": 600, "width": 16, "steps": 8}}
    )
    drawn = train_generator(batches, section, CPU)
    assert drawn.shape == (600, 1, 8, 8)
    real = torch.cat([images for images, _ in batches])
    assert drawn.mean().item() == pytest.approx(real.mean().item(), abs=0.1)
    assert drawn.std().item() == pytest.approx(real.std().item(), abs=0.15)
    torch.testing.assert_close(drawn.mean(0), real.mean(0), rtol=0, atol=0.4)
    # They are nearer to real ones than images whose pixels are drawn each by itself.
    each = real[torch.randint(len(real), (600, 64)), 0, torch.arange(64) // 8, torch.arange(64) % 8]
    near, far = (torch.cdist(images.flatten(1), real.flatten(1)).amin(1).mean() for images in (drawn, each))
    assert near < 0.85 * far


def test_a_generator_goes_on_where_it_stopped(batches: Batches, tmp_path: Path) -> None:
    section = KnockoffSection.model_validate(
        {"source": "generator", "precision": "fp32", "generator": {"epochs": 2, "images": 8, "steps": 2, "width": 8}}
    )

    def drawn(place: Path, steps: int | None = None) -> Tensor:
        seen = 0

        def stopping() -> bool:
            nonlocal seen
            seen += 1
            return seen == steps

        batches.set_epoch(0)
        source = make_source(section, batches, CPU, Checkpointing(Checkpoints(str(place), "abc"), stopping))
        torch.manual_seed(0)
        return source(torch.zeros(20, 1, 8, 8), torch.zeros(20))

    whole = drawn(tmp_path / "whole")
    with pytest.raises(Stopped):
        drawn(tmp_path / "stopped", steps=30)
    assert torch.equal(drawn(tmp_path / "stopped"), whole)
    # They are kept apart from those of the gates, and go with them.
    checkpoints = Checkpoints(str(tmp_path / "stopped"), "abc")
    assert checkpoints.load() is None
    checkpoints.remove()
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("shape", [(3, 40, 28), (1, 5, 7), (3, 17, 16)])
def test_a_generator_takes_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = torch.rand(16, *shape)
    section = KnockoffSection.model_validate({"generator": {"epochs": 1, "images": 3, "steps": 2, "width": 8}})
    drawn = train_generator([(images, torch.zeros(16))], section, CPU)
    assert drawn.shape == (3, *shape)
    assert torch.isfinite(drawn).all()


def noise(batches):
    """A factory of one's own."""
    assert len(next(iter(batches))) == 2
    return lambda images, labels: torch.randn_like(images)


def nothing(batches) -> None:
    return None


def test_sources_are_pluggable_by_name(model, batches: Batches) -> None:
    named = train_knockoffs(model, batches, source="shuffle", epochs=1)
    own = train_knockoffs(model, batches, KnockoffSection(source="tests.knockoffs.test_sources:noise", epochs=1))
    assert own.keys() == named.keys()
    with pytest.raises(UserError, match="knockoff source 'shufle' is unknown"):
        make_source(KnockoffSection(source="shufle"), batches, CPU)
    with pytest.raises(UserError, match="cannot be imported"):
        make_source(KnockoffSection(source="tests.nowhere:noise"), batches, CPU)
    with pytest.raises(UserError, match="returned a NoneType; a factory takes the batches and returns a function"):
        make_source(KnockoffSection(source="tests.knockoffs.test_sources:nothing"), batches, CPU)


def pairs(correlation_of_others: bool) -> tuple[Tensor, Tensor]:
    """Coordinates with correlation 0.8, and copies: valid knockoffs, or independent of all."""
    generator = torch.Generator().manual_seed(0)
    sigma = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    d = 0.3 * torch.eye(2)
    cross = sigma - d if correlation_of_others else torch.zeros(2, 2)
    joint = torch.cat([torch.cat([sigma, cross], 1), torch.cat([cross.T, sigma], 1)])
    values = torch.randn(1000, 4, generator=generator) @ torch.linalg.cholesky(joint).T
    return values[:, :2], values[:, 2:]


def test_the_swap_test_tells_knockoffs_from_independent_copies() -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.tensor([True, False])
    both = torch.tensor([True, True])
    assert swap_test(*pairs(True), first, generator).p > 0.05
    # Independent copies may be swapped as a whole, but not one coordinate that has a correlated neighbour.
    assert swap_test(*pairs(False), both, generator).p > 0.05
    assert swap_test(*pairs(False), first, generator).p < 0.01


@pytest.mark.parametrize("seed", range(10))
def test_copies_that_equal_their_originals_pass_whatever_the_rounding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(300, 5, generator=generator)
    assert swap_test(same, same, torch.tensor([True, False, True, True, False]), generator).p == 1


def test_p_values_are_uniform_where_knockoffs_are_valid() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([True, False, True, False])
    ps = [swap_test(*torch.randn(2, 60, 4, generator=generator), half, generator).p for _ in range(100)]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.08)
    assert np.mean(ps) == pytest.approx(0.5, abs=0.1)


def test_knockoffs_that_are_perfect_pass_as_often_as_they_should() -> None:
    """Independent images, shuffled: p is small as often as it says, and large as often."""
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


def test_few_pairs_are_enough_for_a_test_that_is_fair() -> None:
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


def test_the_diagnostic_tells_good_knockoffs_from_bad_ones(model, batches: Batches) -> None:
    good = quality(shuffle, model, batches)
    assert good.swap_all.p > 0.05
    assert good.swap_half.p > 0.05
    assert good.swap_pixels.p < 0.01  # a pixel of another image does not go with its neighbours
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


def test_what_is_measured_is_metrics_and_json(model, batches: Batches) -> None:
    measured = quality(shuffle, model, batches)
    # No image is in two pairs.
    assert 0.35 < measured.pairs / sum(len(labels) for _, labels in batches) <= 0.5
    assert measured.as_dict()["swap_half"]["p"] == measured.metrics()["knockoff_swap_half_p"]
