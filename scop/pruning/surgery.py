"""Surgery: make a smaller model from a dense model and a plan, exactly.

A plan lists the kept channels. `cuts_of` finds every layer that loses channels, and `apply_cuts` shrinks these layers.
The cuts are plain indices, so a pruned model is rebuilt from its factory, cuts and weights, without tracing and without
the dense weights. `masked_twin` keeps all channels and zeroes the removed ones after every layer that loses them. It
must compute the same function; `exactness` measures the difference.
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
"""The largest difference between the masked and the pruned network that counts as exact."""


def prune(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Return a smaller copy of the model with only the channels that the plan keeps; the model is not changed.

    Raises:
        UserError: the plan does not match the model, the model is already pruned, or it cannot be pruned exactly.
    """
    return prune_exactly(model, plan)[0]


def prune_exactly(model: nn.Module, plan: ChannelPlan) -> tuple[nn.Module, float]:
    """Prune like `prune`; also return the difference of the pruned model from its masked twin, see `exactness`."""
    spec = spec_of(model) or ModelSpec()
    if spec.cuts:
        raise UserError("the model is already pruned; make the plan for the dense model and prune that one")
    plan.check(model)
    graph = ChannelGraph(model, plan.input_shape)
    cuts = cuts_of(graph, plan)
    try:
        difference = exactness(model, cuts, plan.input_shape)
    except UserError as error:
        raise UserError(f"{_channels_of(_culprits(model, graph, plan))} cannot be removed: {error}") from error
    if not difference <= TOLERANCE:
        raise UserError(
            f"{_channels_of(_culprits(model, graph, plan))} cannot be removed exactly: the network without them "
            f"differs by {difference:.3g} from the network with them set to 0 (possible causes: an activation that is "
            "not 0 at 0, a mean over channels); add these layers to the variant's exclude, or try another residual rule"
        )
    pruned = apply_cuts(copy.deepcopy(model), cuts)
    if any(cut.scatter for cut in cuts.values()):
        _check_training_mode(pruned, plan.input_shape)
    return attach_spec(
        pruned, spec.model_copy(update={"cuts": cuts, "plan": plan, "input_shape": plan.input_shape})
    ), difference


@torch.no_grad()
def _check_training_mode(pruned: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Raise UserError if a scattered branch passes through an unsupported operation in training mode.

    An example is dropout before the addition. `exactness` does not see it, since it runs in eval mode.
    """
    twin = copy.deepcopy(pruned).cpu().float().train()
    with torch.random.fork_rng(devices=[]), suppress(RuntimeError, ValueError, TypeError):
        twin(torch.randn(2, *input_shape))


def _culprits(model: nn.Module, graph: ChannelGraph, plan: ChannelPlan) -> list[str]:
    """Return the layers whose channels cannot be removed exactly even if no other layer is pruned."""
    whole = {layer: list(range(channels)) for layer, channels in plan.channels.items()}

    def removable(prunable: Prunable) -> bool:
        kept = {layer: plan.kept[layer] for layer in prunable.convs if layer in plan.kept}
        cuts = cuts_of(graph, plan.model_copy(update={"kept": whole | kept}))
        try:
            return exactness(model, cuts, plan.input_shape) <= TOLERANCE
        except UserError:
            return False

    return [prunable.name for prunable in graph.prunable(plan.residual) if not removable(prunable)]


def _channels_of(layers: list[str]) -> str:
    names = ", ".join(map(repr, layers[:4])) + (", ..." if len(layers) > 4 else "")
    return f"channels of {names or 'several layers together'}"
