"""Channel scores with their standard errors, and the file that stores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scop.config import ScoreKind
from scop.errors import UserError
from scop.models.history import EpochRecord

_FORMAT = "2"
_PARTS = ("score", "error", "signed", "gate")


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """The result of the knockoff phase, as a mapping from layers to scores. Channels with low scores are removed.

    All tensors are float32 (channels,), on the CPU.

    Attributes:
        score: layer -> scores.
        error: layer -> standard errors of the scores over images; for trained gates, the standard deviation over the
            last half of the epochs.
        signed: layer -> W, the statistic of the knockoff filter, antisymmetric under swapping real and knockoff: the
            decrease of the loss when a gate opens, in standard errors; for trained gates, the score itself.
        gate: layer -> gates, in [0, 1].
        kind: ``fisher``, whose scores refer to one loss and are comparable between layers, or ``published``.
        input_shape: (C, H, W) of the images.
        history: records of the epochs.
    """

    score: dict[str, Tensor]
    error: dict[str, Tensor]
    signed: dict[str, Tensor]
    gate: dict[str, Tensor]
    kind: ScoreKind
    input_shape: tuple[int, int, int]
    history: list[EpochRecord] = field(default_factory=list)

    def __getitem__(self, layer: str) -> Tensor:
        return self.score[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.score)

    def __len__(self) -> int:
        return len(self.score)

    def save(self, path: Path) -> None:
        """Write everything except the history to a safetensors file."""
        tensors = {f"{part}/{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}
        # A single entry, since several are written in arbitrary order and equal scores must give equal files.
        save_file(tensors, path, metadata={"scores": f"{_FORMAT} {self.kind} {'x'.join(map(str, self.input_shape))}"})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read a file that `save` wrote; the history is empty. Raises UserError if the file holds no such scores."""
        try:
            with safe_open(path, "pt") as file:
                version, _, described = (file.metadata() or {}).get("scores", "").partition(" ")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} holds no scores of the knockoff phase: {error}") from error
        kind, _, shape = described.partition(" ")
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, _, layer = key.partition("/")
            parts.setdefault(part, {})[layer] = tensor
        same = all(part.keys() == parts["score"].keys() for part in parts.values())
        if version != _FORMAT or parts.keys() != set(_PARTS) or not same or kind not in get_args(ScoreKind):
            raise UserError(f"{path} holds scores from another version of scop; run the knockoff phase again")
        channels, height, width = map(int, shape.split("x"))
        return cls(**parts, kind=kind, input_shape=(channels, height, width))  # type: ignore[arg-type]
