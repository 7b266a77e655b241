"""Models on disk: weights in `model.safetensors`, the description in `model.json`, and a manifest. No pickle.

A pruned model is rebuilt from its factory, cuts and weights, without the dense weights.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scop.errors import UserError, first_line
from scop.models.factories import find_factory, make_model
from scop.models.history import HISTORY, EpochRecord, save_history
from scop.pruning.cuts import apply_cuts
from scop.pruning.spec import ModelSpec, attach_spec, spec_of
from scop.storage.manifest import MANIFEST, TIMINGS, read_folder, write_manifest

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
SURGERY = "surgery.json"
SETTINGS = "settings.json"


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    history: list[EpochRecord] | None = None,
    device: torch.device | None = None,
    others: Sequence[str] = (),
) -> None:
    """Write a model folder.

    Args:
        model: a network made by `scop.make_model`, `scop.prune` or `scop.load_model`, or any other network if `factory`
            is given.
        folder: created if missing; an earlier model in it is replaced.
        factory: function that builds the dense network; by default that of the model's spec.
        arguments: keyword arguments of the factory.
        history: records of the training epochs, for reports.
        device: device of the training, for reports.
        others: names of other files in the folder that belong to the model.

    Raises:
        UserError: the factory is unknown or cannot be imported, or the folder cannot be written.
    """
    spec = spec_of(model)
    if factory is not None:
        spec = (spec or ModelSpec()).model_copy(update={"factory": factory, "arguments": dict(arguments or {})})
    if spec is None or spec.factory is None:
        raise UserError(
            f"save_model needs the factory of this {type(model).__name__}: build the model with scop.make_model(NAME), "
            "or call save_model(..., factory='package.module:function', arguments={...})"
        )
    find_factory(spec.factory)  # fails now rather than when the model is loaded
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without its manifest, a half-written folder counts as incomplete. The old history belongs to another model.
        for name in (MANIFEST, HISTORY, TIMINGS):
            (folder / name).unlink(missing_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        save_file(_unshared(state), folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(spec.model_dump_json(indent=1) + "\n")
        if history is not None:
            save_history(history, folder, device)
        write_manifest(folder, "model", (WEIGHTS, DESCRIPTION, HISTORY, TIMINGS, *others))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write model folder {folder}: {getattr(error, 'strerror', None) or error}") from error


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with another one (tied weights): safetensors refuses to store them."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        result[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def load_model(folder: str | Path) -> nn.Module:
    """Load a model from a folder, in eval mode on the CPU; `scop.pruning.spec.spec_of` returns its description.

    This calls the factory that `model.json` names, which can be any importable function. As with code, load only
    folders from sources that you trust. `model.onnx` and `model.pt2` need no factory.

    Raises:
        UserError: the folder is not a complete model, or its factory is missing or has changed.
    """
    folder = Path(folder)
    read_folder(folder, kind="model")
    try:
        spec = ModelSpec.model_validate_json((folder / DESCRIPTION).read_text())
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / DESCRIPTION} does not describe a model") from error
    if spec.factory is None:
        raise UserError(f"{folder / DESCRIPTION} names no factory")
    model = apply_cuts(make_model(spec.factory, **spec.arguments), spec.cuts)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from error
    _assign(model, state, folder / WEIGHTS)
    return attach_spec(model, spec).eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into the model, from a .safetensors file or a file written by ``torch.save``.

    A leading ``module.`` (DataParallel) is stripped. The state dict may be nested under the key ``state_dict`` or
    ``model``.

    Raises:
        UserError: the file is missing, damaged or unsafe, or its keys or shapes do not match the model.
    """
    _assign(model, _read_state(Path(path)), Path(path))


def load_pretrained(model: nn.Module, path: str | Path, classes: int) -> list[str]:
    """Load weights into the model as the starting point of training; the file's number of classes may differ.

    Args:
        model: the network, with `classes` outputs.
        path: the weights file, as for `load_weights`.
        classes: number of classes of the model.

    Returns:
        The names of the layers that have another number of classes in the file; these layers keep their weights.

    Raises:
        UserError: the file is missing, damaged or unsafe, or differs from the model in more than the number of classes.
    """
    state, own = _read_state(Path(path)), model.state_dict()
    of_the_head = {key for key, mine in own.items() if mine.dim() and len(mine) == classes}
    others = {
        key: own[key]
        for key in of_the_head & state.keys()
        if len(state[key]) != classes and state[key].shape[1:] == own[key].shape[1:]
    }
    _assign(model, state | others, Path(path))
    return sorted({key.rpartition(".")[0] for key in others})


def _read_state(path: Path) -> dict[str, Tensor]:
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"weights {path} do not exist")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"weights {path} are damaged or not a safetensors file: {error}") from error
    except Exception as error:
        raise UserError(
            f"weights {path} cannot be loaded with torch.load(weights_only=True): {first_line(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights {path} contain no state dict (a mapping of names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _assign(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    # Files written before PyTorch 0.4.1 lack these counters. Nothing here uses them.
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing, extra = sorted(own.keys() - state.keys() - counters), sorted(state.keys() - own.keys())
    if missing or extra:
        near = difflib.get_close_matches((missing or extra)[0], extra if missing else list(own), n=1)
        raise UserError(
            f"weights {path} do not match the model: "
            + "; ".join(
                f"{what} keys ({len(keys)}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                for what, keys in (("missing", missing), ("unknown", extra))
                if keys
            )
            + (f"; closest name: {near[0]!r}" if near else "")
        )
    if differing := [key for key, value in state.items() if value.shape != own[key].shape]:
        key = differing[0]
        ours, theirs = "x".join(map(str, own[key].shape)), "x".join(map(str, state[key].shape))
        # Another number of classes changes only the outputs of one layer, the head.
        only_outputs = all(state[name].shape[1:] == own[name].shape[1:] for name in differing)
        one_layer = len({name.rpartition(".")[0] for name in differing}) == 1
        hint = " (to start from weights for another number of classes, use dense.pretrained)"
        raise UserError(
            f"weights {path} do not match the model: {key!r} has shape {theirs} in the file and {ours} in the model"
            + (hint if only_outputs and one_layer else "")
        )
    model.load_state_dict(state, strict=False)


def load_surgery(folder: Path) -> dict[str, float]:
    """Return the figures of the surgery that fine-tuning wrote to a model folder.

    Raises:
        UserError: the folder has no such record, so it is not the output of fine-tuning.
    """
    path = folder / SURGERY
    if not path.is_file():
        raise UserError(f"{folder} holds no pruned model ({SURGERY} is missing); use the output of finetune")
    figures: dict[str, float] = json.loads(path.read_text())
    return figures


def save_settings(folder: Path, *made_of: Path, **sections: Mapping[str, Any]) -> None:
    """Record the settings that produced an artifact, together with those of the artifacts in `made_of`."""
    settings: dict[str, Any] = {}
    for ancestor in made_of:
        settings |= load_settings(ancestor)
    settings |= sections
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def load_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that produced an artifact, by section name; empty if none were recorded."""
    path = folder / SETTINGS
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings
