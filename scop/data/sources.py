"""Sources of images: scikit-learn's digits, CIFAR in torchvision's layout, and folders or archives of images.

Archives are never extracted to disk: their members are read in order and decoded in memory, so a member's path cannot
escape. Archives with links, devices or paths that point outside are refused anyway; the error names the member.
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from scop.config import DataSection
from scop.data.dataset import Dataset, Split, cut, make_dataset
from scop.errors import UserError
from scop.system.progress import progress

_SUFFIXES = {".jpg", ".jpeg", ".png"}
_OTHER_IMAGES = {".avif", ".bmp", ".gif", ".heic", ".jp2", ".jxl", ".ppm", ".tif", ".tiff", ".webp"}
_SPLIT_NAMES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_CHUNK = 512
_ORIENTATION = 0x0112
_UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error)
"""Exceptions that Pillow raises for damaged files."""


def load_source(section: DataSection) -> Dataset:
    """Read the images of a configuration's section `data`.

    Raises:
        UserError: images are missing, damaged or incomplete; the message names the file.
    """
    match section.source:
        case "digits":
            return _digits(section)
        case "cifar10" | "cifar100":
            return _cifar(section)
        case "imagefolder":
            return _image_folder(section)


def peek(section: DataSection) -> tuple[tuple[int, int, int], int]:
    """Return the shape (C, H, W) of the images and the number of classes; at most one image is decoded.

    Raises:
        UserError: there are no images, or the first one cannot be decoded.
    """
    if section.source == "digits":
        side = section.image_size or 8
        return (section.channels or 1, side, side), 10
    if section.source in ("cifar10", "cifar100"):
        return (3, 32, 32), int(section.source.removeprefix("cifar"))
    path, decoder = _existing(section), _Decoder(section.image_size, section.channels)
    classes: set[str] = set()
    for name, content in _members(path):
        if not classes:
            decoder.settle(name, content)
        classes.add(_split_and_class(name, path)[1])
    if decoder.shape is None or decoder.channels is None:
        raise UserError(f"{path} has no images under SPLIT/CLASS/ or CLASS/")
    return (decoder.channels, *decoder.shape), len(classes)


def _digits(section: DataSection) -> Dataset:
    """Read 1,797 handwritten digits of 8x8 grey pixels (UCI, Alpaydin and Kaynak 1998); a fifth is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = np.repeat(images, section.channels or 1, axis=1)
    if section.image_size:
        images = np.stack([_resize_array(image, section.image_size) for image in images])
    labels = digits.target.astype(np.int64)
    # The test split is the same in all runs: it does not depend on the configuration's seed.
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, test = np.sort(train), np.sort(test)
    return _assemble(
        section,
        "scikit-learn digits",
        [str(digit) for digit in range(10)],
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
    )


def _resize_array(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    planes = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR)) for p in image]
    return np.stack(planes)


