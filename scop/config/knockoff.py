"""Section `knockoff`: what scores are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scop.config.parsing import Section
from scop.config.values import BatchNormMode, Fraction, PositiveFloat, PositiveInt, Precision, ScoreKind, Seed


class GaussianSection(Section):
    """Second-order Model-X knockoffs.

    Attributes:
        components: so many principal components are drawn anew; at most half as many as there are images.
        distance: of a knockoff from its original, in (0, 1]; their correlation is 1 - distance.
    """

    components: PositiveInt = 256
    distance: Annotated[float, Field(gt=0, le=1)] = 1.0


class GeneratorSection(Section):
    """A small generative model of the images.

    Attributes:
        epochs: passes over the training split.
        width: channels of its first level.
        lr: of AdamW, at its peak.
        images: so many are drawn; knockoffs are taken from them.
        steps: from noise to an image.
    """

    epochs: PositiveInt = 20
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    lr: PositiveFloat = 2e-3
    images: PositiveInt = 4096
    steps: PositiveInt = 16


class SensitivitySection(Section):
    """How accuracy depends on the rate of one layer alone.

    Attributes:
        rates: at which each layer is pruned in turn; none by default, then nothing is measured.
        images: of the validation split, or of the training split where there is none.
    """

    rates: list[Fraction] = []
    images: PositiveInt = 1000


class KnockoffSection(Section):
    """The knockoff phase.

    Attributes:
        source: where knockoff images come from: shuffle, other images of the batch; gaussian; generator; or
            package.module:factory of your own, where factory(batches) returns source(images, labels), which returns
            knockoff images of that shape.
        score: fisher, the information of gates that are held at `mixing`, or published, of gates that are trained; see
            `scop.knockoffs.phase`.
        mixing: share of the real features in the mixture, for score fisher.
        batch_norm: its statistics in this phase: frozen, the running ones; own, those of each stream's batch; or joint,
            those of real images and knockoffs together.
        epochs: passes over the training split; by default as many as show score fisher 10,240 images, which may be part
            of one, and 20 for score published, as in the paper.
        batch_size: images in a batch, two or more; all there are where they are fewer.
        lr, betas: of Adam on the gates, for score published.
        gaussian, generator: settings of these sources.
        sensitivity: accuracy against the rate of one layer at a time.
        crop_padding, flip: augmentation.
        precision: see `TrainingSection`.
        seed: of order, augmentation and knockoffs.
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
