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
        path: path or s3:// URI of the images; digits needs none.
        image_size: scale and centre-crop all images to this height and width in pixels; by default they must all have
            the same size.
        channels: 1 for grey, 3 for colour; by default 3 for torchvision networks, else as in the images.
        validation: fraction of the training images to split off for validation if the source has no validation split.
        test: fraction of the training images to split off for testing, before `validation`, if the source has no test
            split.
        seed: seed of these random splits.
        mean, std: per channel, for pixels in [0, 1]; by default computed from the training split.
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
    def _path_is_set(self) -> DataSection:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"path is missing; set it to the location of the {self.source} images")
        return self
