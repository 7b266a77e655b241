"""The configuration: one section per step, each validated on its own.

A section is the parameter of exactly one component, so a change re-executes only what depends on it. Unknown keys and
bad values are refused by name. On a KFP backend all numbers of a section arrive as doubles; they are integers again
here wherever an integer is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from scop.parsing import Section, merged, override, parse, read_yaml

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""What names runs, experiments and variants: it becomes part of paths and of registered models' names."""

ResidualRule = Literal["scatter", "inner", "coupled"]
Method = Literal["scop", "random", "l1", "bn_gamma", "fpgm", "scratch", "none"]
SelectionRule = Literal["uniform", "global", "knockoff_plus"]
Precision = Literal["auto", "bf16", "fp32"]
ScoreKind = Literal["fisher", "published"]
BatchNormMode = Literal["frozen", "own", "joint"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
"""The built-in networks and their depths (He et al., 2016, section 4.2), known here without importing PyTorch."""


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("must lie in [0, 1): 0 or more, and below 1")
    return value


Fraction = Annotated[float, AfterValidator(_below_one)]


class RunSection(Section):
    """How the run is named.

    Attributes:
        name: name of the pipeline run; made of the configuration's file name by default.
        experiment: the MLflow experiment; models are registered as EXPERIMENT-VARIANT.
        checkpoints: folder or s3:// URI for checkpoints; with the runs by default. One that was killed goes on from
            there when it is started again.
        keep_checkpoints: so many of each training are kept until it succeeds.
        artifact_root: folder or s3:// URI for the artifacts of a new MLflow experiment; as the server has it, or with
            the runs, by default.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=60)] | None = None
    experiment: Annotated[str, Field(pattern=NAME, max_length=100)] = "scop"
    checkpoints: str | None = None
    keep_checkpoints: PositiveInt = 2
    artifact_root: str | None = None


class DataSection(Section):
    """The images.

    Attributes:
        source: digits (scikit-learn), cifar10 or cifar100 (torchvision's layout at `path`), or imagefolder (a folder,
            .tar, .tar.gz or .zip of SPLIT/CLASS/*.jpg|png or CLASS/*.jpg|png at `path`).
        path: where they are.
        image_size: bring every image to this height and width; by default all must have the same already.
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
    mean: list[float] | None = None
    std: list[PositiveFloat] | None = None

    @field_validator("channels", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return _whole(value)

    @model_validator(mode="after")
    def _has_a_place(self) -> DataSection:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"path is missing: source {self.source} needs to be told where its images are")
        return self


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
        crop_padding, flip: augmentation, see `scop.batches.Augmentation`.
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
        model: a factory's name, see `scop.models`.
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
        return {key: _whole(entry) for key, entry in value.items()}

    @model_validator(mode="after")
    def _one_file(self) -> DenseSection:
        if self.weights is not None and self.pretrained is not None:
            raise ValueError("give weights, which are taken as they are, or pretrained, from which training starts")
        return self


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
        source: where knockoff images come from: shuffle, gaussian, generator, or package.module:factory, see
            `scop.knockoff_sources`.
        score: fisher, the information of gates that are held at `mixing`, or published, of gates that are trained; see
            `scop.knockoff`.
        mixing: share of the real features in the mixture, for score fisher.
        batch_norm: its statistics in this phase: frozen, the running ones; own, those of each stream's batch; or joint,
            those of real images and knockoffs together.
        epochs: passes over the training split; by default as many as show score fisher 10,240 images, which may be part
            of one, and 20 for score published, as in the paper.
        batch_size: images in a batch; all there are where they are fewer.
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
    batch_size: PositiveInt = 256
    lr: PositiveFloat = 0.004
    betas: tuple[Fraction, Fraction] = (0.5, 0.9)
    gaussian: GaussianSection = GaussianSection()
    generator: GeneratorSection = GeneratorSection()
    sensitivity: SensitivitySection = SensitivitySection()
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    precision: Precision = "auto"
    seed: Seed = 0


class BudgetSection(Section):
    """What the pruned network may cost; one of the three. The rate is solved for.

    Attributes:
        params, macs: at most so many; where that is at most 1, this share of the dense network's.
        latency_ms: a pass takes so long or up to 3 % less, in float32, on the device that selects, measured there; up
            to 1 % more counts as so long, for no measurement is surer.
        batch_size, threads: of the passes; all threads by default.
    """

    params: PositiveFloat | None = None
    macs: PositiveFloat | None = None
    latency_ms: PositiveFloat | None = None
    batch_size: PositiveInt = 1
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _one(self) -> BudgetSection:
        if len(self.given) != 1:
            raise ValueError("give one of params, macs and latency_ms")
        return self

    @property
    def given(self) -> dict[str, float]:
        """What is limited, and to what."""
        limits = {"params": self.params, "macs": self.macs, "latency_ms": self.latency_ms}
        return {name: limit for name, limit in limits.items() if limit is not None}


class VariantSection(Section):
    """One way of pruning the dense network; a run may have several.

    Attributes:
        name: names it in tables; made of method and rate or budget by default.
        method: scop; the controls random, l1, bn_gamma and fpgm; scratch, a network of such widths with random weights,
            trained by section `finetune` from the beginning; or none, which removes nothing.
        selection: uniform, the same rate in each layer, as in the paper; global, which keeps more accuracy at the same
            MACs, the lowest scores of all layers for the share of their layer that is left, and under a budget for what
            a channel costs of it; knockoff_plus, what the knockoff filter does not keep at `fdr`.
        prune_rate: fraction of the channels removed, in each layer or of all.
        fdr: false-discovery rate among the channels that stay, for knockoff_plus.
        budget: what the network may cost; the rate is solved for, or the false-discovery rate.
        include, exclude: patterns of layers' names, such as layer3.*; only these are pruned, those are not.
        rates: pattern -> rate for these layers, whatever the others' is.
        floor: at least this share of each layer's channels stays, for global and knockoff_plus.
        residual: the rule for residual streams, see `scop.graph`.
        round_to: bring kept counts to a multiple of this; 8 suits CPUs and GPUs.
        min_channels: at least so many channels stay in each layer.
        rounds: prune and fine-tune so many times, a step of the way each time; scores are taken anew in between.
        seed: of the random control.
        seeds: one network for each, NAME-seed0 and so on: what can be told from chance takes three and more.
        finetune: entries of section `finetune` that are different for this variant.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=60)] | None = None
    method: Method = "scop"
    selection: SelectionRule = "uniform"
    prune_rate: Fraction = 0.45
    fdr: Annotated[float, Field(gt=0, lt=1)] = 0.1
    budget: BudgetSection | None = None
    include: list[str] = []
    exclude: list[str] = []
    rates: dict[str, Fraction] = {}
    floor: Fraction = 0.25
    residual: ResidualRule = "scatter"
    round_to: PositiveInt = 1
    min_channels: PositiveInt = 1
    rounds: PositiveInt = 1
    seed: Seed = 0
    seeds: list[Seed] = []
    finetune: dict[str, Any] = {}

    @property
    def label(self) -> str:
        if self.name:
            return self.name
        if self.method == "none":
            return "none"
        rule = "" if self.selection == "uniform" else f"-{self.selection}"
        if self.budget:
            ((what, limit),) = self.budget.given.items()
            return f"{self.method}{rule}-{what}-{limit:g}".replace("+", "")
        return f"{self.method}{rule}-{self.fdr if self.selection == 'knockoff_plus' else self.prune_rate:g}"

    @property
    def each_seed(self) -> list[VariantSection]:
        """A variant for each of `seeds`, by which it selects at random and is fine-tuned; itself without any."""
        if not self.seeds:
            return [self]
        return [
            self.model_copy(
                update={
                    "name": f"{self.label}-seed{seed}",
                    "seed": seed,
                    "seeds": [],
                    "finetune": {**self.finetune, "seed": seed},
                }
            )
            for seed in self.seeds
        ]

    @model_validator(mode="after")
    def _scores_that_fit(self) -> VariantSection:
        if self.selection == "knockoff_plus" and self.method not in ("scop", "none"):
            raise ValueError(f"selection knockoff_plus needs knockoffs, and method {self.method} has none")
        if self.method == "scratch" and (self.selection != "uniform" or self.rounds > 1):
            raise ValueError("method scratch has no weights to select by: it takes selection uniform and one round")
        return self


class DistillationSection(Section):
    """Learning from the dense network, see `scop.distillation`.

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


class EvaluateSection(Section):
    """Measuring.

    Attributes:
        batch_sizes: latency is measured at each.
        repeats: timed passes of dense and of pruned, alternately.
        threads: CPU threads for latency; all by default.
    """

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 64]
    repeats: PositiveInt = 30
    threads: PositiveInt | None = None


class ExportSection(Section):
    """The deliverables.

    Attributes:
        tolerance: largest difference allowed between the PyTorch model and what is loaded again, in logits; as a share
            of the largest logit where that is above 1.
        max_top1_drop: `scop promote` takes a model whose top-1 accuracy on the test split is lower than the dense one's
            by at most this share.
        register_model: enter the ONNX model into MLflow's registry with the alias `candidate`.
    """

    tolerance: PositiveFloat = 1e-4
    max_top1_drop: Fraction = 0.01
    register_model: bool = True


class Config(Section):
    """A whole configuration."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    dense: DenseSection = DenseSection()
    knockoff: KnockoffSection = KnockoffSection()
    variants: Annotated[list[VariantSection], Field(min_length=1)] = [VariantSection()]
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="before")
    @classmethod
    def _colour_for_torchvision(cls, values: Any) -> Any:
        """Torchvision's networks take colour images: grey ones are given to them in three equal channels."""
        data, dense = (values.get(name) or {} for name in ("data", "dense")) if isinstance(values, dict) else ({}, {})
        if not isinstance(data, dict) or not isinstance(dense, dict) or data.get("channels") is not None:
            return values
        torchvision = str(dense.get("model", "")).startswith("torchvision:")
        return {**values, "data": {**data, "channels": 3}} if torchvision else values

    @field_validator("variants")
    @classmethod
    def _seed_by_seed(cls, value: list[VariantSection]) -> list[VariantSection]:
        return [one for variant in value for one in variant.each_seed]

    @model_validator(mode="after")
    def _labels_differ(self) -> Config:
        labels = [variant.label for variant in self.variants]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"variants: the name {label!r} is used twice; give them names")
        return self

    @model_validator(mode="after")
    def _variants_fit(self) -> Config:
        for variant in self.variants:
            finetune_for(self.finetune, variant)
        return self


class ConfigWithoutFinetuning(Config):
    """For what does not fine-tune: whether the variants' entries fit section `finetune`, which need not be there, is
    not looked at."""

    @model_validator(mode="after")
    def _variants_fit(self) -> ConfigWithoutFinetuning:
        return self


def _whole(value: Any) -> Any:
    """The value with every whole number in it an integer, however deep."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole(entry) for key, entry in value.items()}
    return [_whole(entry) for entry in value] if isinstance(value, list) else value


def finetune_for(section: FinetuneSection, variant: VariantSection) -> FinetuneSection:
    """The section `finetune` with a variant's own entries put in, however deep."""
    return parse(
        FinetuneSection, merged(section.model_dump(), variant.finetune), f"variants ({variant.label}).finetune"
    )


def load_config(path: Path | None, overrides: list[str] | None = None, kind: type[Config] = Config) -> Config:
    """Read a configuration file, or take the defaults, and put ``section.key=value`` entries in; values are YAML.

    Args:
        path: of the file.
        overrides: the entries.
        kind: what is checked.

    Raises:
        UserError: the file is missing or no YAML, or the configuration is bad.
    """
    values = {} if path is None else read_yaml(path)
    for change in overrides or []:
        override(values, change)
    return parse(kind, values)
