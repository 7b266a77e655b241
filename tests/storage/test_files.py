"""Tests of S3 URIs as data, weights, inputs and outputs of steps, with a real server."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines.cli.main import main
from scop import UserError, load_model
from scop.data.dataset import load_dataset
from scop.storage import fetch, s3
from scop.storage.cache import Cache
from scop.storage.fetch import content_version, fetch_file, fetch_tree
from scop.storage.files import list_files, read_bytes, read_if_exists, write_bytes
from scop.storage.folders import fetch_folder, upload_folder
from scop.storage.manifest import MANIFEST
from tests.fakes import services
from tests.helpers import ROOT, TINY, run_step, write_images


def test_rejects_a_tree_that_changes_while_it_is_fetched(
    bucket: str, monkeypatch: pytest.MonkeyPatch, cache: Cache
) -> None:
    for name in ("a.bin", "b.bin"):
        write_bytes(f"{bucket}/images/{name}", b"old")
    download = fetch.download

    def download_after_a_change(*arguments):
        write_bytes(f"{bucket}/images/b.bin", b"new")
        return download(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "download", download_after_a_change)
        with pytest.raises(UserError, match="images changed while it was fetched; try again"):
            fetch_tree(f"{bucket}/images", cache)
    tree = fetch_tree(f"{bucket}/images", cache)
    assert [(tree / name).read_bytes() for name in ("a.bin", "b.bin")] == [b"old", b"new"]


def test_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(str(tmp_path / "taken"), b"a checkpoint")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_select_dry_run_reads_images_from_s3(bucket: str, tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "images", {"train": 2, "test": 1}, ["ant", "bee"])
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    write_bytes(f"{bucket}/images.zip", Path(archive).read_bytes())
    data = f"data={{source: imagefolder, path: {bucket}/images.zip}}"
    assert main(["select", "--dry-run", "-f", "digits-resnet20", "--set", data]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_ignores_folder_markers_of_the_aws_console(bucket: str, monkeypatch: pytest.MonkeyPatch, cache: Cache) -> None:
    write_bytes(f"{bucket}/pictures/ant/1.png", b"image")
    # The test server stores objects as files, so an object cannot have the name of a folder.
    found = fetch.list_objects
    marker = {"": {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"', "Size": 0}}
    monkeypatch.setattr(fetch, "list_objects", lambda source: marker | found(source))
    folder = fetch_tree(f"{bucket}/pictures", cache)
    assert [path.name for path in folder.rglob("*")] == ["ant", "1.png"]


def test_steps_accept_s3_uris_for_data_weights_inputs_and_outputs(
    bucket: str, model_folder: Path, tmp_path: Path, trained, cache: Cache
) -> None:
    write_images(tmp_path / "images", {"train": 40, "test": 10}, ["ant", "bee"])
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        for split in ("train", "test"):
            archive.add(tmp_path / "images" / split, split)
    write_bytes(f"{bucket}/data/images.tar.gz", (tmp_path / "images.tar.gz").read_bytes())
    for file in (tmp_path / "images").rglob("*.png"):
        write_bytes(f"{bucket}/data/tree/{file.relative_to(tmp_path / 'images')}", file.read_bytes())
    contents = []
    for path in ("images.tar.gz", "tree"):
        data = {"source": "imagefolder", "path": f"{bucket}/data/{path}", "validation": 0.2, "channels": 1}
        run_step("prepare_data", {"data": data}, {}, {"dataset": f"{bucket}/out/{path}"})
        contents.append(load_dataset(fetch_folder(f"{bucket}/out/{path}", cache, "dataset")).info)
    assert [info.source for info in contents] == ["images.tar.gz", "tree"]
    assert contents[0].content == contents[1].content

    write_bytes(f"{bucket}/weights.safetensors", (model_folder / "model.safetensors").read_bytes())
    digits = f"{bucket}/digits"
    run_step("prepare_data", {"data": {}}, {}, {"dataset": digits})
    dense = TINY | {"weights": f"{bucket}/weights.safetensors"}
    run_step("train_dense", {"dense": dense}, {"dataset": digits}, {"model": f"{bucket}/dense"})
    loaded = load_model(fetch_folder(f"{bucket}/dense", cache))
    assert all((value == trained.state_dict()[key]).all() for key, value in loaded.state_dict().items())
    record = json.loads(read_bytes(f"{bucket}/dense/step.json"))
    assert record["inputs"]["dataset"]["uri"] == digits
    assert record["config"]["dense"]["weights"] == f"{bucket}/weights.safetensors"
    assert record["outputs"]["model"]["files"].keys() == {
        "model.safetensors", "model.json", "history.json", "settings.json", "timings.json"
    }  # fmt: skip
    with pytest.raises(UserError, match="overlaps with"):
        run_step("train_dense", {"dense": dense}, {"dataset": digits}, {"model": f"{digits}/inside"})


def test_record_of_a_failed_step_contains_no_secret(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is"):
        run_step("prepare_data", {"data": {}}, {}, {"dataset": f"{bucket}/digits"})
        dense = TINY | {"lr": 1e30, "epochs": 2}
        run_step("train_dense", {"dense": dense}, {"dataset": f"{bucket}/digits"}, {"model": f"{bucket}/dense"})
    text = read_bytes(f"{bucket}/dense/step.json").decode()
    record = json.loads(text)
    assert (record["status"], record["step"]) == ("failed", "train_dense")
    assert record["config"]["dense"]["lr"] == 1e30
    assert services.SECRET not in text and services.KEY not in text
    assert read_if_exists(f"{bucket}/dense/{MANIFEST}") is None


def test_cli_reports_an_s3_error_in_one_line(bucket: str) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", "--input", "dataset=s3://nowhere/data"]
    result = subprocess.run([*command, "--output", f"model={bucket}/m"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("scop: error: bucket 'nowhere' does not exist")
    assert result.stderr.count("\n") == 1


def test_fetches_modified_cache_entries_again(bucket: str, cache: Cache) -> None:
    write_bytes(f"{bucket}/weights.pt", b"weights")
    cached = fetch_file(f"{bucket}/weights.pt", cache)
    cached.write_bytes(b"changed")
    assert fetch_file(f"{bucket}/weights.pt", cache).read_bytes() == b"weights"
    write_bytes(f"{bucket}/images/a.bin", b"image")
    tree = fetch_tree(f"{bucket}/images", cache)
    (tree / "a.bin").write_bytes(b"changed")
    assert (fetch_tree(f"{bucket}/images", cache) / "a.bin").read_bytes() == b"image"


def test_writes_a_record_if_an_input_cannot_be_fetched(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete artifact"):
        run_step("train_dense", {"dense": {}}, {"dataset": f"{bucket}/none"}, {"model": f"{bucket}/model"})
    record = json.loads(read_bytes(f"{bucket}/model/step.json"))
    assert (record["status"], record["inputs"]["dataset"]["uri"]) == ("failed", f"{bucket}/none")
    assert "holds no complete artifact" in record["error"]


def test_refuses_invalid_outputs_and_settings(
    bucket: str, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_folder(digits_folder, f"{bucket}/digits")
    before = list_files(bucket)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="overlaps with"):
        run_step("train_dense", {"dense": TINY}, {"dataset": f"{bucket}/digits"}, {"model": f"{bucket}/digits"})
    assert list_files(bucket) == before  # no record either
    monkeypatch.setenv("SCOP_KEEP_CHECKPOINTS", "0")
    with pytest.raises(UserError, match="SCOP_KEEP_CHECKPOINTS"):
        run_step("train_dense", {"dense": TINY}, {"dataset": f"{bucket}/digits"}, {"model": f"{bucket}/model"})
    assert list_files(bucket) == before
    monkeypatch.delenv("SCOP_KEEP_CHECKPOINTS")
    with pytest.raises(UserError, match="gs://bucket/model is neither a path nor an s3:// URI"):
        run_step("train_dense", {"dense": TINY}, {"dataset": f"{bucket}/digits"}, {"model": "gs://bucket/model"})
    assert list_files(bucket) == before
    assert not list(tmp_path.rglob("step.json"))


def test_content_version_accepts_dangling_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert content_version(str(tmp_path)) is not None


def test_an_aws_profile_is_exported_as_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        "[profile dev]\nregion = eu-west-3\nendpoint_url = https://s3.example:9000\n"
        "aws_access_key_id = dev-key\naws_secret_access_key = dev-secret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "dev")
    s3.forget_client()
    assert s3.s3_variables() == {
        "AWS_ACCESS_KEY_ID": "dev-key",
        "AWS_SECRET_ACCESS_KEY": "dev-secret",
        "AWS_REGION": "eu-west-3",
        "AWS_ENDPOINT_URL_S3": "https://s3.example:9000",
    }
    s3.forget_client()
