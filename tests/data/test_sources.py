"""Sources of images: folders, archives and CIFAR."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from scop import UserError
from scop.config import DataSection
from scop.data.sources import load_source, peek
from tests.helpers import SHARED, write_images

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    write_images(root, {"train": 10, "test": 4}, CLASSES)
    return root


def section(path: Path, **settings: object) -> DataSection:
    return DataSection.model_validate({"source": "imagefolder", "path": str(path), "validation": 0.2} | settings)


def packed(folder: Path, kind: str) -> Path:
    if kind == "folder":
        return folder
    path = folder.with_suffix(f".{kind}")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
            archive.add(folder, "images")
    return path


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
def test_reads_the_same_images_from_folders_and_archives(folder: Path, kind: str) -> None:
    dataset = load_source(section(packed(folder, kind)))
    assert dataset.info.classes == CLASSES
    assert dataset.info.counts == {"train": 24, "validation": 6, "test": 12}
    assert dataset.info.shape == (3, 8, 8)
    # Each image carries its label as a bright row.
    for split in ("train", "validation", "test"):
        rows = dataset[split].images[:, 0].mean(axis=2).argmax(axis=1)
        assert np.array_equal(rows, dataset[split].labels)


def test_converts_images_to_the_configured_size_and_channels(folder: Path) -> None:
    assert load_source(section(folder, image_size=4, channels=1)).info.shape == (1, 4, 4)


def test_reads_16_bit_and_rotated_images_as_displayed(tmp_path: Path) -> None:
    from PIL import Image

    write_images(tmp_path, {"train": 2, "test": 2}, CLASSES)
    deep = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "train" / "ant" / "deep.png")
    rotated = Image.new("RGB", (8, 8))
    rotated.paste((255, 255, 255), (0, 0, 8, 1))  # a bright first row; the orientation turns it upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    rotated.save(tmp_path / "train" / "ant" / "turned.png", exif=exif)
    images = load_source(section(tmp_path, validation=0))["train"].images
    by_name = dict(zip(["0000", "0001", "deep", "turned"], images, strict=False))
    assert np.abs(by_name["deep"][0].astype(int) - deep // 256).max() <= 1
    assert by_name["turned"][0, -1].min() > 200
    assert by_name["turned"][0, 0].max() < 50


def test_input_shape_follows_the_exif_orientation(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (12, 8)).save(tmp_path / name / f"{number}.jpg", exif=exif)
    assert load_source(section(tmp_path)).info.shape == (3, 12, 8)
    assert peek(section(tmp_path)) == ((3, 12, 8), 3)


def test_follows_links_to_classes_but_not_link_cycles(folder: Path, tmp_path: Path) -> None:
    away = tmp_path / "large disk" / "cat"
    away.parent.mkdir()
    (folder / "train" / "cat").rename(away)
    (folder / "train" / "cat").symlink_to(away)
    (away / "up").symlink_to(folder)
    assert load_source(section(folder)).info.counts == {"train": 24, "validation": 6, "test": 12}


def test_rejects_images_that_are_neither_jpeg_nor_png(folder: Path) -> None:
    other = (folder / "train" / "cat" / "0003.png").rename(folder / "train" / "cat" / "0003.webp")
    with pytest.raises(UserError, match=r"image 'train/cat/0003\.webp' is neither JPEG nor PNG"):
        load_source(section(folder))
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        archive.write(other, "train/cat/0003.webp")
    with pytest.raises(UserError, match=r"image 'train/cat/0003\.webp' is neither JPEG nor PNG"):
        load_source(section(folder.with_suffix(".zip")))
    other.unlink()
    assert load_source(section(folder)).info.counts["train"] == 24 - 1


def test_rejects_colour_images_if_the_first_one_is_grey(folder: Path) -> None:
    from PIL import Image

    first = folder / "test" / "ant" / "0000.png"
    Image.open(first).convert("L").save(first)
    with pytest.raises(UserError, match=r"image 'test/ant/0001\.png' has colour but the first one is grey; set data"):
        load_source(section(folder))
    assert load_source(section(folder, channels=3)).info.shape == (3, 8, 8)
    assert load_source(section(folder, channels=1)).info.shape == (1, 8, 8)


def test_rejects_names_that_are_not_utf_8(tmp_path: Path, folder: Path) -> None:
    member = tarfile.TarInfo(b"train/gar\xe7on/1.png".decode("utf-8", "surrogateescape"))
    image = (folder / "test" / "ant" / "0000.png").read_bytes()
    member.size = len(image)
    with tarfile.open(tmp_path / "old.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(image))
    with pytest.raises(UserError, match=r"the name 'train/gar\\udce7on/1\.png' is not in UTF-8; rename it"):
        load_source(section(tmp_path / "old.tar"))


def test_ignores_macos_metadata_in_archives(folder: Path) -> None:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
            archive.writestr(f"__MACOSX/{file.relative_to(folder).parent}/._{file.name}", b"shadow")
    assert load_source(section(folder.with_suffix(".zip"))).info.counts["test"] == 12


def test_small_classes_have_images_in_both_splits(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 3, "test": 1}, CLASSES)
    assert load_source(section(tmp_path, validation=0.1)).info.counts == {"train": 6, "validation": 3, "test": 3}


def test_uses_an_existing_validation_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 5, "val": 2, "test": 3}, CLASSES)
    assert load_source(section(tmp_path)).info.counts == {"train": 15, "validation": 6, "test": 9}


def tar_with(member: tarfile.TarInfo, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


@pytest.mark.parametrize("name", ["../../train/ant/1.png", "/train/ant/1.png", "train/../../x/1.png"])
def test_rejects_members_that_point_outside_the_archive(name: str, tmp_path: Path) -> None:
    member = tarfile.TarInfo(name)
    with pytest.raises(UserError, match="points outside the archive"):
        load_source(section(tar_with(member, tmp_path / "evil.tar")))
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(UserError, match="points outside the archive"):
        load_source(section(tmp_path / "evil.zip"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_rejects_links_and_devices_in_archives(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("train/ant/1.png")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match="is a link or device"):
        load_source(section(tar_with(member, tmp_path / "evil.tar")))


def test_rejects_damaged_images_and_archives_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.path .*nothing does not exist"):
        load_source(section(tmp_path / "nothing"))

    archive = packed(folder, "tar.gz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match="damaged or has an unknown format"):
        load_source(section(archive))

    bad = folder / "train" / "bee" / "0003.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"not an image")
    with pytest.raises(UserError, match="image 'train/bee/0003.png' cannot be decoded"):
        load_source(section(folder))
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="image 'train/bee/0003.png' cannot be decoded"):
        load_source(section(folder))


def test_rejects_a_class_missing_from_a_split(folder: Path) -> None:
    for file in (folder / "test" / "cat").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="class 'cat' has no image in split 'test'"):
        load_source(section(folder))


def test_images_of_several_sizes_require_image_size(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (9, 8)).save(folder / "train" / "ant" / "odd.png")
    with pytest.raises(UserError, match="is 9x8 but the first is 8x8; set data.image_size"):
        load_source(section(folder))
    assert load_source(section(folder, image_size=8)).info.shape == (3, 8, 8)


def test_rejects_a_folder_with_an_unknown_layout(tmp_path: Path) -> None:
    write_images(tmp_path, {"training": 2}, CLASSES)
    with pytest.raises(UserError, match="must be at SPLIT/CLASS/FILE.* or at CLASS/FILE"):
        load_source(section(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no images under train/CLASS/ \(found: no images\)"):
        load_source(section(tmp_path / "empty"))


@pytest.mark.parametrize("layout", ["classes alone", "no test split"])
def test_creates_a_test_split_if_there_is_none(layout: str, tmp_path: Path) -> None:
    write_images(tmp_path, {"train": 20, **({"val": 2} if layout == "no test split" else {})}, CLASSES)
    root = tmp_path / "train" if layout == "classes alone" else tmp_path
    dataset = load_source(section(root, test=0.25, validation=0.2))
    counts = {name: len(dataset[name]) // len(CLASSES) for name in ("train", "validation", "test")}
    assert counts == {"train": 12 if layout == "classes alone" else 15, "validation": counts["validation"], "test": 5}
    assert counts["validation"] == (3 if layout == "classes alone" else 2)
    assert dataset.info.classes == CLASSES
    assert peek(section(root)) == (dataset.info.shape, len(CLASSES))


@pytest.mark.parametrize(
    ("name", "labels_key", "meta_key"),
    [("CIFAR10", "labels", "label_names"), ("CIFAR100", "fine_labels", "fine_label_names")],
)
def test_reads_cifar_in_torchvision_layout(name, labels_key, meta_key, tmp_path: Path, monkeypatch) -> None:
    import hashlib

    from torchvision import datasets

    kind = getattr(datasets, name)
    base = tmp_path / kind.base_folder
    base.mkdir()
    generator = np.random.default_rng(0)
    classes = 10 if name == "CIFAR10" else 100

    def write(file: str, content: object) -> list[str]:
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    def batch(count: int) -> dict[str, object]:
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, labels_key: [i % classes for i in range(count)]}

    # Small files with matching checksums; torchvision reads them like the real ones.
    monkeypatch.setattr(kind, "train_list", [write("train", batch(4 * classes))])
    monkeypatch.setattr(kind, "test_list", [write("test", batch(classes))])
    meta = write("meta", {meta_key: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": meta_key, "md5": meta[1]})
    dataset = load_source(DataSection(source=name.lower(), path=str(tmp_path), validation=0.25))
    assert dataset.info.counts == {"train": 3 * classes, "validation": classes, "test": classes}
    assert dataset.info.classes[3] == "class 3"
    assert dataset.info.shape == (3, 32, 32)
    (base / "train").write_bytes(b"changed")
    with pytest.raises(UserError, match=f"no intact {name} in torchvision's layout"):
        load_source(DataSection(source=name.lower(), path=str(tmp_path)))


@pytest.mark.slow
def test_reads_the_shared_cifar10_archive() -> None:
    path = SHARED / "data" / "cifar10-jpeg.tar.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    dataset = load_source(section(path, validation=0))
    assert dataset.info.counts == {"train": 50_000, "validation": 0, "test": 10_000}
    assert dataset.info.mean == pytest.approx([0.49125, 0.48209, 0.44652], abs=1e-4)
    assert dataset.info.std == pytest.approx([0.24523, 0.24278, 0.26063], abs=1e-4)
