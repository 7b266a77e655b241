"""Section `data`: the images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scop.config.parsing import Section
from scop.config.values import Fraction, PositiveFloat, PositiveInt, Seed, whole


class DataSection(Section):
    """The images.

    Attributes:
        source: digits (scikit-learn), cifar10 or cifar100 (torchvision's layout at `path`), or imagefolder (a folder,
            .tar, .tar.gz or .zip of SPLIT/CLASS/*.jpg|png or CLASS/*.jpg|png at `path`).
        path: where they are.
        image_size: bring every image to this height and width, by scaling and by cutting off what is too long; by
            default all must have the same already.
        channels: 1 for grey, 3 for colour; by default what the images are, and 3 for networks of torchvision.
        validation: fraction of the training data cut off for validation, where the source has no such split.
        test: the same for the test split, cut off first.
        seed: draws what is cut off.
        mean, std: per channel, for pixels in [0, 1]; by default those of the training split.
    """

    source: Literal["digits", "cifar10", "cifar100", "imagefolder"] = "digits"
    path: str | None = None
    image_size: PositiveInt | None = None
    channels: Literal[1, 3] | None = None
    validation: Fraction = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Seed = 0
    mean: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None
    std: list[PositiveFloat] | None = None

    @field_validator("channels", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return whole(value)

    @model_validator(mode="after")
    def _has_a_place(self) -> DataSection:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"path is missing: source {self.source} needs to be told where its images are")
        return self
