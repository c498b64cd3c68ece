"""Where images come from: digits, photos, folder:, zip:, npy:, lmdb: and tfds:.

A source is a numbered set of images that can be decoded one by one, and a fingerprint of what is in
it, so that a cache made from it is not used after it changes. Sources joined by + are one after the
other, such as photos+folder:DIR; one that is named twice counts twice. Nothing here touches the
network unless `download` asks for it, and no TensorFlow is imported.
"""

import bisect
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import pathlib
import re
import weakref
from collections.abc import Sequence

import numpy as np
from PIL import Image

from warm_diffusion.data.files import (
    Source,
    decode,
    file_fingerprint,
    fingerprint_of,
    folder,
    zip_file,
)
from warm_diffusion.runtime import storage

# A + joins sources only before the name of one: paths may hold it as well.
_JOIN = re.compile(r"\+(?=(?:digits|photos)(?:\+|$)|(?:folder|zip|npy|lmdb|tfds):)")
_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png",
    "gravel.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip


def short_name(spec: str) -> str:
    """A source for titles, without the folders that only one machine has.

    Example:
      >>> short_name("photos+folder:cifar10/train+zip:/home/me/flowers.zip")
      'photos+cifar10/train+flowers.zip'
    """
    parts = []
    for part in _JOIN.split(spec):
        kind, _, rest = part.partition(":")
        local = kind in ("folder", "zip", "npy", "lmdb")
        if local:
            place = pathlib.PurePath(rest)
            parts.append(place.name or kind if place.is_absolute() else "/".join(place.parts[-2:]))
        else:
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
      spec: `digits`, `photos`, `folder:DIR`, `zip:FILE`, `npy:FILE`, `lmdb:DIR` (LSUN's) or
        `tfds:NAME[:SPLIT]`, or several joined by +; the files of zip and npy may lie on gs://.
      data_dir: where TensorFlow Datasets keeps prepared sets; empty for its default.
      download: whether `tfds:` may download and prepare a missing set.
      cache_dir: where files of gs:// are copied to; None: the user's cache folder.

    Raises:
      ValueError: an unknown source, nothing there, or no image in it.
    """
    if len(parts := _JOIN.split(spec)) > 1:
        options = {"data_dir": data_dir, "download": download, "cache_dir": cache_dir}
        return _joined([open_source(part, **options) for part in parts])
    kind, _, argument = spec.partition(":")
    if spec in ("digits", "photos"):
        return _digits() if kind == "digits" else _photos()
    if kind == "tfds" and argument:
        return _tfds(argument, data_dir, download)
    openers = {"folder": folder, "zip": zip_file, "npy": _npy, "lmdb": _lmdb}
    if kind not in openers or not argument:
        raise ValueError(
            "data.source must be digits, photos, folder:DIR, zip:FILE, npy:FILE, lmdb:DIR or "
            f"tfds:NAME[:SPLIT], got {spec!r}"
        )
    is_folder = kind in ("folder", "lmdb")
    if is_folder:
        path = storage.local(argument, f"{kind}:DIR").resolve()
    else:
        path = storage.fetch(argument, cache_dir).resolve()
    if is_folder and not path.is_dir():
        raise ValueError(f"{spec}: there is no folder {path}")
    if not is_folder and not path.is_file():
        raise ValueError(f"{spec}: there is no file {path}")
    return openers[kind](path)


class _Numbered(Sequence):
    """Names `prefix[0]`, `prefix[1]`, ... without keeping millions of strings."""

    def __init__(self, prefix: str, count: int):
        self._prefix, self._count = prefix, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return f"{self._prefix}[{index}]"


def _npy(path: pathlib.Path) -> Source:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    # A damaged header is reported by many types: Python evaluates its text.
    except Exception as error:
        told = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"npy:{path}: not a readable .npy file ({told})") from error
    if not isinstance(images, np.ndarray):
        raise ValueError(f"npy:{path}: an .npz archive, expected a .npy file of one array")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"npy:{path}: expected uint8 images [N, H, W], [N, H, W, 1] or [N, H, W, 3], "
            f"got {images.dtype} {images.shape}"
        )
    if images.size == 0:
        raise ValueError(f"npy:{path}: no image in it, its shape is {images.shape}")

    def load(index: int) -> tuple[Image.Image, None]:
        return Image.fromarray(
            images[index].squeeze(2) if images.shape[3] == 1 else images[index]
        ), None

    return Source(_Numbered(f"npy:{path}", len(images)), load, file_fingerprint(path))


class _KeyNames(Sequence):
    """Names `prefix[key]` of the entries of an LMDB, whose keys are bytes."""

    def __init__(self, prefix: str, keys: Sequence[bytes]):
        self._prefix, self._keys = prefix, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> str:
        return f"{self._prefix}[{self._keys[index].decode('ascii', 'backslashreplace')}]"


# One process can open an LMDB only once; sources that live at the same time share it.
_ENVIRONMENTS = weakref.WeakValueDictionary()


def _lmdb(path: pathlib.Path) -> Source:
    """LSUN's format: each value is an encoded image (WebP), in the order of the keys; no labels."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(f"lmdb:{path} needs lmdb: pip install lmdb") from error
    if not (path / "data.mdb").is_file():
        raise ValueError(f"lmdb:{path}: no data.mdb in it; name the folder that holds that file")
    fingerprint = file_fingerprint(path / "data.mdb")
    environment = _ENVIRONMENTS.get(fingerprint)
    try:
        if environment is None:
            # Without lock nothing is written: a lock file would be, even by a reader.
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            _ENVIRONMENTS[fingerprint] = environment
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise ValueError(f"lmdb:{path}: not a readable LMDB ({error})") from error
    if not keys:
        raise ValueError(f"lmdb:{path}: no image in it")
    names = _KeyNames(f"lmdb:{path}", keys)

    def load(index: int) -> tuple[Image.Image, None]:
        try:
            with environment.begin() as transaction:
                value = transaction.get(keys[index])
        except lmdb.Error as error:
            raise ValueError(f"{names[index]}: cannot be read ({error})") from error
        return decode(io.BytesIO(value), names[index]), None

    return Source(names, load, fingerprint)


def _digits() -> Source:
    """scikit-learn's 1,797 images, 8x8, 17 grey levels, inside that package: no download."""

    @functools.cache
    def arrays() -> tuple[np.ndarray, np.ndarray]:
        # Not needed once the cache is made, and slower to import than all else.
        from sklearn.datasets import load_digits

        digits = load_digits()
        return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target

    def load(index: int) -> tuple[Image.Image, int]:
        images, labels = arrays()
        return Image.fromarray(images[index]), int(labels[index])

    return Source(
        names=_Numbered("digits", 1_797),
        load=load,
        fingerprint=f"scikit-learn {importlib.metadata.version('scikit-learn')}",
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _photos() -> Source:
    """scikit-image's ten photographs, six of them in colour, inside that package: no download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise ValueError("photos needs scikit-image: pip install scikit-image")
    # Their files alone: the package takes a second to import.
    folder = pathlib.Path(spec.origin).parent / "data"
    if missing := [name for name in _PHOTOS if not (folder / name).is_file()]:
        raise ValueError(f"this scikit-image comes without {', '.join(missing)}: update it")

    def load(index: int) -> tuple[Image.Image, None]:
        with (folder / _PHOTOS[index]).open("rb") as stream:
            return decode(stream, f"photos/{_PHOTOS[index]}"), None

    return Source(
        names=[f"photos/{name}" for name in _PHOTOS],
        load=load,
        fingerprint=f"scikit-image {importlib.metadata.version('scikit-image')}",
    )


class _Chain(Sequence):
    """Sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]):
        self._parts, self._ends = parts, list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def split(self, index: int) -> tuple[int, int]:
        """(part, index in it)."""
        part = bisect.bisect_right(self._ends, index)
        return part, index - self._ends[part] + len(self._parts[part])

    def __getitem__(self, index: int) -> str:
        part, index = self.split(index)
        return self._parts[part][index]


