"""Section `variants`: what is pruned, by how much, and by which rule."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from scop.config.parsing import Section
from scop.config.values import (
    LONGEST_NAME,
    NAME,
    Fraction,
    Method,
    PositiveFloat,
    PositiveInt,
    ResidualRule,
    Seed,
    SelectionRule,
    whole,
)


class BudgetSection(Section):
    """Maximum cost of the pruned network, from which the prune rate is found; set one of params, macs and latency_ms.

    Attributes:
        params: maximum number of parameters; a value up to 1 is a share of the dense network's.
        macs: maximum number of multiply-accumulates per image; a value up to 1 is a share of the dense network's.
        latency_ms: maximum latency of a forward pass in float32, measured on the device that selects channels; the
            search stops within -3 %/+1 % of it, the accuracy of the measurement.
        batch_size: images per forward pass, for latency_ms.
        threads: number of CPU threads, for latency_ms; by default all.
    """

    params: PositiveFloat | None = None
    macs: PositiveFloat | None = None
    latency_ms: PositiveFloat | None = None
    batch_size: PositiveInt = 1
    threads: PositiveInt | None = None

    @model_validator(mode="after")
    def _one(self) -> BudgetSection:
        if len(self.given) != 1:
            raise ValueError("set exactly one of params, macs and latency_ms")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        limits = {"params": self.params, "macs": self.macs, "latency_ms": self.latency_ms}
        return {name: limit for name, limit in limits.items() if limit is not None}


class VariantSection(Section):
    """One way to prune the dense network; a run may have several variants.

    Attributes:
        name: name in paths and tables; by default made of the method and the rate or budget.
        method: scop; a control: random, l1, bn_gamma or fpgm; scratch, a pruned network with random weights, trained
            with section `finetune`; or none, which removes nothing.
        selection: which channels are removed: uniform, the same share of each layer, as in the paper; global, the
            lowest scores of all layers, which keeps more accuracy at the same MACs (a score is divided by the share of
            its layer that is left and, under a budget, by the channel's cost); knockoff_plus, those that the knockoff
            filter does not keep at `fdr`.
        prune_rate: fraction of the channels to remove, of each layer or, for global, of all layers together.
        fdr: false-discovery rate among the kept channels, for knockoff_plus.
        budget: maximum cost of the pruned network, used instead of `prune_rate` or `fdr`.
        include: patterns of layer names, such as layer3.*; only these layers are pruned.
        exclude: patterns of layer names; these layers are not pruned.
        rates: fixed prune rates for certain layers, such as {layer3.*: 0.3}; they also hold under a budget.
        floor: minimum share of each layer's channels to keep, for global and knockoff_plus.
        residual: rule for residual streams: scatter, inner or coupled; see the README.
        round_to: round the number of kept channels to a multiple of this; 8 suits CPUs and GPUs.
        min_channels: minimum number of channels to keep in each layer.
        rounds: number of rounds of pruning and fine-tuning, in equal steps; each round scores the channels again.
        seed: seed of method random.
        seeds: train one network per seed, named NAME-seed0 and so on; use at least three to distinguish an effect from
            chance.
        finetune: entries of section `finetune` to override for this variant.
    """

    name: Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)] | None = None
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
    finetune: Annotated[dict[str, Any], AfterValidator(whole)] = {}  # KFP passes integers as floats

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
        """Return a copy of the variant for each entry of `seeds`; the variant itself if there are none."""
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
    def _names_of_seeds(self) -> VariantSection:
        longest = max((one.label for one in self.each_seed), key=len)
        if len(longest) > LONGEST_NAME:
            raise ValueError(
                f"with its seed, the name becomes {longest!r}, longer than {LONGEST_NAME} characters; shorten it"
            )
        return self

    @model_validator(mode="after")
    def _scores_that_fit(self) -> VariantSection:
        if self.selection == "knockoff_plus" and self.method not in ("scop", "none"):
            raise ValueError(f"selection knockoff_plus needs knockoffs; method {self.method} has none, use method scop")
        if self.method == "scratch" and (self.selection != "uniform" or self.rounds > 1):
            raise ValueError("method scratch has no trained weights to rank; use selection: uniform and rounds: 1")
        return self
