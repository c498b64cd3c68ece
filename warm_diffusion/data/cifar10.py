"""CIFAR-10 in its authors' files (Krizhevsky 2009): binary or Python version, packed or not.

A binary file is records of a label and 3072 bytes, a Python file a pickle by Python 2 of `labels`
and `data` [N, 3072]; either way an image is [3, 32, 32], red first. Nothing in a pickle is run: it
may name numpy's arrays, and nothing else.
"""

import io
import pathlib
import tarfile

import numpy as np

from warm_diffusion import public
from warm_diffusion.data.source import Source, fingerprint_of_files, of_arrays
from warm_diffusion.runtime import storage, torch_files

_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_FILES = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
_TARS = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
_FOLDERS = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}  # and the files' ending
_RECORD = 1 + 3 * 32 * 32


def cifar10(split: str, data_dir: str, download: bool) -> Source:
    """The `train` or `test` images, in their files' order.

    They are looked for in `data_dir`, then in the cache folder of public files; where they are not
    there, `download` fetches them.
    """
    if split not in _FILES:
        raise ValueError(f"cifar10:{split}: its splits are {' and '.join(_FILES)}")
    place = _find(data_dir) or public.obtain(_TARS[0], download=download)
    names, paths = _FILES[split], [place]
    if place.is_dir():
        paths = [place / f"{name}{_FOLDERS[place.name]}" for name in names]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"cifar10:{split}: {place} is without {', '.join(missing)}")

    def arrays() -> tuple[np.ndarray, np.ndarray]:
        if place.is_dir():
            found = {path.name: path.read_bytes() for path in paths}
        else:
            found = _from_tar(place, names)
        parts = [_batch(name, content, place) for name, content in found.items()]
        pixels, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels

    return of_arrays(f"cifar10:{split}", arrays, fingerprint_of_files(paths), _CLASSES)


def _find(data_dir: str) -> pathlib.Path | None:
    folders = [public.default_folder()]
    if data_dir:
        named = storage.local(data_dir, "data.data_dir")
        if named.name in _FOLDERS and named.is_dir():
            return named
        folders.insert(0, named)
    places = [folder / name for folder in folders for name in (*_FOLDERS, *_TARS)]
    return next((place for place in places if place.exists()), None)


def _from_tar(path: pathlib.Path, names: tuple[str, ...]) -> dict[str, bytes]:
    wanted = [f"{name}{ending}" for name in names for ending in _FOLDERS.values()]
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and name in wanted:
                    found[name] = archive.extractfile(member).read()
    # Damage comes as ReadError, EOFError, zlib.error and others.
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or fetch it again") from error
    if len(found) != len(names):
        raise ValueError(f"{path}: expected {', '.join(names)} in it, got {sorted(found)}")
    return dict(sorted(found.items()))


def _batch(name: str, content: bytes, place: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N] of one file."""
    try:
        if name.endswith(".bin"):
            records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
            pixels, labels = records[:, 1:], records[:, 0]
        else:
            batch, _ = torch_files.unpickle(io.BytesIO(content), _ALLOWED, encoding="latin1")
            pixels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
        expected = (len(labels), 3 * 32 * 32)
        if pixels.dtype != np.uint8 or pixels.shape != expected or labels.ndim != 1:
            raise ValueError(f"expected uint8 pixels {expected}, got {pixels.dtype} {pixels.shape}")
        if not np.all((labels >= 0) & (labels < 10)):
            raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, expected 0 to 9")
    # A damaged pickle is reported by nearly every type.
    except Exception as error:
        raise ValueError(f"{place}: {name} is not CIFAR-10's ({error})") from error
    return pixels, labels


# What a pickle may name, and what stands for it.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # How an array begins under the names of numpy 1 and 2; its content comes afterwards.
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8),
    # How Python 3 writes bytes for Python 2.
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}