def _joined(sources: Sequence[Source]) -> Source:
    """One source after the other, without classes: those of one are not those of another."""
    names = _Chain([source.names for source in sources])

    def load(index: int) -> tuple[Image.Image, None]:
        part, index = names.split(index)
        return sources[part].load(index)[0], None

    return Source(names, load, fingerprint_of([source.fingerprint for source in sources]))


def _tfds(argument: str, data_dir: str, download: bool) -> Source:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"tfds:{argument} needs tensorflow-datasets: "
            "pip install tensorflow-datasets importlib_resources"
        ) from error
    name, _, split = argument.partition(":")
    split, data_dir = split or "train", data_dir and str(storage.local(data_dir, "data.data_dir"))
    try:
        # array_record is the format that can be read at random and without TensorFlow.
        builder = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
        if download:
            builder = tfds.builder(
                name, data_dir=data_dir or None, file_format="array_record", try_gcs=False
            )
            builder.download_and_prepare()
        records = builder.as_data_source(split)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{argument}: no data set is called {name!r}") from error
    except NotImplementedError as error:
        raise ValueError(
            f"tfds:{argument}: not prepared in array_record format in {builder.data_dir}; set "
            "data.data_dir to where it is, or prepare it once with data.download=True"
        ) from error
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"tfds:{argument}: it has no feature 'image', only {sorted(features)}")
    class_names = tuple(features["label"].names) if "label" in features else ()

    def load(index: int) -> tuple[Image.Image, int | None]:
        record = records[index]
        image = record["image"]
        label = int(record["label"]) if class_names else None
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), label

    fingerprint = f"{builder.info.full_name} {split} {builder.data_dir} {len(records)}"
    return Source(_Numbered(f"tfds:{argument}", len(records)), load, fingerprint, class_names)
