"""Surgery: from a dense model and a plan to a physically smaller model, exactly.

A plan names kept channels; `cuts_of` works out every layer that they reach; `apply_cuts` shrinks these layers. The cuts
are plain numbers, so a pruned model is rebuilt from its factory, its cuts and its weights, without tracing and without
the dense weights. `masked_twin` keeps all channels and zeroes the removed ones after their batch norm: it must compute
the same function, and `exactness` measures by how much it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from scop.errors import UserError
from scop.pruning.graph import ChannelGraph, Prunable
from scop.pruning.plan import ChannelPlan
from scop.pruning.spec import LayerCut, ModelSpec, attach_spec, spec_of

Cuts = Mapping[str, LayerCut]


def cuts_of(graph: ChannelGraph, plan: ChannelPlan) -> dict[str, LayerCut]:
    """Every layer that the plan reaches, with what it loses.

    Raises:
        UserError: the plan and the graph do not fit.
    """
    out: dict[str, set[int]] = {}
    into: dict[str, set[int]] = {}
    scatter: set[str] = set()
    planned = set(plan.kept)
    for prunable in graph.prunable(plan.residual):
        removed = _agreed_removal(prunable, plan)
        planned.difference_update(prunable.convs)
        if not removed:
            continue
        if prunable.scatter:
            norm = graph.batch_norm(prunable.name)
            for layer in filter(None, (prunable.name, norm)):
                out.setdefault(layer, set()).update(removed)
            scatter.add(norm or prunable.name)
        else:
            for layer, side, indices in graph.reach(prunable.name, removed):
                (out if side == "out" else into).setdefault(layer, set()).update(indices)
    if planned:
        raise UserError(
            f"layer {min(planned)!r} is in the plan but cannot be pruned under residual rule {plan.residual!r}"
        )
    return {
        layer: LayerCut(out=sorted(out.get(layer, ())), into=sorted(into.get(layer, ())), scatter=layer in scatter)
        for layer in sorted(out.keys() | into.keys())
    }


def _agreed_removal(prunable: Prunable, plan: ChannelPlan) -> list[int]:
    present = [conv for conv in prunable.convs if conv in plan.kept]
    if not present:
        return []
    removals = {tuple(plan.removed(conv)) for conv in present}
    if len(removals) > 1 or len(present) < len(prunable.convs):
        raise UserError(
            f"layers {', '.join(map(repr, prunable.convs))} share their channels, so a plan must keep the same in all"
        )
    removed = list(removals.pop())
    if removed and prunable.blocks > 1:
        block = prunable.channels // prunable.blocks
        counts = [sum(channel // block == b for channel in removed) for b in range(prunable.blocks)]
        if len(set(counts)) > 1:
            raise UserError(f"layer {prunable.name!r}: each of its {prunable.blocks} groups must lose equally many")
    return removed


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


def apply_cuts(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Shrink the model's layers in place, and return it.

    Raises:
        UserError: a cut names a layer that the model lacks, or one that is too small for it.
    """
    for name, cut in cuts.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"layer {name!r} is to be cut but is not in the model") from error
        width = _out_channels(layer)
        frozen = [name for name, parameter in layer.named_parameters(recurse=False) if not parameter.requires_grad]
        try:
            if cut.into:
                _prune_inputs(layer, cut.into)
            if cut.out:
                _pruner(layer).prune_out_channels(layer, cut.out)
        except (IndexError, RuntimeError) as error:
            raise UserError(f"layer {name!r} does not fit its cut ({error}); is this another network?") from error
        for parameter in frozen:  # Torch-Pruning makes new ones
            layer.get_parameter(parameter).requires_grad_(False)
        if cut.scatter:
            _make_scattering(layer, cut.out, width)
    return model


