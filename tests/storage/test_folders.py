"""Tests of artifact folders in S3, with a real server and with a faulty one."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scop import UserError
from scop.storage import folders, s3
from scop.storage.cache import Cache
from scop.storage.checkpoints import Checkpoints
from scop.storage.fetch import fetch_file, fetch_tree
from scop.storage.files import delete_files, list_files, read_bytes, write_bytes
from scop.storage.folders import fetch_folder, is_complete, upload_folder
from scop.storage.manifest import MANIFEST, Manifest, read_folder, write_manifest
from tests.fakes import services


def artifact(folder: Path, **files: bytes) -> Path:
    """Write an artifact with a nested file and a file large enough for a multipart upload."""
    contents = {"small.bin": b"small", "large.bin": os.urandom(40 * 2**20), "deep/er.bin": b"deep"} | {
        f"{name}.bin": content for name, content in files.items()
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, "model")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in read_folder(folder).files}


def test_upload_and_fetch_round_trip(bucket: str, tmp_path: Path, cache: Cache) -> None:
    folder = artifact(tmp_path / "model")
    upload_folder(folder, f"{bucket}/runs/model")
    fetched = fetch_folder(f"{bucket}/runs/model/", cache, "model")
    assert bytes_of(fetched) == bytes_of(folder)
    assert read_folder(fetched) == read_folder(folder)
    with pytest.raises(UserError, match="holds a model, but a dataset is needed"):
        fetch_folder(f"{bucket}/runs/model", cache, "dataset")


def test_reuses_cached_content_unless_it_was_modified(bucket: str, tmp_path: Path, cache: Cache) -> None:
    folder = artifact(tmp_path / "model")
    upload_folder(folder, f"{bucket}/a")
    upload_folder(folder, f"{bucket}/b")
    first = fetch_folder(f"{bucket}/a", cache)
    delete_files(f"{bucket}/b", ["large.bin"])  # the cache already has this content
    assert fetch_folder(f"{bucket}/b", cache) == first
    (first / "small.bin").write_bytes(b"SMALL")
    assert bytes_of(fetch_folder(f"{bucket}/a", cache))["small.bin"] == b"small"


def test_replacing_a_folder_leaves_only_the_new_files(bucket: str, tmp_path: Path, cache: Cache) -> None:
    old, new = artifact(tmp_path / "old", more=b"1"), artifact(tmp_path / "new", more=b"22")
    uri = f"{bucket}/model"
    upload_folder(old, uri)
    upload_folder(new, uri)
    assert bytes_of(fetch_folder(uri, cache)) == bytes_of(new)
    # Files of the old folder alone are gone, and every file exists once.
    listed = list_files(uri)
    assert sum(name.startswith("large.bin") for name in listed) == 1
    assert sum(name.startswith("small.bin") for name in listed) == 1
    # Objects have the files' own names, so that other clients can fetch them.
    assert {*listed} == {MANIFEST, *read_folder(new).files}
    assert read_bytes(f"{uri}/large.bin") == (new / "large.bin").read_bytes()
    assert is_complete(uri)


def test_fetch_survives_a_concurrent_replacement(bucket: str, tmp_path: Path, monkeypatch, cache: Cache) -> None:
    uri, new = f"{bucket}/model", artifact(tmp_path / "new")
    upload_folder(artifact(tmp_path / "old"), uri)
    download = folders.download

    def download_after_a_replacement(*arguments):
        monkeypatch.setattr(folders, "download", download)
        upload_folder(new, uri)
        return download(*arguments)

    monkeypatch.setattr(folders, "download", download_after_a_replacement)
    assert bytes_of(fetch_folder(uri, cache)) == bytes_of(new)


def test_upload_keeps_artifacts_below_its_prefix(bucket: str, tmp_path: Path) -> None:
    outer, inner = f"{bucket}/exp", f"{bucket}/exp/plan/large.bin~0123456789ab"
    write_bytes(inner, b"inner")
    for number in (b"1", b"2"):
        upload_folder(artifact(tmp_path / number.decode(), more=number), outer)
    assert read_bytes(inner) == b"inner"


def test_reports_each_kind_of_failure_in_one_line(bucket: str, tmp_path: Path, monkeypatch, cache: Cache) -> None:
    folder = artifact(tmp_path / "model")
    upload_folder(folder, f"{bucket}/model")

    def failure(call, *arguments) -> str:
        with pytest.raises(UserError) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert re.match(r"bucket 'nowhere' does not exist at http://127", failure(fetch_folder, "s3://nowhere/x", cache))
    assert "bucket 'nowhere' does not exist" in failure(upload_folder, folder, "s3://nowhere/x")
    assert f"{bucket}/none holds no complete artifact" in failure(fetch_folder, f"{bucket}/none", cache)
    assert f"{bucket}/none does not exist" in failure(fetch_file, f"{bucket}/none", cache)
    assert f"{bucket}/none does not exist" in failure(fetch_tree, f"{bucket}/none", cache)
    assert "does not have the form s3://BUCKET/PREFIX" in failure(fetch_folder, "s3://", cache)
    assert "points outside its folder" in failure(fetch_tree, f"{bucket}/model/..", cache)

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.forget_client()
    assert "S3 refuses the credentials (SignatureDoesNotMatch" in failure(fetch_folder, f"{bucket}/model", cache)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    s3.forget_client()
    assert "no credentials for" in failure(fetch_folder, f"{bucket}/model", cache)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    s3.forget_client()
    assert "S3 cannot be used: The config profile (nobody)" in failure(fetch_folder, f"{bucket}/model", cache)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{services.free_port()}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "some-key-that-is-long")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3.forget_client()
    assert re.match(r"S3 at http://127\S+ cannot be reached", failure(fetch_folder, f"{bucket}/model", cache))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "C:evil", "a\\b", ""])
def test_rejects_file_names_outside_the_folder(name: str, bucket: str, tmp_path: Path, cache: Cache) -> None:
    entry = {"size": 4, "sha256": "0" * 64}
    manifest = {"format": 1, "kind": "model", "files": {name: entry}}
    write_bytes(f"{bucket}/evil/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="points outside its folder, which is refused"):
        fetch_folder(f"{bucket}/evil", cache)
    manifest["files"] = {"fine": entry | {"stored_as": name or "../x"}}
    write_bytes(f"{bucket}/evil/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="points outside its folder, which is refused"):
        fetch_folder(f"{bucket}/evil", cache)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / MANIFEST).write_text(json.dumps({"format": 1, "kind": "model", "files": {"../x": entry}}))
    with pytest.raises(UserError, match="points outside its folder, which is refused"):
        read_folder(tmp_path / "here")


def test_rejects_a_manifest_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        read_folder(tmp_path)


def test_is_complete_detects_a_modified_object(bucket: str, tmp_path: Path) -> None:
    upload_folder(artifact(tmp_path / "model"), f"{bucket}/model")
    assert is_complete(f"{bucket}/model")
    write_bytes(f"{bucket}/model/small.bin", b"smalL")  # same size
    assert not is_complete(f"{bucket}/model")


# -- a faulty server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults() -> Iterator[services.Faults]:
    with services.faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def shaky(faults: services.Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Faults]:
    for key, value in services.environment(faults.address).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("SCOP_CACHE", str(tmp_path / "cache"))
    s3.forget_client()
    faults.plan = lambda method, path: None
    s3.client().create_bucket(Bucket="bucket")
    for name in list_files("s3://bucket"):
        delete_files("s3://bucket", [name])
    faults.seen.clear()
    yield faults
    faults.plan = lambda method, path: None
    s3.forget_client()


def first(count: int, fault: str, method: str, part: str):
    """Return a plan that injects a fault into the first `count` matching requests."""
    left = [count]

    def plan(seen_method: str, path: str) -> str | None:
        if seen_method == method and part in path and left[0]:
            left[0] -= 1
            return fault
        return None

    return plan


ALWAYS = 10**9
URI = "s3://bucket/model"


def test_retries_after_two_server_errors(shaky: services.Faults, tmp_path: Path, cache: Cache) -> None:
    folder = artifact(tmp_path / "model")
    shaky.plan = first(2, "503", "PUT", "small.bin")
    upload_folder(folder, URI)
    shaky.plan = first(2, "503", "GET", "small.bin")
    assert bytes_of(fetch_folder(URI, cache)) == bytes_of(folder)
    assert sum(method == "GET" and "small.bin" in path for method, path in shaky.seen) == 3


def test_reports_a_server_that_keeps_failing(shaky: services.Faults, tmp_path: Path) -> None:
    shaky.plan = first(ALWAYS, "503", "PUT", "small.bin")
    with pytest.raises(UserError, match="fails with SlowDown on"):
        upload_folder(artifact(tmp_path / "model"), URI)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drop", "cannot be reached|failed"),
        ("503", "fails with SlowDown"),
        ("expired", "refuses the credentials \\(ExpiredToken"),
        ("denied", "access to .* is denied"),
    ],
)
def test_interrupted_upload_leaves_no_complete_artifact(
    fault: str, message: str, shaky: services.Faults, tmp_path: Path, cache: Cache
) -> None:
    # The credentials may expire between the first object and the last.
    shaky.plan = first(ALWAYS, fault, "PUT", "large.bin")
    with pytest.raises(UserError, match=message):
        upload_folder(artifact(tmp_path / "model"), URI)
    with pytest.raises(UserError, match="holds no complete artifact"):
        fetch_folder(URI, cache)


@pytest.mark.parametrize("part", ["large.bin", MANIFEST])
def test_interrupted_replacement_keeps_the_old_artifact(
    part: str, shaky: services.Faults, tmp_path: Path, cache: Cache
) -> None:
    old, new = artifact(tmp_path / "old"), artifact(tmp_path / "new")
    upload_folder(old, URI)
    shaky.plan = first(ALWAYS, "drop", "PUT", part)
    with pytest.raises(UserError, match="cannot be reached|failed"):
        upload_folder(new, URI)
    assert bytes_of(fetch_folder(URI, cache)) == bytes_of(old)
    shaky.plan = lambda method, path: None
    upload_folder(new, URI)
    assert bytes_of(fetch_folder(URI, cache)) == bytes_of(new)


@pytest.mark.parametrize("fault", ["truncate", "flip"])
def test_damaged_downloads_are_retried_or_reported(
    fault: str, shaky: services.Faults, tmp_path: Path, cache: Cache
) -> None:
    folder = artifact(tmp_path / "model")
    upload_folder(folder, URI)
    shaky.plan = first(1, fault, "GET", "small.bin")
    assert bytes_of(fetch_folder(URI, cache)) == bytes_of(folder)
    upload_folder(artifact(tmp_path / "other"), f"{URI}2")
    shaky.plan = first(ALWAYS, fault, "GET", "small.bin")
    with pytest.raises(UserError, match="wrong checksum|failed repeatedly"):
        fetch_folder(f"{URI}2", cache)
    assert not [path for path in (tmp_path / "cache" / "artifacts").iterdir() if path.name.startswith(".part")]


def test_upload_removes_leftovers_of_failed_attempts(shaky: services.Faults, tmp_path: Path) -> None:
    upload_folder(artifact(tmp_path / "old"), URI)
    new = artifact(tmp_path / "new")
    for _ in range(2):
        shaky.plan = first(ALWAYS, "denied", "PUT", MANIFEST)
        with pytest.raises(UserError):
            upload_folder(new, URI)
    shaky.plan = lambda method, path: None
    upload_folder(new, URI)
    manifest = Manifest.parse(read_bytes(f"{URI}/{MANIFEST}"), URI)
    assert set(list_files(URI)) == {MANIFEST} | {entry.key(name) for name, entry in manifest.files.items()}


def test_rejects_a_manifest_of_a_later_format(shaky: services.Faults, tmp_path: Path, cache: Cache) -> None:
    upload_folder(artifact(tmp_path / "model"), URI)
    manifest = json.loads(read_bytes(f"{URI}/{MANIFEST}")) | {"format": 99}
    write_bytes(f"{URI}/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="has format 99, and this version of scop reads format 1"):
        fetch_folder(URI, cache)


def test_rejects_an_object_that_does_not_match_its_manifest(
    shaky: services.Faults, tmp_path: Path, cache: Cache
) -> None:
    upload_folder(artifact(tmp_path / "model"), URI)
    for damaged in (b"smalL", b"small and more"):
        write_bytes(f"{URI}/small.bin", damaged)
        with pytest.raises(UserError, match="small.bin does not match its manifest \\(wrong checksum\\)"):
            fetch_folder(URI, cache)


def test_uploading_again_repairs_damaged_objects(shaky: services.Faults, tmp_path: Path, cache: Cache) -> None:
    folder = artifact(tmp_path / "model")
    upload_folder(folder, URI)
    write_bytes(f"{URI}/small.bin", b"smalL")
    delete_files(URI, ["deep/er.bin"])
    assert not is_complete(URI)
    upload_folder(folder, URI)
    assert is_complete(URI)
    assert bytes_of(fetch_folder(URI, cache)) == bytes_of(folder)


@pytest.mark.parametrize("fault", ["flip", "truncate"])
def test_skips_a_checkpoint_damaged_in_transfer(
    fault: str, shaky: services.Faults, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints("s3://bucket/checkpoints", "abc")
    for epoch in (1, 2):
        checkpoints.save({"epoch": epoch}, epoch)
    shaky.plan = first(1, fault, "GET", "00002-00000000.pt")
    assert checkpoints.load() == {"epoch": 2}  # retried
    shaky.plan = first(ALWAYS, fault, "GET", "00002-00000000.pt")
    assert checkpoints.load() == {"epoch": 1}
    assert "00002-00000000.pt is skipped" in capsys.readouterr().out


def test_rejects_a_missing_or_truncated_manifest(shaky: services.Faults, tmp_path: Path, cache: Cache) -> None:
    upload_folder(artifact(tmp_path / "model"), URI)
    manifest = read_bytes(f"{URI}/{MANIFEST}")
    delete_files(URI, [MANIFEST])
    with pytest.raises(UserError, match=f"holds no complete artifact \\(it has no {MANIFEST}\\)"):
        fetch_folder(URI, cache)
    write_bytes(f"{URI}/{MANIFEST}", manifest[: len(manifest) // 2])
    with pytest.raises(UserError, match="is damaged"):
        fetch_folder(URI, cache)
    assert Manifest.model_validate_json(manifest).kind == "model"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("expired", r"S3 refuses the credentials \(ExpiredToken: .*renew AWS_ACCESS_KEY_ID"),
        (
            "denied",
            r"access to s3://bucket/model/manifest.json is denied \(GetObject\); grant these credentials access",
        ),
        ("elsewhere", r"bucket 'bucket' is not in region 'us-east-1' \(Auth.*\); set AWS_REGION=eu-west-1"),
    ],
)
def test_access_errors_say_what_to_fix(
    fault: str, message: str, shaky: services.Faults, tmp_path: Path, cache: Cache
) -> None:
    upload_folder(artifact(tmp_path / "model"), URI)
    shaky.plan = first(ALWAYS, fault, "GET", "")
    with pytest.raises(UserError, match=message):
        fetch_folder(URI, cache)
