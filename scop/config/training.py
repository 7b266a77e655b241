"""Sections `dense` and `finetune`: training, and distillation from the dense network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from scop.config.parsing import Section
from scop.config.values import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Precision, Seed, whole

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""The built-in networks and their depths (He et al., 2016, section 4.2), listed here without importing PyTorch."""


class TrainingSection(Section):
    """Settings shared by dense training and fine-tuning.

    Attributes:
        epochs: passes over the training split; 0 skips training.
        batch_size: images per batch, over all processes.
        optimizer: sgd (with Nesterov momentum) or adamw.
        lr: peak learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay of convolutions and linear layers; not applied to norms and biases.
        schedule: learning rate after warm-up: cosine, poly (power 0.9) and one_cycle fall to about 0; step divides by
            10 at half and again at three quarters; constant keeps the peak.
        warmup_epochs: epochs in which the learning rate rises linearly from near 0; may be a fraction.
        label_smoothing: share of the label's probability that is spread over all classes.
        crop_padding: maximum random shift of an image in each direction, in pixels.
        flip: mirror a random half of the images.
        precision: bf16 (autocast), fp32, or auto, which is bf16 if the device supports it natively.
        compile: use torch.compile.
        sync_batch_norm: if several processes train, compute batch norm statistics over the whole batch instead of each
            process's share; the result then does not depend on the number of processes, except for rounding and
            dropout.
        keep: last, to keep the weights of the last epoch; or best, those of the best epoch on the validation split.
        ema: decay per step of an exponential moving average of the weights, such as 0.999; the average becomes the
            result. 0 disables it.
        seed: seed of initial weights, data order and augmentation.
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
    """The dense network, trained here or loaded from a file.

    Attributes:
        model: resnet20, resnet32, resnet44, resnet56 or resnet110 (for CIFAR), torchvision:NAME, or
            package.module:function, which takes num_classes and returns the network.
        arguments: further keyword arguments of that function.
        weights: file with trained weights, .safetensors or a state dict saved by torch.save; training is skipped.
        pretrained: file of the same kind to start training from; a last layer for another number of classes is
            reinitialised.
    """

    model: str = "resnet20"
    arguments: dict[str, Any] = {}
    weights: str | None = None
    pretrained: str | None = None

    @field_validator("arguments")
    @classmethod
    def _whole_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Convert whole numbers back to integers: KFP passes all numbers as doubles, but factories expect integers."""
        return {key: whole(entry) for key, entry in value.items()}

    @model_validator(mode="after")
    def _one_file(self) -> DenseSection:
        if self.weights is not None and self.pretrained is not None:
            raise ValueError("set either weights (training is skipped) or pretrained (training starts from it)")
        return self


class DistillationSection(Section):
    """Distillation from the dense network; see `scop.training.distillation`.

    Attributes:
        weight: weight of the distillation loss; the loss on the labels has the rest. 0 disables it.
        temperature: temperature of both networks' softmax in the distillation loss.
        attention: weight of the mean distance between both networks' attention maps at the end of each stage. 0
            disables it.
        attention_until: fraction of the epochs, counted from the first, in which attention maps are distilled.
        mirror: average the dense network's logits over an image and its mirror image; the mean is right more often than
            either. Requires `flip: true`, since mirrored images must have the same meaning.
    """

    weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: PositiveFloat = 4.0
    attention: NonNegativeFloat = 0.0
    attention_until: Annotated[float, Field(gt=0, le=1)] = 0.6
    mirror: bool = False


class FinetuneSection(TrainingSection):
    """Fine-tuning of the pruned network.

    Attributes:
        recalibration_batches: number of batches from which batch norm statistics are recomputed before training. 0
            disables it.
        round_epochs: epochs after each pruning round of a variant except the last, which has `epochs`.
        distillation: distillation from the dense network.
    """

    recalibration_batches: Annotated[int, Field(ge=0)] = 50
    round_epochs: Annotated[int, Field(ge=0)] = 2
    distillation: DistillationSection = DistillationSection()

    @model_validator(mode="after")
    def _mirrored_both(self) -> FinetuneSection:
        if self.distillation.mirror and not self.flip:
            raise ValueError("distillation.mirror needs flip: true, since mirrored images must have the same meaning")
        return self
