"""Models on disk: `model.safetensors` for the weights, `model.json` for the rest, and a manifest. No pickle.

A pruned model is rebuilt from its factory, its cuts and its weights; neither the dense weights nor the plan's data are
needed.
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

from scop.errors import UserError
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
        model: a network made by `scop.make_model`, `scop.prune` or `scop.load_model`, or any other with `factory`.
        folder: is created; what it holds of a model is replaced.
        factory, arguments: how to build the dense network, where the model does not carry that itself.
        history: the epochs of its training, for reports.
        device: where it was trained, for them too.
        others: further files, in the folder already, that belong to the model.

    Raises:
        UserError: nothing tells how to build the network again, its factory cannot be imported, or the folder cannot be
            written.
    """
    spec = spec_of(model)
    if factory is not None:
        spec = (spec or ModelSpec()).model_copy(update={"factory": factory, "arguments": dict(arguments or {})})
    if spec is None or spec.factory is None:
        raise UserError(
            f"save_model cannot tell how to build this {type(model).__name__} again: make it by scop.make_model(NAME), "
            "or say save_model(..., factory='package.module:function', arguments={...})"
        )
    find_factory(spec.factory)  # better refused now than when it is to be loaded
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # While it is being written it is not whole; and an older model's history is not this one's.
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
    """Copies of tensors that share memory (tied weights), which safetensors does not store."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        result[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def load_model(folder: str | Path) -> nn.Module:
    """Build the model of a folder, in eval mode on the CPU; `scop.pruning.spec.spec_of` tells what it is.

    It calls the factory that `model.json` names, which may be any function that can be imported: as code, a folder has
    to come from somebody whom one trusts. `model.onnx` and `model.pt2` need no factory.

    Raises:
        UserError: the folder is not a whole model, or its factory is gone or has changed.
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
    """Load a state dict from a .safetensors file or one that torch.save made, into the model.

    A leading ``module.`` (DataParallel) is stripped; a state dict under the key ``state_dict`` or ``model`` is found.

    Raises:
        UserError: the file is missing, damaged or unsafe, or its keys or shapes are not the model's.
    """
    _assign(model, _read_state(Path(path)), Path(path))


def load_pretrained(model: nn.Module, path: str | Path, classes: int) -> list[str]:
    """Load weights from which training is to start, into the model; see `load_weights`.

    Args:
        model: with a last layer for so many classes.
        path: of the file.
        classes: the size of the model's answer.

    Returns:
        The names of the layers that the file has for another number of classes; they stay as they are.

    Raises:
        UserError: the file is missing, damaged or unsafe, or does not fit in more than that.
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
        raise UserError(f"weights {path} are damaged or no safetensors file: {error}") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"weights {path} are no state dict that can be loaded without pickled code: {reason}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights {path} hold no state dict (a mapping of names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _assign(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    # Files written before PyTorch 0.4.1 lack these counters, which nothing needs.
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing, extra = sorted(own.keys() - state.keys() - counters), sorted(state.keys() - own.keys())
    if missing or extra:
        near = difflib.get_close_matches((missing or extra)[0], extra if missing else list(own), n=1)
        raise UserError(
            f"weights {path} do not fit the model: "
            + "; ".join(
                f"{what} {len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("missing", missing), ("unknown", extra))
                if keys
            )
            + (f"; {near[0]!r} looks alike" if near else "")
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            ours, theirs = "x".join(map(str, own[key].shape)), "x".join(map(str, value.shape))
            raise UserError(
                f"weights {path} do not fit the model: {key!r} is {theirs}, the model's is {ours} (weights for other "
                "classes can be trained on: dense.pretrained)"
            )
    model.load_state_dict(state, strict=False)


def load_surgery(folder: Path) -> dict[str, float]:
    """What fine-tuning recorded of the surgery; raises UserError where the folder's model was not pruned by it."""
    path = folder / SURGERY
    if not path.is_file():
        raise UserError(f"{folder} holds no pruned model (there is no {SURGERY}); give the output of finetune")
    figures: dict[str, float] = json.loads(path.read_text())
    return figures


def save_settings(folder: Path, *made_of: Path, **sections: Mapping[str, Any]) -> None:
    """Write down the sections by which an artifact was made, with those of the artifacts that it was made of."""
    settings: dict[str, Any] = {}
    for ancestor in made_of:
        settings |= load_settings(ancestor)
    settings |= sections
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def load_settings(folder: Path) -> dict[str, Any]:
    """The sections by which an artifact was made, by name; empty where that was not written down."""
    path = folder / SETTINGS
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings
