"""A variant's pruning rounds."""

from __future__ import annotations

from dataclasses import dataclass

from scop.pruning.plan import ChannelPlan


@dataclass(frozen=True)
class Round:
    """One of the rounds in which a variant prunes.

    The rounds are equal steps on a logarithmic scale of the kept fraction: with two rounds and a rate of 0.75, half of
    the channels are kept after the first round.

    Attributes:
        number: counted from 1.
        total: number of rounds.
        previous: the plan of the previous round; the channels that it removed stay removed.
    """

    number: int = 1
    total: int = 1
    previous: ChannelPlan | None = None

    def rate(self, rate: float) -> float:
        """Return the prune rate of this round, given the rate of the last round."""
        return 1 - (1 - rate) ** (self.number / self.total)

    def target(self, whole: float, target: float) -> float:
        """Return the budget of this round, given the dense network's cost and the budget of the last round."""
        fraction = self.number / self.total
        return float(whole ** (1 - fraction) * target**fraction)
