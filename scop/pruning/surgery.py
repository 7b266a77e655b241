"""Surgery: from a dense model and a plan to a physically smaller model, exactly.

A plan names kept channels; `cuts_of` works out every layer that they reach; `apply_cuts` shrinks these layers. The cuts
are plain numbers, so a pruned model is rebuilt from its factory, its cuts and its weights, without tracing and without
the dense weights. `masked_twin` keeps all channels and zeroes the removed ones after their batch norm: it must compute
the same function, and `exactness` measures by how much it does not.
"""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import nn

from scop.errors import UserError
from scop.pruning.cuts import apply_cuts, cuts_of
from scop.pruning.exactness import exactness
from scop.pruning.graph import ChannelGraph, Prunable
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import ModelSpec, attach_spec, spec_of

TOLERANCE = 1e-4
"""The largest difference between masked and pruned that passes for exact."""


def prune(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """A smaller copy of the model with only the channels that the plan keeps; the model itself stays as it is.

    Raises:
        UserError: the plan does not fit the model, the model is pruned already, or it cannot be pruned exactly.
    """
    return prune_exactly(model, plan)[0]


def prune_exactly(model: nn.Module, plan: ChannelPlan) -> tuple[nn.Module, float]:
    """`prune`, and by how much the pruned model differs from its masked twin; see `exactness`."""
    spec = spec_of(model) or ModelSpec()
    if spec.cuts:
        raise UserError("the model is pruned already; make the plan for the dense model, and prune that")
    plan.check(model)
    graph = ChannelGraph(model, plan.input_shape)
    cuts = cuts_of(graph, plan)
    try:
        difference = exactness(model, cuts, plan.input_shape)
    except UserError as error:
        raise UserError(f"{_those_of(_culprits(model, graph, plan))} cannot be removed: {error}") from error
    if not difference <= TOLERANCE:
        raise UserError(
            f"{_those_of(_culprits(model, graph, plan))} cannot be removed exactly: the network without them differs "
            f"by {difference:.3g} from the one in which they are 0 (behind them is an activation that is not 0 at 0, a "
            "mean over channels, or the like); name them in the variant's exclude, or try another residual rule"
        )
    pruned = apply_cuts(copy.deepcopy(model), cuts)
    if any(cut.scatter for cut in cuts.values()):
        _refuse_what_fails_in_training(pruned, plan.input_shape)
    return attach_spec(
        pruned, spec.model_copy(update={"cuts": cuts, "plan": plan, "input_shape": plan.input_shape})
    ), difference


@torch.no_grad()
def _refuse_what_fails_in_training(pruned: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Raise UserError where a scattered branch meets what it cannot pass through, such as a kind of stochastic depth.

    In evaluation, where exactness is measured, there is none.
    """
    twin = copy.deepcopy(pruned).cpu().float().train()
    with torch.random.fork_rng(devices=[]), suppress(RuntimeError, ValueError, TypeError):
        twin(torch.randn(2, *input_shape))


def _culprits(model: nn.Module, graph: ChannelGraph, plan: ChannelPlan) -> list[str]:
    """The layers whose channels by themselves cannot be removed exactly."""
    whole = {layer: list(range(channels)) for layer, channels in plan.channels.items()}

    def removable(prunable: Prunable) -> bool:
        kept = {layer: plan.kept[layer] for layer in prunable.convs if layer in plan.kept}
        cuts = cuts_of(graph, plan.model_copy(update={"kept": whole | kept}))
        try:
            return exactness(model, cuts, plan.input_shape) <= TOLERANCE
        except UserError:
            return False

    return [prunable.name for prunable in graph.prunable(plan.residual) if not removable(prunable)]


def _those_of(layers: list[str]) -> str:
    names = ", ".join(map(repr, layers[:4])) + (", ..." if len(layers) > 4 else "")
    return f"channels of {names or 'some layers together'}"


# -- adding a narrow branch to a wide stream ---------------------------------------------------------------------------


# -- the proof ---------------------------------------------------------------------------------------------------------
