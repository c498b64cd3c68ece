"""Trees of image files: folders, zip files, and tar files such as WebDataset's shards.

A file is an image by the ending of its name; hidden files and folders are passed over. The labels
come from the first of these that is there:

1. `dataset.json` at the top, as EDM's and StyleGAN's tools write it;
2. `KEY.cls` beside `KEY.jpg` in a tar file, as WebDataset has it;
3. the first level at which there is more than one sub-folder. Folders whose names are numbers of
   one length, such as 00000 and 00001, are parts of one set, not classes.
"""

import importlib.metadata
import importlib.util
import io
import json
import operator
import os
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from warm_diffusion.data.images import decode
from warm_diffusion.data.source import Source, fingerprint, fingerprint_of_files, numbered_classes
from warm_diffusion.runtime.console import say

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
_SPLITS = {"train", "test", "val", "valid", "validation"}
_LISTING = "dataset.json"
_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png",
    "gravel.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip
_MOST_BYTES = 2**28  # of one encoded image; far above any that Pillow would decode


class _File(NamedTuple):
    path: str  # inside the tree, with forward slashes
    name: str  # in messages
    size: int
    place: object  # what the tree's `read` takes


def _is_image(path: str) -> bool:
    parts = [part for part in path.split("/") if part != ".."]
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return path.lower().endswith(SUFFIXES) and not hidden


def _tree(
    where: str,
    files: Sequence[_File],
    read: Callable[[object], bytes],
    fingerprint_: str,
    labels: Mapping[str, int] | None = None,
) -> Source:
    """The images among some files; `labels` by their names in messages go before folders."""
    images = sorted((f for f in files if _is_image(f.path)), key=lambda f: f.path.split("/"))
    if not images:
        raise ValueError(f"{where}: no image in it; an image's name ends in {', '.join(SUFFIXES)}")
    listing = next((file for file in files if file.path == _LISTING), None)
    for file in [*images, *filter(None, [listing])]:
        if file.size > _MOST_BYTES:
            raise ValueError(
                f"{file.name} has {file.size:,} bytes, expected at most {_MOST_BYTES:,}: no image "
                "is so large; take it out"
            )
    paths = [file.path for file in images]
    if listing:
        found, class_names = _listed(where, paths, read(listing.place))
    elif labels:
        found = _looked_up(where, [file.name for file in images], labels)
        class_names = numbered_classes(found, where)
    else:
        found, class_names = _by_folder(where, paths)

    def load(index: int) -> tuple[Image.Image, int | None]:
        file = images[index]
        return decode(io.BytesIO(read(file.place)), file.name), found[index] if found else None

    return Source(lambda: len(images), load, lambda i: images[i].name, fingerprint_, class_names)


_Labels = tuple[Sequence[int], tuple[str, ...]]


def _listed(where: str, paths: Sequence[str], content: bytes) -> _Labels:
    """Reads EDM's and StyleGAN's {"labels": [[PATH, CLASS], ...]}; null means no labels."""
    try:
        listed = json.loads(content)["labels"]
        if listed is None:
            return (), ()
        labels = {path: operator.index(label) for path, label in listed}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{where}: {_LISTING} must hold {{"labels": [[FILE, CLASS], ...]}} or {{"labels": '
            f"null}} ({type(error).__name__}: {error}); correct it, or move it away"
        ) from error
    found = _looked_up(where, paths, labels)
    return found, numbered_classes(found, where)


def _looked_up(where: str, paths: Sequence[str], labels: Mapping[str, int]) -> list[int]:
    if missing := [path for path in paths if path not in labels]:
        raise ValueError(f"{where}: {len(missing):,} images have no label; the first: {missing[0]}")
    return [labels[path] for path in paths]


def _by_folder(where: str, paths: Sequence[str]) -> _Labels:
    """Labels from the first level that has several sub-folders; one folder is one class."""
    parts = [path.split("/") for path in paths]
    names: list[str] = []
    for level in range(min(map(len, parts)) - 1):
        found = sorted({p[level] for p in parts})
        if {name.lower() for name in found} <= _SPLITS:
            raise ValueError(
                f"{where}: its sub-folders are {' and '.join(found)}, which are parts of a set, "
                f"not classes; name one, such as folder:DIR/{found[-1]} (unpack an archive first)"
            )
        if not names or len(found) > 1:
            names, number = found, level
        if len(found) > 1:
            break
    lengths = {len(name) for name in names}
    # Single digits are the ten classes of MNIST as folders.
    if len(names) > 1 and "".join(names).isdigit() and len(lengths) == 1 and lengths != {1}:
        say(
            f"data     {where}: the folders {names[0]} to {names[-1]} are taken as parts of one "
            f"set, not as classes ({_LISTING} can give labels)"
        )
        names = []
    index = {name: label for label, name in enumerate(names)}
    return [index[p[number]] for p in parts] if names else (), tuple(names)


def _below(root: pathlib.Path) -> Iterator[pathlib.Path]:
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
    files, lines = [], []
    for path in _below(root):
        inside = path.relative_to(root).as_posix()
        if inside != _LISTING and not _is_image(inside):
            continue
        try:
            found = path.stat()
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; take it out, or repair the link"
            ) from error
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for without end
            raise ValueError(f"{path} is not a regular file; take it out")
        files.append(_File(inside, str(path), found.st_size, path))
        lines.append(f"{path} {found.st_size} {found.st_mtime_ns}")
    return _tree(f"folder:{root}", files, _read_file, fingerprint(sorted(lines)))


