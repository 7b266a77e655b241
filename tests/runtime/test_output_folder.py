"""Output folders: a step replaces only its own files."""

import json
from pathlib import Path

import pytest

from scop import UserError, load_model
from scop.storage.manifest import MANIFEST
from tests.helpers import train_tiny


def test_rejects_a_folder_with_other_files(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex', which no step has written"):
        train_tiny(digits_folder, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("comment", ["", "// of the wizard\n"])
@pytest.mark.parametrize("text", ['{"name": "my app", "step": ["first", "second"]}', '{"step": "export", "next": "/"}'])
@pytest.mark.parametrize("name", [MANIFEST, "step.json"])
def test_files_of_other_programs_with_the_same_names_are_not_replaced(
    name: str, text: str, comment: str, digits_folder: Path, tmp_path: Path
) -> None:
    for own in (name, "icon.png", "index.html", "weights.pt"):
        (tmp_path / own).write_text(comment + text)
    with pytest.raises(UserError, match="holds 'icon.png', which no step has written"):
        train_tiny(digits_folder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_replaces_an_output_with_a_truncated_record(digits_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "dense"
    train_tiny(digits_folder, output)
    (output / MANIFEST).unlink()
    record = output / "step.json"
    record.write_bytes(record.read_bytes()[:100])
    train_tiny(digits_folder, output)
    assert load_model(output) is not None
    assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("name", ["notes.json", "figure.png", "mine.safetensors"])
def test_rejects_a_folder_with_other_files_beside_the_artifact(name: str, digits_folder: Path, tmp_path: Path) -> None:
    train_tiny(digits_folder, tmp_path / "dense")
    (tmp_path / "dense" / name).write_text("years of work")
    with pytest.raises(UserError, match=f"holds '{name}', which no step has written; move it away"):
        train_tiny(digits_folder, tmp_path / "dense")
    assert load_model(tmp_path / "dense") is not None
    (tmp_path / "dense" / name).unlink()
    (tmp_path / "dense" / ".step.json.17.part").write_text("{")  # left by a killed step
    train_tiny(digits_folder, tmp_path / "dense")
    assert not (tmp_path / "dense" / ".step.json.17.part").exists()


def test_names_an_output_that_cannot_be_written(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder .*file/model cannot be written"):
        train_tiny(digits_folder, tmp_path / "file" / "model")
    with pytest.raises(UserError, match="output folder /proc/model cannot be written"):
        train_tiny(digits_folder, Path("/proc/model"))


def test_rejects_an_output_that_overlaps_with_an_input(digits_folder: Path, tmp_path: Path) -> None:
    train_tiny(digits_folder, tmp_path / "dense")
    for output in (digits_folder, digits_folder / "inside", digits_folder.parent):
        with pytest.raises(UserError, match="overlaps with"):
            train_tiny(digits_folder, output)
    assert (digits_folder / MANIFEST).exists()
    (tmp_path / "dense" / "notes").mkdir()
    with pytest.raises(UserError, match="holds 'notes', which no step has written"):
        train_tiny(digits_folder, tmp_path / "dense")
    assert load_model(tmp_path / "dense") is not None
