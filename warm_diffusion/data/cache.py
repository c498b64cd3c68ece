"""A source, read once into a memory-mapped uint8 array.

The recipe of preparation, version 3: an image is turned as its EXIF orientation says; one of
another size than asked for is cropped to its largest centred square, then resized in uint8 by PIL
(`lanczos`, or `box`, which averages areas; both antialias, columns first, and round each pass to
nearest). Version 1 let `lanczos` look at pixels beyond the crop, version 2 ignored the orientation.
With `tiles` each image is instead cut into as many whole squares, side by side, as fit into it
around its centre, at its own scale. Images that are too small are refused, left out or enlarged
(`too_small`). Recipe, source and fingerprint make up the key of the cache, and the folder appears
under its name only when complete.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from warm_diffusion.data.source import Source
from warm_diffusion.data.sources import open_source
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_CHOICES = {
    "resize": tuple(_FILTERS),
    "too_small": ("refuse", "skip", "enlarge"),
    "channels": (0, 1, 3),  # 0: as they are
}
_CHANNELS = {"L": 1, "RGB": 3}
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel
_THREADS = min(16, os.cpu_count() or 1)
_BLOCK = 32  # images that are decoded at a time, and wait in memory: photographs are large


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared images."""

    images: np.ndarray  # uint8 [N, H, W, C], memory-mapped
    labels: np.ndarray | None  # int32 [N]
    info: dict  # what `dataset.json` says: source, recipe, count, shape, class names, content hash
    path: pathlib.Path  # the cache's folder


def load_dataset(
    source: str = "digits",
    *,
    resolution: int = 0,
    channels: int = 0,
    resize: str = "lanczos",
    too_small: str = "refuse",
    tiles: bool = False,
    cache_dir: str = "",
    data_dir: str = "",
    download: bool = False,
) -> Dataset:
    """Opens a data set, preparing it first if no cache of it exists.

    Args:
      source: see `sources.open_source`, as for data_dir and download.
      resolution: height and width to crop and resize to; 0 keeps the images' own, equal, size.
      channels: 1 or 3 converts every image; 0 keeps the images' own, equal, number.
      resize: lanczos or box.
      too_small: what to do with images smaller than `resolution`: refuse, skip or enlarge.
      tiles: cut every image into tiles of `resolution` instead of cropping and resizing it.
      cache_dir: where caches are kept; empty for a folder in the user's cache.

    Raises:
      ValueError: an argument out of range, or an image that does not fit, by name.
    """
    for name, value in {"resize": resize, "too_small": too_small, "channels": channels}.items():
        if value not in _CHOICES[name]:
            allowed = ", ".join(map(str, _CHOICES[name]))
            raise ValueError(f"data.{name} must be one of {allowed}, got {value!r}")
    if resolution < 0:
        raise ValueError(
            f"data.resolution must be at least 1, or 0 (as they are), got {resolution}"
        )
    if tiles and not resolution:
        raise ValueError("data.tiles needs the size of a tile: set data.resolution")
    if tiles and too_small == "enlarge":
        raise ValueError(
            "data.tiles keeps images at their scale: set data.too_small=refuse or skip"
        )
    root = cache_dir or storage.default_cache_dir() / "data"
    root = storage.local(root, "data.cache_dir").resolve()
    opened = open_source(source, data_dir=data_dir, download=download, cache_dir=root)
    recipe = {
        "format": 2,  # of the cache's folder
        "source": source,
        "fingerprint": opened.fingerprint,
        "resolution": resolution,
        "channels": channels,
        "resize": "tiles, version 1" if tiles else f"centre crop, {resize}, uint8, version 3",
    }
    if too_small != "refuse":  # which changes nothing where all are large enough
        recipe["too_small"] = too_small
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = root / f"{source.partition(':')[0]}-{key}"
    if not path.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=root))
        except OSError as error:
            raise ValueError(f"{root}: {error.strerror}; set data.cache_dir") from error
        with storage.naming(path):
            _prepare(opened, recipe, None if tiles else _FILTERS[resize], partial, path)
    return _open(path)