@torch.no_grad()
def regrow(pruned: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of the dense network with the pruned one's weights at their places, and zeros where channels went.

    It computes what the pruned network does, so that its channels can be scored and pruned again.
    """
    spec = spec_of(pruned)
    assert spec is not None
    # Cut numbers that tell their own places, and they tell where those that stayed came from, whatever the layer.
    numbered = copy.deepcopy(dense).cpu().double()
    for module in numbered.modules():
        for name, tensor in module.named_buffers(recurse=False):  # a mask or a table holds no such numbers
            setattr(module, name, tensor.double())
    for tensor in numbered.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    places, weights = apply_cuts(numbered, spec.cuts).state_dict(), pruned.state_dict()
    grown = copy.deepcopy(dense).cpu()
    for name, tensor in grown.state_dict().items():
        tensor.zero_().put_(places[name].long(), weights[name].cpu())
    return grown


def _pruner(layer: nn.Module) -> Any:
    return tp.pruner.function.PrunerBox[tp.ops.module2type(layer)]


def _out_channels(layer: nn.Module) -> int:
    return int(_pruner(layer).get_out_channels(layer))


def _prune_inputs(layer: nn.Module, removed: list[int]) -> None:
    if not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        _pruner(layer).prune_in_channels(layer, removed)
        return
    # A grouped convolution: each group keeps its own inputs, which Torch-Pruning takes to be the same in all.
    gone = set(removed)
    width = layer.in_channels // layer.groups
    kept = [[c for c in range(width) if g * width + c not in gone] for g in range(layer.groups)]
    rows = layer.weight.detach().chunk(layer.groups, dim=0)
    slices = [weight[:, torch.tensor(index)] for weight, index in zip(rows, kept, strict=True)]
    layer.weight = nn.Parameter(torch.cat(slices), requires_grad=layer.weight.requires_grad)
    layer.in_channels -= len(gone)


# -- adding a narrow branch to a wide stream ---------------------------------------------------------------------------


class Scattered:
    """The narrow end of a residual branch, which waits for the addition to the full-width stream.

    Stands in for the feature map between the branch's last layer and the addition, so the network's own forward needs
    no change and nothing of full width is made: ``x + scattered`` puts each channel where it belongs.

    Shape:
        values (N, K, H, W) + stream (N, C, H, W) -> (N, C, H, W), with ``places`` of K of the C channels.
    """

    def __init__(self, values: Tensor, places: Tensor, spread: Tensor) -> None:
        self.values, self.places, self.spread = values, places, spread

    def added_to(self, stream: Tensor) -> Tensor:
        """The stream with the branch's channels added where they belong."""
        # Channels that lie side by side in memory are hard to address one by one: there a 1x1 convolution with a
        # 0/1 matrix is 2.5 times faster than index_add (bf16, two cores), and exact, each sum having one term.
        # Runtimes for exported graphs are good at convolutions too, and turn index_add into transposes and a scatter.
        if torch.compiler.is_exporting() or not self.values.is_contiguous():
            return stream + F.conv2d(self.values, self.spread.to(self.values.dtype))
        return stream.index_add(1, self.places, self.values.to(stream.dtype))

    __add__ = added_to
    __radd__ = added_to
    __iadd__ = added_to

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("add", "__add__", "__radd__", "__iadd__", "add_") and len(args) == 2:
            branch, stream = args if isinstance(args[0], cls) else reversed(args)
            return branch.added_to(stream)  # not with +, which torch.compile would send here again
        raise UserError(_passes_through(getattr(func, "__name__", str(func))))

    # Stochastic depth, which may stand before the addition, scales whole images: that commutes with scattering.

    def __mul__(self, noise: Tensor | float) -> Scattered:
        if isinstance(noise, Tensor) and noise.dim() > 1 and noise.shape[1] != 1:
            raise UserError(_passes_through("a product with a feature map"))
        return Scattered(self.values * noise, self.places, self.spread)

    def __truediv__(self, share: Tensor | float) -> Scattered:
        return self * (1 / share)

    div = __truediv__

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        """As a tensor's, for the noise."""
        return self.values.new_empty(*size, **options)

    def __len__(self) -> int:
        return len(self.values)

    def __getattr__(self, name: str) -> Any:
        raise _UnknownToScatteredError(_passes_through(name))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device


def _passes_through(what: str) -> str:
    return (
        f"a residual branch passes through {what} before it is added, so it cannot be scattered; use residual: inner "
        "or coupled"
    )


class _UnknownToScatteredError(UserError, AttributeError):
    """For who asks whether there is such an attribute it is what they expect."""


class _Scattering:
    """Mixin for a branch's last layer, convolution or batch norm: its forward returns a `Scattered`."""

    places: Tensor
    spread: Tensor

    def forward(self, x: Tensor) -> Scattered:
        return Scattered(super().forward(x), self.places, self.spread)  # type: ignore[misc]


def _make_scattering(layer: nn.Module, removed: list[int], width: int) -> None:
    gone = set(removed)
    places = torch.tensor([channel for channel in range(width) if channel not in gone])
    spread = torch.zeros(width, len(places), 1, 1)
    spread[places, torch.arange(len(places))] = 1
    device = next(chain(layer.parameters(), layer.buffers())).device
    # Rebuilt from the cuts on loading, hence no part of the state dict.
    layer.register_buffer("places", places.to(device), persistent=False)
    layer.register_buffer("spread", spread.to(device), persistent=False)
    own = type(layer)
    layer.__class__ = type(f"Scattering{own.__name__}", (_Scattering, own), {"__doc__": own.__doc__})


# -- the proof ---------------------------------------------------------------------------------------------------------


def masked_twin(model: nn.Module, cuts: Cuts) -> nn.Module:
    """A copy of the dense model in which the removed channels are zeroed behind every layer that loses them."""
    twin = copy.deepcopy(model)
    for name, cut in cuts.items():
        if cut.out:
            layer = twin.get_submodule(name)
            mask = torch.ones(_out_channels(layer))
            mask[cut.out] = 0
            layer.register_forward_hook(_Mask(mask))
    return twin


class _Mask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # Channels are dimension 1, but the last one behind a linear or layer norm.
        last = isinstance(layer, nn.Linear | nn.LayerNorm)
        shape = (-1,) if last else (-1,) + (1,) * (output.dim() - 2)
        return output * self.mask.to(output).view(shape)


def _what_may_hide(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Numbers of a network that may be, or be near, zero, each tensor with the lower end of a range of width 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            ranges = {"running_mean": -0.5, "running_var": 0.5, "weight": 0.5, "bias": -0.5}
            for name, low in ranges.items():
                if isinstance(tensor := getattr(module, name, None), Tensor):
                    yield tensor, low
        elif not type(module).__module__.startswith("torch.nn"):  # ConvNeXt's layer_scale starts at 1e-6
            yield from ((parameter, 0.5) for parameter in module.parameters(recurse=False))


@torch.no_grad()
def exactness(model: nn.Module, cuts: Cuts, input_shape: tuple[int, ...], seed: int = 0) -> float:
    """The largest absolute difference between the masked twin's and the pruned model's outputs.

    Measured in float64 on random images, with the norms' statistics and affine parameters drawn at random, and the
    layers' scales where a network has some, so that a channel that should be gone cannot hide behind a zero; what
    remains is an error of the surgery, not rounding.

    Raises:
        UserError: the pruned model does not run: the plan breaks a dependency that tracing did not see.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = copy.deepcopy(model).cpu().double().eval()
    for tensor, low in _what_may_hide(dense):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    images = torch.randn(2, *input_shape, generator=generator).double()
    try:
        expected = masked_twin(dense, cuts)(images)
    except RuntimeError:
        # Some networks convert to float32 on their way; then rounding is part of what is measured.
        dense, images = dense.float(), images.float()
        expected = masked_twin(dense, cuts)(images)
    try:
        actual = apply_cuts(copy.deepcopy(dense), cuts)(images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pruned {type(model).__name__} does not run ({error}); name them in the variant's exclude"
        ) from error
    return float((expected - actual).abs().max())