def _read_file(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def photos() -> Source:
    """scikit-image's ten photographs, six of them in colour, inside that package: no download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise ValueError("photos needs scikit-image: pip install scikit-image")
    # Their files alone: the package takes a second to import.
    folder = pathlib.Path(spec.origin).parent / "data"
    if missing := [name for name in _PHOTOS if not (folder / name).is_file()]:
        raise ValueError(f"this scikit-image comes without {', '.join(missing)}: update it")
    files = [_File(name, f"photos/{name}", 0, folder / name) for name in _PHOTOS]
    version = f"scikit-image {importlib.metadata.version('scikit-image')}"
    return _tree("photos", files, _read_file, version)


def zip_file(path: pathlib.Path) -> Source:
    """The images in a zip file, read in place."""
    try:
        archive = zipfile.ZipFile(path)
    # Damaged tables of contents come as BadZipFile, UnicodeDecodeError, struct.error and others.
    except Exception as error:
        raise ValueError(f"zip:{path}: not a zip file ({error})") from error
    # Members are only ever read: a name such as ../../x is never used as a path. A few kilobytes
    # can hold gigabytes of zeros, but no more than a member says is ever unpacked.
    files = [
        _File(member.filename, f"{path}:{member.filename}", member.file_size, member)
        for member in archive.infolist()
        if not member.is_dir()
    ]

    def read(member: zipfile.ZipInfo) -> bytes:
        try:
            return archive.read(member)  # checks the member's CRC
        # Damage, encryption and unknown methods come as BadZipFile, zlib.error and many others.
        except Exception as error:
            raise ValueError(
                f"{path}:{member.filename}: cannot be read from the archive ({error})"
            ) from error

    return _tree(f"zip:{path}", files, read, fingerprint_of_files([path]))


def tar_files(paths: Sequence[pathlib.Path]) -> Source:
    """The images in uncompressed tar files, read in place; `KEY.cls` holds the label of KEY."""
    files, classes = [], {}
    where = f"tar:{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                members = [m for m in archive if m.isfile() and not m.issparse()]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(
                f"tar:{path}: not an uncompressed tar file ({error}); unpack a compressed one, "
                "and name the folder"
            ) from error
        for member in members:
            inside = member.name.removeprefix("./")
            file = _File(inside, f"{path}:{inside}", member.size, (path, member))
            if inside.endswith(".cls"):
                try:
                    classes[path, _key(inside)] = int(_read_member(file.place)[:20])
                except ValueError as error:
                    raise ValueError(f"{file.name}: not the number of a class ({error})") from error
            files.append(file)
    owners = [(file.name, (file.place[0], _key(file.path))) for file in files]
    labels = {name: classes[owner] for name, owner in owners if owner in classes}
    return _tree(where, files, _read_member, fingerprint_of_files(paths), labels)


def _key(inside: str) -> str:
    """WebDataset's name of a sample: up to the first dot of the file's name."""
    folder, _, name = inside.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _read_member(place: tuple[pathlib.Path, tarfile.TarInfo]) -> bytes:
    path, member = place
    try:
        with path.open("rb") as file:
            file.seek(member.offset_data)
            content = file.read(member.size)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if len(content) < member.size:
        raise ValueError(f"{path}:{member.name}: the tar file ends within it")
    return content