@functools.lru_cache(maxsize=8)  # the hash of a set is checked once per process
def _open(path: pathlib.Path) -> Dataset:
    try:
        with storage.naming(path):
            info = json.loads((path / "dataset.json").read_text())
        images = np.load(path / "images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(path / "labels.npy", allow_pickle=False) if info["class_names"] else None
        if list(images.shape) != info["shape"]:
            raise ValueError(f"images.npy has shape {images.shape}, not {info['shape']}")
        if hashlib.sha256(images).hexdigest() != info["content_sha256"]:
            raise ValueError("images.npy is not what was written")
        if labels is not None and hashlib.sha256(labels).hexdigest() != info["labels_sha256"]:
            raise ValueError("labels.npy is not what was written")
    except (
        FileNotFoundError, NotADirectoryError, IsADirectoryError,
        ValueError, KeyError, TypeError, EOFError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"the data cache {path} is damaged ({error}); delete that folder"
        ) from error
    return Dataset(images, labels, info, path)


def _prepare(
    source: Source,
    recipe: dict,
    resample: Image.Resampling | None,
    partial: pathlib.Path,
    path: pathlib.Path,
) -> None:
    """Writes the cache into the folder `partial`, which is renamed when it is whole."""
    try:
        digest, labels = hashlib.sha256(), []
        # Not a memory-mapped array: where the disk is full, that ends Python by SIGBUS.
        with (partial / "images.npy").open("wb") as file:
            for images, label in _prepared(source, recipe, resample):
                if not labels:
                    _write_header(file, (0, *images.shape[1:]))
                content = images.tobytes()
                file.write(content)
                digest.update(content)
                labels += [-1 if label is None else label] * len(images)
            if not labels:
                raise ValueError(
                    f"all {source.count():,} images of {recipe['source']} are smaller than "
                    f"data.resolution={recipe['resolution']}"
                )
            shape = (len(labels), *images.shape[1:])
            file.seek(0)
            _write_header(file, shape)
            file.flush()
            os.fsync(file.fileno())
        info = {
            **recipe,
            "count": shape[0],
            "shape": shape,
            "class_names": source.class_names,
            "content_sha256": digest.hexdigest(),
        }
        if source.class_names:
            numbers, content = np.array(labels, np.int32), io.BytesIO()
            np.save(content, numbers)
            (partial / "labels.npy").write_bytes(content.getvalue())
            info["labels_sha256"] = hashlib.sha256(numbers).hexdigest()
        (partial / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")
        try:
            partial.rename(path)
        except OSError:
            if not path.exists():
                raise
            # Another process has finished the same cache meanwhile: use that one.
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_header(file: io.BufferedIOBase, shape: tuple[int, ...]) -> None:
    """An .npy header; numpy makes it as long for every number of images."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class _Fitted(NamedTuple):
    images: np.ndarray | None  # its tiles or itself [n, H, W, C]; None: too small
    label: int | None
    size: tuple[int, int]  # width, height
    hides: bool  # whether there are colours under transparent pixels


def _prepared(
    source: Source, recipe: dict, resample: Image.Resampling | None
) -> Iterator[tuple[np.ndarray, int | None]]:
    """Every image's tiles or itself [n, H, W, C] and its label, checked against the first one."""
    first, small, hiding, count = None, [], [], source.count()
    fit = functools.partial(_fit, source, recipe, resample)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        blocks = (range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
        found = itertools.chain.from_iterable(pool.map(fit, block) for block in blocks)
        description = f"reading {recipe['source']}"
        for index, fitted in enumerate(
            tqdm(found, description, count, unit=" images", disable=None)
        ):
            if fitted.hides:
                hiding.append(index)
            if fitted.images is None:
                small.append((source.name(index), fitted.size))
                continue
            if first is None:
                first, first_name = fitted.images[0], source.name(index)
            _check_like_first(first_name, source.name(index), fitted.images[0].shape, first.shape)
            yield fitted.images, fitted.label
    if hiding:
        say(
            f"data     {len(hiding):,} of {count:,} images have transparent pixels, the first is "
            f"{source.name(hiding[0])}: the colours under them are used"
        )
    if small:
        name, (width, height) = small[0]
        problem = (
            f"{len(small):,} of {count:,} images are smaller than data.resolution="
            f"{recipe['resolution']}, the first is {name}, {width}x{height} (width x height)"
        )
        if "too_small" not in recipe:
            raise ValueError(
                f"{problem}; lower the resolution, or set data.too_small=skip (leaves them out) or "
                "enlarge"
            )
        say(f"data     {problem}: left out")


def _fit(source: Source, recipe: dict, resample: Image.Resampling | None, index: int) -> _Fitted:
    image, label = source.load(index)
    resolution, channels = recipe["resolution"], recipe["channels"]
    if image.mode not in (_CONVERTIBLE if channels else _CHANNELS):
        raise ValueError(
            f"{source.name(index)} has mode {image.mode}, expected L (grey) or RGB with 8 bits a "
            + (
                "channel; convert the file"
                if image.mode not in _CONVERTIBLE
                else "channel; set data.channels=1 or 3 to convert all images"
            )
        )
    size, hides = image.size, False
    if channels:
        if image.has_transparency_data:
            hides = image.convert("RGBA").getchannel("A").getextrema()[0] < 255
        image = image.convert("L" if channels == 1 else "RGB")
    if resolution and size != (resolution, resolution):
        side = min(size)
        if side < resolution and recipe.get("too_small") != "enlarge":
            return _Fitted(None, label, size, hides)
        if resample is None:
            return _Fitted(_tiles(np.asarray(image, np.uint8), resolution), label, size, hides)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        # resize(box=) would let the filter reach over the border of the crop.
        image = image.crop(box).resize((resolution, resolution), resample)
    array = np.asarray(image, np.uint8)
    return _Fitted(array.reshape(1, *array.shape[:2], -1), label, size, hides)


def _tiles(image: np.ndarray, size: int) -> np.ndarray:
    """The whole squares [n, size, size, C] around the centre of an image, row by row."""
    height, width = image.shape[:2]
    rows, columns = height // size, width // size
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    image = image[top : top + rows * size, left : left + columns * size]
    tiles = image.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return tiles.reshape(rows * columns, size, size, -1)


def _check_like_first(first_name: str, name: str, shape: tuple, first: tuple) -> None:
    if shape[2] != first[2]:
        raise ValueError(
            f"{name} has {shape[2]} channel(s), but {first_name} has {first[2]}; "
            "set data.channels=1 or 3 to convert all images"
        )
    if shape != first:
        raise ValueError(
            f"{name} is {shape[1]}x{shape[0]} (width x height), but {first_name} is {first[1]}x"
            f"{first[0]}; set data.resolution to crop and resize all"
        )
