"""Sources of images by name: digits, photos, cifar10, files, arrays, tables, joined sources.

A source (`source.Source`) is a numbered set of images that can be decoded one by one, and a
fingerprint of what is in it, so that a cache made from it is not used after it changes. Sources
joined by + are one after the other, such as photos+folder:DIR; one that is named twice counts
twice. Nothing here touches the network unless `download` asks for it.
"""

import functools
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from warm_diffusion.data import cifar10, files, tables
from warm_diffusion.data.source import (
    Source,
    fingerprint,
    fingerprint_of_files,
    numbered_classes,
    of_arrays,
)  # fmt: skip
from warm_diffusion.runtime import storage

_KINDS = (
    "digits, photos, cifar10[:SPLIT], folder:DIR, zip:FILE, tar:FILE, npy:FILE, npz:FILE, "
    "parquet:FILE or tfds:NAME[:SPLIT]"
)
_LOCAL = ("folder", "zip", "tar", "npy", "npz", "parquet")
# A + joins sources only before the name of one: paths may hold it as well.
_JOIN = re.compile(rf"\+(?=(?:digits|photos|cifar10)(?:\+|$)|(?:cifar10|{'|'.join(_LOCAL)}|tfds):)")


def short_name(spec: str) -> str:
    """A source for titles, without the folders that only one machine has."""
    parts = []
    for part in _JOIN.split(spec):
        kind, _, rest = part.partition(":")
        if kind in _LOCAL:
            place = pathlib.PurePath(rest)
            part = place.name or kind if place.is_absolute() else "/".join(place.parts[-2:])
        parts.append(part)
    return "+".join(parts)


def open_source(
    spec: str,
    *,
    data_dir: str = "",
    download: bool = False,
    cache_dir: pathlib.Path | None = None,
) -> Source:
    """Opens a source by its specification.

    Args:
      spec: one of `_KINDS`, or several joined by +. A FILE may lie on gs://; of tar and parquet it
        may be a folder, or a pattern such as DIR/train-*.parquet.
      data_dir: where CIFAR-10's files or TensorFlow Datasets' prepared sets are.
      download: whether a missing public set may be downloaded.
      cache_dir: where files of gs:// are copied to; None: the user's cache folder.

    Raises:
      ValueError: an unknown source, nothing there, or no image in it.
    """
    if len(parts := _JOIN.split(spec)) > 1:
        options = {"data_dir": data_dir, "download": download, "cache_dir": cache_dir}
        return _joined([open_source(part, **options) for part in parts])
    kind, _, argument = spec.partition(":")
    if spec == "digits":
        return _digits()
    if spec == "photos":
        return files.photos()
    if kind == "cifar10":
        return cifar10.cifar10(argument or "train", data_dir, download)
    if kind == "tfds" and argument:
        return tables.tfds(argument, data_dir, download)
    if kind not in _LOCAL or not argument:
        raise ValueError(f"data.source must be {_KINDS}, got {spec!r}{_hint(spec)}")
    if kind == "folder":
        root = storage.local(argument, "folder:DIR").resolve()
        if not root.is_dir():
            raise ValueError(
                f"there is no folder {root}: name that of your images, "
                "--config.data.source=folder:DIR"
            )
        return files.folder(root)
    paths = _files(kind, argument, cache_dir)
    match kind:
        case "zip":
            return files.zip_file(paths[0])
        case "tar":
            return files.tar_files(paths)
        case "parquet":
            return tables.parquet(paths)
    return _array(paths[0], kind)


def _hint(spec: str) -> str:
    """Returns a suggestion for a path or a name without a kind."""
    path = pathlib.Path(os.path.expanduser(spec))  # pathlib's raises where there is no such user
    kind = "folder" if path.is_dir() else path.suffix[1:]
    if path.exists() and kind in _LOCAL:
        return f": did you mean {kind}:{spec}?"
    if re.fullmatch(r"[a-z][a-z0-9_]+", spec):
        return f": a set of TensorFlow Datasets is tfds:{spec}"
    return ""


def _files(kind: str, argument: str, cache_dir: pathlib.Path | None) -> list[pathlib.Path]:
    """A file; of tar and parquet also the files of a folder, or those that a pattern names."""
    if kind in ("tar", "parquet") and not argument.startswith("gs://"):
        path = storage.local(argument, f"{kind}:FILES").resolve()
        if path.is_dir() or ("*" in path.name and not path.exists()):
            found = path.glob(f"*.{kind}") if path.is_dir() else path.parent.glob(path.name)
            if paths := sorted(path for path in found if path.is_file()):
                return paths
            raise ValueError(f"{kind}:{argument}: no *.{kind} file there")
    path = storage.fetch(argument, cache_dir).resolve()
    if not path.is_file():
        raise ValueError(f"{kind}:{argument}: there is no file {path}")
    return [path]


def _array(path: pathlib.Path, kind: str) -> Source:
    """An array of images; in an archive `images` or `arr_0`, and perhaps `labels` or `arr_1`."""
    where, labels = f"{kind}:{path}", None
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        if kind == "npz":
            first, second = ("images", "labels") if "images" in images else ("arr_0", "arr_1")
            labels = images.get(second)
            images = images[first]
    # A damaged header is reported by many types: Python evaluates its text.
    except Exception as error:
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{where}: not a readable .{kind} file ({problem})") from error
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{where}: an .npz archive: name it as npz:{path}")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"{where}: expected uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], "
            f"got {images.dtype} {images.shape}"
        )
    if images.size == 0:
        raise ValueError(f"{where}: no image in it, its shape is {images.shape}")
    if labels is not None:
        if labels.size != len(images) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{where}: expected {len(images):,} whole numbers as labels, got {labels.dtype} "
                f"{labels.shape}"
            )
        labels = labels.ravel()
    class_names = () if labels is None else numbered_classes(labels.tolist(), where)
    return of_arrays(where, lambda: (images, labels), fingerprint_of_files([path]), class_names)


def _digits() -> Source:
    """scikit-learn's 1,797 images, 8x8, 17 grey levels, inside that package: no download."""

    def arrays() -> tuple[np.ndarray, np.ndarray]:
        # Not needed once the cache is made, and slower to import than all else.
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target

    version = f"scikit-learn {importlib.metadata.version('scikit-learn')}"
    return of_arrays("digits", arrays, version, tuple("0123456789"))


def _joined(sources: Sequence[Source]) -> Source:
    """One source after the other, without classes: those of one are not those of another."""

    @functools.cache
    def parts() -> list[tuple[Source, int]]:
        return [(source, index) for source in sources for index in range(source.count())]

    def load(index: int) -> tuple[Image.Image, None]:
        source, index = parts()[index]
        return source.load(index)[0], None

    def name(index: int) -> str:
        source, index = parts()[index]
        return source.name(index)

    return Source(lambda: len(parts()), load, name, fingerprint([s.fingerprint for s in sources]))