def _cifar(section: DataSection) -> Dataset:
    from torchvision import datasets

    root = _existing(section)
    make = datasets.CIFAR10 if section.source == "cifar10" else datasets.CIFAR100
    try:
        # torchvision checks the files against the published checksums before it reads them.
        parts = [make(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"data.path {root}: no intact {make.__name__} in torchvision's layout ({make.base_folder}/...)"
        ) from error
    train, test = (
        Split(np.ascontiguousarray(p.data.transpose(0, 3, 1, 2)), np.asarray(p.targets, np.int64)) for p in parts
    )
    if section.image_size not in (None, 32) or section.channels not in (None, 3):
        raise UserError(f"data: {section.source} has 32x32 colour images; leave image_size and channels out")
    return _assemble(section, make.__name__, list(parts[0].classes), train, test)


def _assemble(
    section: DataSection,
    source: str,
    classes: list[str],
    train: Split,
    test: Split,
    validation: Split | None = None,
) -> Dataset:
    return make_dataset(
        source,
        classes,
        train,
        test,
        section.validation if validation is None else validation,
        seed=section.seed,
        mean=section.mean,
        std=section.std,
    )


# -- folders and archives ----------------------------------------------------------------------------------------------


def _image_folder(section: DataSection) -> Dataset:
    path = _existing(section)
    pixels: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    decoder = _Decoder(section.image_size, section.channels)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress(None, "reading images", unit="image") as bar:
        members = _members(path)
        while chunk := list(islice(members, _CHUNK)):
            decoder.settle(*chunk[0])
            for (name, _), image in zip(chunk, pool.map(decoder, *zip(*chunk, strict=True)), strict=True):
                pixels[_split_and_class(name, path)].append(image)
            bar.update(len(chunk))
    classes = sorted({class_name for _, class_name in pixels})
    splits = sorted({split for split, _ in pixels})
    if "train" not in splits:
        raise UserError(f"{path} has no images under train/CLASS/ (found: {', '.join(splits) or 'no images'})")
    for split in splits:
        for class_name in classes:
            if not pixels.get((split, class_name)):
                raise UserError(
                    f"{path}: class {class_name!r} has no image in split {split!r}; each split needs all classes"
                )
    made = {split: _stack([pixels.pop((split, name)) for name in classes]) for split in splits}
    train, test = made["train"], made.get("test")
    if test is None:
        train, test = cut(train, section.test, section.seed, classes)
    return _assemble(section, path.name, classes, train, test, made.get("validation"))


def _stack(by_class: list[list[np.ndarray]]) -> Split:
    labels = np.repeat(np.arange(len(by_class), dtype=np.int64), [len(images) for images in by_class])
    return Split(np.stack([image for images in by_class for image in images]), labels)


def _split_and_class(name: str, path: Path) -> tuple[str, str]:
    """Return the split and class of a path that ends in SPLIT/CLASS/FILE, or is CLASS/FILE, which means training."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: the name {name!a} is not in UTF-8; rename it") from error
    parts = PurePosixPath(name).parts
    if len(parts) == 2 and parts[0] not in _SPLIT_NAMES:
        return "train", parts[0]
    if len(parts) < 3 or parts[-3] not in _SPLIT_NAMES:
        raise UserError(
            f"{path}: {name!r} must be at SPLIT/CLASS/FILE, where SPLIT is train, validation or test, or at CLASS/FILE"
        )
    return _SPLIT_NAMES[parts[-3]], parts[-2]


class _Decoder:
    """Decodes images to uint8 (C, H, W).

    Args:
        size: height and width to scale and crop to; by default all images must have the size of the first one.
        channels: 1 or 3; by default that of the first image.
    """

    def __init__(self, size: int | None, channels: int | None) -> None:
        self.size, self.channels = size, channels
        self.guessed = channels is None
        self.shape: tuple[int, int] | None = (size, size) if size else None

    def settle(self, name: str, encoded: bytes) -> None:
        """Take size and channels from the first image if they are not set."""
        image = self._open(name, encoded)
        across = self._orientation(name, image) >= 5  # EXIF: rotated by 90 degrees
        self.shape = self.shape or ((image.width, image.height) if across else (image.height, image.width))
        self.channels = self.channels or (1 if _is_grey(image.mode) else 3)

    def __call__(self, name: str, encoded: bytes) -> np.ndarray:
        from PIL import Image, ImageOps

        image = self._open(name, encoded)
        if self.guessed and self.channels == 1 and not _is_grey(image.mode):
            raise UserError(
                f"image {name!r} has colour but the first one is grey; set data.channels to 3 or 1 to convert all "
                "images"
            )
        turned = self._orientation(name, image) != 1
        try:
            if turned:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits; `convert` would clip at 255
                image = image.point(lambda value: value / 256)
            image = image.convert("RGB" if self.channels == 3 else "L")
        except _UNREADABLE as error:
            raise UserError(f"image {name!r} cannot be decoded ({error})") from error
        if self.size:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        elif (image.height, image.width) != self.shape:
            assert self.shape is not None
            raise UserError(
                f"image {name!r} is {image.width}x{image.height} but the first is {self.shape[1]}x{self.shape[0]}; "
                "set data.image_size to scale all images to one size"
            )
        array = np.asarray(image)
        return array[None] if self.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))

    @staticmethod
    def _orientation(name: str, image) -> int:  # type: ignore[no-untyped-def]
        try:
            return int(image.getexif().get(_ORIENTATION, 1))
        except _UNREADABLE as error:
            raise UserError(f"image {name!r} cannot be decoded ({error})") from error

    @staticmethod
    def _open(name: str, encoded: bytes):  # type: ignore[no-untyped-def]
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG"))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"image {name!r} cannot be decoded: it is not a JPEG or PNG file") from error


def _is_grey(mode: str) -> bool:
    """Whether images of this Pillow mode have no colour: 1, L, LA, I and I;16."""
    return mode[:1] in ("1", "L", "I") and mode != "LAB"


def _existing(section: DataSection) -> Path:
    if section.path is None:
        raise UserError(f"data.path is not set; source {section.source!r} requires it")
    path = Path(section.path).expanduser()
    if not path.exists():
        raise UserError(f"data.path {path} does not exist")
    return path


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of every image, sorted by path in a folder, and in the archive's order in an archive."""
    if path.is_dir():
        return _folder_members(path)
    if zipfile.is_zipfile(path):
        return _readable(path, _zip_members(path))
    return _readable(path, _tar_members(path))


def _folder_members(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(_files_below(path, set())):
        if file.is_file() and _is_image(file.relative_to(path).as_posix()):
            try:
                yield file.relative_to(path).as_posix(), file.read_bytes()
            except OSError as error:
                raise UserError(f"image {file} cannot be read: {error.strerror}") from error


def _files_below(folder: Path, above: set[Path]) -> Iterator[Path]:
    """Yield all files below a folder; follow links to folders, except those that lead back to a parent."""
    own = folder.resolve()
    for entry in folder.iterdir() if own not in above else ():
        if entry.is_dir():
            yield from _files_below(entry, above | {own})
        else:
            yield entry


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _refuse_escape(path, member.filename)
            mode = member.external_attr >> 16
            if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{path}: member {member.filename!r} is a link or device; such archives are refused")
            if _is_image(member.filename):
                yield member.filename, archive.read(member)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            _refuse_escape(path, member.name)
            if not (member.isfile() or member.isdir()):
                raise UserError(f"{path}: member {member.name!r} is a link or device; such archives are refused")
            if member.isfile() and _is_image(member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def _is_image(name: str) -> bool:
    """Whether a path names an image; the metadata files that macOS adds to archives are not images.

    Raises:
        UserError: the image has an unsupported format; if it were skipped, its class might disappear silently.
    """
    path = PurePosixPath(name)
    if path.name.startswith("._") or "__MACOSX" in path.parts:
        return False
    if path.suffix.lower() in _OTHER_IMAGES:
        raise UserError(f"image {name!r} is neither JPEG nor PNG, the supported formats; convert or remove it")
    return path.suffix.lower() in _SUFFIXES


def _refuse_escape(path: Path, name: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{path}: member {name!r} points outside the archive; such archives are refused")


def _readable(path: Path, members: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    try:
        yield from members
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"archive {path} is damaged or has an unknown format: {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"archive {path} cannot be read: {error}") from error
