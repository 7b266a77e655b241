"""Section `knockoff`: how channels are scored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scop.config.parsing import Section
from scop.config.values import BatchNormMode, Fraction, PositiveFloat, PositiveInt, Precision, ScoreKind, Seed


class GaussianSection(Section):
    """Second-order Model-X knockoffs.

    Attributes:
        components: number of principal components that are drawn at random; limited to half the number of images.
        distance: distance between a knockoff and its original, in (0, 1]; their correlation is 1 - distance.
    """

    components: PositiveInt = 256
    distance: Annotated[float, Field(gt=0, le=1)] = 1.0


class GeneratorSection(Section):
    """A small generative model of the images.

    Attributes:
        epochs: passes over the training split.
        width: number of channels at the first level of its U-Net; a multiple of 8.
        lr: peak learning rate of AdamW.
        images: number of images to generate; knockoffs are drawn from these.
        steps: integration steps from noise to image.
    """

    epochs: PositiveInt = 20
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    lr: PositiveFloat = 2e-3
    images: PositiveInt = 4096
    steps: PositiveInt = 16


class SensitivitySection(Section):
    """Accuracy with only one layer pruned, measured for each layer in turn.

    Attributes:
        rates: prune rates to measure; by default none, and nothing is measured.
        images: maximum number of images, from the validation split, or from the training split if there is none.
    """

    rates: list[Fraction] = []
    images: PositiveInt = 1000


class KnockoffSection(Section):
    """The knockoff phase, which scores the channels.

    Attributes:
        source: source of the knockoff images: shuffle, which takes other images of the batch; gaussian; generator; or
            package.module:factory, where factory(batches) returns a function of (images, labels) that returns
            knockoff images of the same shape.
        score: fisher, the Fisher information of gates held at `mixing`; or published, from trained gates, as in the
            paper; see `scop.knockoffs.phase`.
        mixing: share of the real features in the mixture, for score fisher.
        batch_norm: batch norm statistics in this phase: frozen, the running statistics; own, those of each stream's
            batch; joint, those of real images and knockoffs together.
        epochs: passes over the training split; by default 20 for score published, as in the paper, and enough for
            10,240 images for score fisher, which may be less than one pass.
        batch_size: images per batch, at least 2; limited to the number of training images.
        lr: learning rate of Adam on the gates, for score published.
        betas: betas of Adam on the gates, for score published.
        gaussian: settings of source gaussian.
        generator: settings of source generator.
        sensitivity: accuracy with one layer pruned at a time.
        crop_padding, flip: augmentation, as in section `dense`.
        precision: as in section `dense`.
        seed: seed of data order, augmentation and knockoffs.
    """

    source: str = "shuffle"
    score: ScoreKind = "fisher"
    mixing: Annotated[float, Field(gt=0, le=1)] = 0.8
    batch_norm: BatchNormMode = "frozen"
    epochs: PositiveInt | None = None
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: PositiveFloat = 0.004
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    gaussian: GaussianSection = GaussianSection()
    generator: GeneratorSection = GeneratorSection()
    sensitivity: SensitivitySection = SensitivitySection()
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    precision: Precision = "auto"
    seed: Seed = 0
