"""Export to ONNX and to PyTorch's .pt2; each file is loaded again and compared with the original model."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

INPUT, OUTPUT = "images", "logits"


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Trace a float32 copy of a network with a dynamic batch size, for both exports.

    The graph's stack traces, which name source files of this machine, are removed.

    Args:
        model: the network.
        images: normalised images (B, C, H, W), with B at least 2.
    """
    model = _prepared(model)
    with _quiet():
        batch = {_argument(model): {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(model, (images,), dynamic_shapes=batch)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def export_onnx(model: nn.Module, images: Tensor, path: Path, program: ExportedProgram | None = None) -> float:
    """Write an ONNX file with a dynamic batch size, run it in onnxruntime and compare the logits.

    Args:
        model: the network; a float32 copy is exported.
        images: normalised images (B, C, H, W) for the comparison, with B at least 2.
        path: the file to write; it includes the weights.
        program: result of `trace`, if there is one already.

    Returns:
        The largest difference between the logits of PyTorch and onnxruntime, as defined by `logit_difference`.
    """
    import onnxruntime

    model = _prepared(model)
    program = program or trace(model, images)
    with _quiet():
        exported = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT])
    assert exported is not None
    exported.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _largest_difference(
        model, images, lambda part: torch.from_numpy(session.run(None, {INPUT: part.numpy()})[0])
    )


def export_pt2(model: nn.Module, images: Tensor, path: Path, program: ExportedProgram | None = None) -> float:
    """Write a .pt2 file with a dynamic batch size, load it and compare; arguments and result as for `export_onnx`."""
    model = _prepared(model)
    program = program or trace(model, images)
    with _quiet():
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    return _largest_difference(model, images, loaded)


def _prepared(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)


def _argument(model: nn.Module) -> str:
    """Return the name of the forward's first argument, needed to declare its batch dimension dynamic."""
    import inspect

    return next(iter(inspect.signature(model.forward).parameters))


def logit_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest absolute difference between two networks' logits, a scalar; NaN if any logit is NaN.

    If the largest logit of `one` exceeds 1, the difference is relative to it, since rounding errors grow with the
    values.
    """
    # Unlike Python's max, torch's propagates NaN.
    return (one - other).abs().max() / one.abs().max().clamp(min=1)


@torch.inference_mode()
def _largest_difference(model: nn.Module, images: Tensor, other) -> float:  # type: ignore[no-untyped-def]
    """Compare on the whole batch and on its first image alone, to check that the batch size is dynamic."""
    return float(torch.stack([logit_difference(model(part), other(part)) for part in (images, images[:1])]).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporters' progress output and warnings, which say nothing about the result."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
