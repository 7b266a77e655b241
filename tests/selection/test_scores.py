"""Scores: their file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scop import UserError
from scop.selection.scores import Scores


def test_scores_round_trip_and_reject_other_versions(tmp_path: Path) -> None:
    parts = [{"a.b": torch.rand(3)} for _ in range(4)]
    scores = Scores(*parts, kind="fisher", input_shape=(3, 8, 9))
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    for part, kind in zip(parts, ("score", "error", "signed", "gate"), strict=True):
        assert torch.equal(getattr(again, kind)["a.b"], part["a.b"])
    assert again.input_shape == (3, 8, 9)
    assert again.kind == "fisher"
    squares = {f"{part}/a": torch.rand(3) for part in ("score", "error", "signed", "gate")}
    save_file(squares, tmp_path / "squares", metadata={"scores": "fisher 3x8x9"})
    save_file({"gate/a": torch.rand(3), "gamma/a": torch.rand(3)}, tmp_path / "old", metadata={"input_shape": "1x2x3"})
    with pytest.raises(UserError, match="another version of scop; run the knockoff phase again"):
        Scores.load(tmp_path / "squares")
    with pytest.raises(UserError, match="another version of scop; run the knockoff phase again"):
        Scores.load(tmp_path / "old")
