"""Images as files: a source's interface, and the trees of PNG and JPEG files, folders and zips."""

import dataclasses
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence

from PIL import Image, ImageOps

_SUFFIXES = (".png", ".jpg", ".jpeg")
_MOST_BYTES = 2**28  # of one encoded image; far above any that Pillow would decode


@dataclasses.dataclass(frozen=True)
class Source:
    """A numbered set of images.

    Attributes:
      names: what to call each image in a message, one per image.
      load: index -> (decoded image, label or None); raises ValueError naming the image.
      fingerprint: changes whenever the images do.
      class_names: names of the labels, empty without labels.
    """

    names: Sequence[str]
    load: Callable[[int], tuple[Image.Image, int | None]]
    fingerprint: str
    class_names: tuple[str, ...] = ()


def fingerprint_of(lines: Sequence[str]) -> str:
    """SHA-256 of some lines."""
    # On POSIX a file name is bytes, and need not be text.
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def file_fingerprint(path: pathlib.Path) -> str:
    """Of a file's path, size and time, without reading it."""
    stat = path.stat()
    return fingerprint_of([f"{path} {stat.st_size} {stat.st_mtime_ns}"])


def decode(stream: io.BufferedIOBase, name: str) -> Image.Image:
    """An image, turned as its EXIF orientation says; ValueError names one that cannot be read."""
    try:
        image = Image.open(stream)
        image.load()
        # A camera held upright writes its pixels lying, and how to turn them.
        image = ImageOps.exif_transpose(image)
    # PIL reports damage by many types: OSError, SyntaxError (broken PNG), ValueError, bomb error.
    except Exception as error:
        raise ValueError(
            f"{name}: not a readable image ({error}); replace it or take it out"
        ) from error
    return image


def _is_image(path: pathlib.PurePath) -> bool:
    parts = [part for part in path.parts if part != ".."]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return path.suffix.lower() in _SUFFIXES and not hidden


def _labels(paths: Sequence[pathlib.PurePath]) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels from the first sub-folder; none if any image lies outside a sub-folder."""
    if any(len(path.parts) < 2 for path in paths):
        return [None] * len(paths), ()
    class_names = tuple(sorted({path.parts[0] for path in paths}))
    number = {name: index for index, name in enumerate(class_names)}
    return [number[path.parts[0]] for path in paths], class_names


def _tree(
    paths: Sequence[pathlib.PurePath],
    names: Sequence[str],
    open_stream: Callable[[int], io.BufferedIOBase],
    fingerprint: str,
    where: str,
) -> Source:
    if not paths:
        raise ValueError(f"{where}: no PNG or JPEG image in it")
    labels, class_names = _labels(paths)

    def load(index: int) -> tuple[Image.Image, int | None]:
        with open_stream(index) as stream:
            return decode(stream, names[index]), labels[index]

    return Source(names, load, fingerprint, class_names)


def _check_size(name: str, size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(
            f"{name} has {size:,} bytes, expected at most {_MOST_BYTES:,}: no image is so large; "
            "take it out"
        )


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below a folder; links are followed, for class folders are often links."""

    def unreadable(error: OSError) -> None:
        raise ValueError(f"folder:{root}: {error.filename}: {error.strerror}")

    above = {str(root): ()}  # which real folders lie above each
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        real, ancestors = os.path.realpath(folder), above.pop(folder)
        if real in ancestors:
            raise ValueError(f"folder:{root}: the link {folder} leads to a folder that it lies in")
        above |= {os.path.join(folder, name): (*ancestors, real) for name in folders}
        yield from (pathlib.Path(folder, name) for name in names)


def folder(root: pathlib.Path) -> Source:
    """The images below a folder."""
    files = sorted(path for path in _files(root) if _is_image(path.relative_to(root)))
    stats = []
    for path in files:
        try:
            stats.append((path, path.stat()))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; take it out, or mend the link") from error
        _check_size(str(path), stats[-1][1].st_size)
    fingerprint = fingerprint_of(
        [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    )
    return _tree(
        [path.relative_to(root) for path in files],
        [str(path) for path in files],
        lambda index: files[index].open("rb"),
        fingerprint,
        f"folder:{root}",
    )


def zip_file(path: pathlib.Path) -> Source:
    """The images in a zip file, read in place."""
    try:
        archive = zipfile.ZipFile(path)
    # Damaged tables of contents come as BadZipFile, UnicodeDecodeError, struct.error and others.
    except Exception as error:
        raise ValueError(f"zip:{path}: not a zip file ({error})") from error
    # Members are only ever read as streams: a name such as ../../x is never used as a path.
    members = sorted(
        (member for member in archive.infolist() if not member.is_dir()),
        key=lambda member: member.filename,
    )
    members = [member for member in members if _is_image(pathlib.PurePosixPath(member.filename))]
    for member in members:
        # A few kilobytes can hold gigabytes of zeros. No more than it says is ever unpacked.
        _check_size(f"{path}:{member.filename}", member.file_size)

    def open_stream(index: int) -> io.BufferedIOBase:
        try:
            return io.BytesIO(archive.read(members[index]))  # checks the member's CRC
        # Damage, encryption and unknown methods come as BadZipFile, zlib.error and many others.
        except Exception as error:
            name = f"{path}:{members[index].filename}"
            raise ValueError(f"{name}: cannot be read from the archive ({error})") from error

    return _tree(
        [pathlib.PurePosixPath(member.filename) for member in members],
        [f"{path}:{member.filename}" for member in members],
        open_stream,
        file_fingerprint(path),
        f"zip:{path}",
    )
