"""Sources of knockoff images.

A knockoff x~ of an image x must look like x to the network but carry no information about its label. A *source* returns
knockoffs for a batch; a *factory* creates a source from the training batches. A configuration names one of these:

``shuffle``
    The batch in another order: real images of other examples, independent of x and with exactly its distribution.
``gaussian``
    Second-order Model-X knockoffs (Candès et al., 2018, section 3.4.2) in the basis of the principal components.
``generator``
    Images from a small generative model that is trained first, see `scop.knockoffs.generator`; the paper used a GAN.
``package.module:factory``
    Your own: ``factory(batches)`` returns a function ``source(images, labels)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scop.compute.random_state import private_random_state
from scop.config import GaussianSection, KnockoffSection
from scop.errors import UserError
from scop.models.factories import import_user_module
from scop.training.checkpointing import Checkpointing
from scop.training.loop import TrainingBatches

KnockoffSource = Callable[[Tensor, Tensor], Tensor]
"""Returns knockoff images (B, C, H, W) for real images (B, C, H, W) and their labels (B,)."""

SourceFactory = Callable[[TrainingBatches], KnockoffSource]
"""Returns a source for the batches of the knockoff phase."""

_SAMPLE = 2**26
"""Maximum number of values from which principal components are estimated: 256 MiB, or 21,845 images of 3x32x32."""


def make_source(
    section: KnockoffSection,
    batches: TrainingBatches,
    device: torch.device,
    checkpointing: Checkpointing | None = None,
) -> KnockoffSource:
    """Return the source that a configuration names.

    Args:
        section: the source's name and settings.
        batches: (images, labels), images normalised for the network.
        device: device to compute on.
        checkpointing: for sources that train; see `scop.training.loop.fit`.

    Raises:
        UserError: the source is unknown, cannot be imported, or its factory does not return a function.
    """
    match section.source:
        case "shuffle":
            return shuffle
        case "gaussian":
            return Gaussian.fit(batches, section.gaussian, section.seed).to(device)
        case "generator":
            from scop.knockoffs.generator import train_generator

            own = checkpointing and checkpointing.part("generator")
            generated = train_generator(batches, section, device, own)
            return partial(draw, generated)
    source = _own_factory(section.source)(batches)
    if not callable(source):
        raise UserError(
            f"knockoff source {section.source!r} returned a {type(source).__name__}; a factory takes the batches and "
            "returns a function of (images, labels)"
        )
    return source


def _own_factory(name: str) -> SourceFactory:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = "shuffle, gaussian, generator, or package.module:factory"
        raise UserError(f"knockoff source {name!r} is unknown (known: {known})")
    try:
        factory: SourceFactory = getattr(import_user_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"knockoff source {name!r} cannot be imported: {error}") from error
    return factory


def shuffle(images: Tensor, labels: Tensor) -> Tensor:
    """Return the batch in random order; on average, one image of a batch is its own knockoff."""
    return images[torch.randperm(len(images), device=images.device)]


def draw(bank: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return a random image of a bank (N, C, H, W) for each image."""
    return bank[torch.randint(len(bank), (len(images),), device=bank.device)].to(images.device)


@dataclass(frozen=True)
class Gaussian:
    """Second-order Model-X knockoffs in the basis of the principal components.

    In this basis the covariance is diagonal, so the optimisation of section 3.4.2 has a closed-form solution. For
    coordinates z with variances lambda, the knockoff is

        z~_j = (1 - d) z_j + sqrt(d (2 - d) lambda_j) e_j,   e_j standard normal.

    It has the mean and covariance of z. Its covariance with z_i, i != j, equals that of z_j, which is 0. Its
    correlation with z_j is 1 - d; d = 1 is the solution without correlation. The part of the image outside the basis,
    its finest detail, is taken from another image of the batch, so that the whole knockoff has the images' second
    moments.

    Attributes:
        mean: (D,), where D is the number of values in an image.
        basis: (D, K), orthonormal columns.
        deviations: (K,), the square roots of lambda.
        distance: d, in (0, 1].
    """

    mean: Tensor
    basis: Tensor
    deviations: Tensor
    distance: float

    @classmethod
    def fit(cls, batches: TrainingBatches, section: GaussianSection, seed: int = 0) -> Gaussian:
        """Estimate mean and principal components from training batches, with at least two images per component."""
        images = _sample(batches)
        components = min(section.components, images.shape[1], max(1, len(images) // 2))
        mean = images.mean(0)
        with private_random_state(seed):
            _, singular, basis = torch.pca_lowrank(images - mean, components, center=False, niter=4)
        return cls(mean, basis, singular / math.sqrt(len(images) - 1), section.distance)

    def to(self, device: torch.device) -> Gaussian:
        """Return a copy on another device, where the images are."""
        return Gaussian(self.mean.to(device), self.basis.to(device), self.deviations.to(device), self.distance)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        flat = images.flatten(1).float() - self.mean
        z = flat @ self.basis
        detail = shuffle(flat - z @ self.basis.T, labels)
        noise = torch.randn_like(z) * self.deviations * math.sqrt(self.distance * (2 - self.distance))
        knockoffs = self.mean + ((1 - self.distance) * z + noise) @ self.basis.T + detail
        return knockoffs.view(images.shape).to(images.dtype, memory_format=torch.channels_last)


def _sample(batches: TrainingBatches) -> Tensor:
    """Return images (N, D) of the first epoch, up to `_SAMPLE` values."""
    found: list[Tensor] = []
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(0)
    for images, _ in batches:
        found.append(images.flatten(1).float())
        if sum(part.numel() for part in found) >= _SAMPLE:
            break
    return torch.cat(found)
