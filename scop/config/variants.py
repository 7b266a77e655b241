"""Section `variants`: what is pruned, how much, by what rule."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

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
)


class BudgetSection(Section):
    """What the pruned network may cost; one of the three. The rate is solved for.

    Attributes:
        params, macs: at most so many; where that is at most 1, this share of the dense network's.
        latency_ms: a pass takes so long or up to 3 % less, in float32, on the device that selects, measured there; up
            to 1 % more counts as so long, for no measurement is surer.
        batch_size: images in a pass.
        threads: of the CPU; all by default.
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
        include: patterns of layers' names, such as layer3.*; only these are pruned.
        exclude: the same; these are not.
        rates: pattern -> rate for these layers, whatever the others' is.
        floor: at least this share of each layer's channels stays, for global and knockoff_plus.
        residual: the rule for residual streams: scatter, inner or coupled, see the README.
        round_to: bring kept counts to a multiple of this; 8 suits CPUs and GPUs.
        min_channels: at least so many channels stay in each layer.
        rounds: prune and fine-tune so many times, a step of the way each time; scores are taken anew in between.
        seed: of the random control.
        seeds: one network for each, NAME-seed0 and so on: what can be told from chance takes three and more.
        finetune: entries of section `finetune` that are different for this variant.
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
    def _names_of_seeds(self) -> VariantSection:
        longest = max((one.label for one in self.each_seed), key=len)
        if len(longest) > LONGEST_NAME:
            raise ValueError(f"name becomes {longest!r} with its seed, which is longer than {LONGEST_NAME} characters")
        return self

    @model_validator(mode="after")
    def _scores_that_fit(self) -> VariantSection:
        if self.selection == "knockoff_plus" and self.method not in ("scop", "none"):
            raise ValueError(f"selection knockoff_plus needs knockoffs, and method {self.method} has none")
        if self.method == "scratch" and (self.selection != "uniform" or self.rounds > 1):
            raise ValueError("method scratch has no weights to select by: it takes selection uniform and one round")
        return self
