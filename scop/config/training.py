"""Sections `dense` and `finetune`: what is trained, how, and what it learns from a teacher."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scop.config.parsing import Section
from scop.config.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Precision, Seed, whole

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""The built-in networks and their depths (He et al., 2016, section 4.2), known here without importing PyTorch."""


class TrainingSection(Section):
    """One training run; the ground for dense training and fine-tuning.

    Attributes:
        epochs: passes over the training split; 0 trains nothing.
        batch_size: images in a batch.
        optimizer: sgd (Nesterov) or adamw.
        lr: the learning rate's peak.
        momentum: of SGD.
        weight_decay: on weights of convolutions and linear layers; norms and biases have none.
        schedule: of the learning rate after warm-up: cosine, poly (power 0.9) and one_cycle end near 0, step divides by
            10 at half and at three quarters.
        warmup_epochs: the rate rises linearly from near 0 for so long; may be a fraction.
        label_smoothing: share of the label's probability spread over all classes.
        crop_padding: shift images by up to so many pixels each way.
        flip: mirror half of the images.
        precision: bf16 autocast, fp32, or auto: bf16 where the device has it natively.
        compile: run through torch.compile.
        sync_batch_norm: where several processes train, batch norms see the whole batch and not each its share; then the
            network does not depend on how many there are, but for rounding and dropout.
        keep: the weights of the last epoch, or of the best one on the validation split.
        ema: what is kept is an exponential moving average of the weights with this decay a step, such as 0.999; 0 for
            none.
        seed: of initial weights, order and augmentation.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    batch_size: PositiveInt = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["cosine", "poly", "step", "one_cycle", "constant"] = "cosine"
    warmup_epochs: NonNegativeFloat = 0.0
    label_smoothing: Fraction = 0.0
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    precision: Precision = "auto"
    compile: bool = False
    sync_batch_norm: bool = True
    keep: Literal["last", "best"] = "last"
    ema: Fraction = 0.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _warmup_within(self) -> TrainingSection:
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}")
        return self


class DenseSection(TrainingSection):
    """The dense network, trained or given.

    Attributes:
        model: resnet20 to resnet110 (CIFAR), torchvision:NAME, or package.module:function, which takes num_classes and
            returns the network.
        arguments: further arguments for the factory.
        weights: a .safetensors file or a state dict saved by torch.save; then nothing is trained.
        pretrained: such a file to start training from; its last layer may be for other classes, then that begins anew.
    """

    model: str = "resnet20"
    arguments: dict[str, Any] = {}
    weights: str | None = None
    pretrained: str | None = None

    @field_validator("arguments")
    @classmethod
    def _whole_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        """KFP hands all numbers over as doubles; a factory wants its whole numbers back."""
        return {key: whole(entry) for key, entry in value.items()}

    @model_validator(mode="after")
    def _one_file(self) -> DenseSection:
        if self.weights is not None and self.pretrained is not None:
            raise ValueError("give weights, which are taken as they are, or pretrained, from which training starts")
        return self


class DistillationSection(Section):
    """Learning from the dense network, see `scop.training.distillation`.

    Attributes:
        weight: share of the distillation loss, 0 for none.
        temperature: softens both networks' answers.
        attention: weight of the distance between both networks' attention maps, stage by stage, 0 for none.
        attention_until: share of the epochs in which attention is learned, the first ones.
        mirror: the dense network's answer is the mean of those to an image and to its mirror image, which is right more
            often than either; for images that mean the same mirrored, so `flip` has to be true.
    """

    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: PositiveFloat = 4.0
    attention: NonNegativeFloat = 0.0
    attention_until: Annotated[float, Field(gt=0, le=1)] = 0.6
    mirror: bool = False


class FinetuneSection(TrainingSection):
    """Training of the pruned network.

    Attributes:
        recalibration_batches: before training, batch norm statistics are taken anew from so many batches.
        round_epochs: epochs after each of a variant's rounds but the last, which has `epochs`.
        distillation: learning from the dense network.
    """

    recalibration_batches: Annotated[int, Field(ge=0)] = 50
    round_epochs: Annotated[int, Field(ge=0)] = 2
    distillation: DistillationSection = DistillationSection()

    @model_validator(mode="after")
    def _mirrored_both(self) -> FinetuneSection:
        if self.distillation.mirror and not self.flip:
            raise ValueError("distillation.mirror needs flip: true: the images must mean the same mirrored")
        return self
