"""The interface of a source of images."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Source:
    """A numbered set of images."""

    count: Callable[[], int]  # only called when a cache has to be made
    load: Callable[[int], tuple[Image.Image, int | None]]  # with its label; ValueError names it
    name: Callable[[int], str]  # what a message calls an image
    fingerprint: str  # changes whenever the images do
    class_names: tuple[str, ...] = ()  # names of the labels; empty without labels


def of_arrays(
    where: str,
    arrays: Callable[[], tuple[np.ndarray, Sequence[int] | None]],
    fingerprint: str,
    class_names: tuple[str, ...] = (),
) -> Source:
    """A source of uint8 images [N, H, W] or [N, H, W, C], and labels, which are read when used."""
    arrays = functools.cache(arrays)

    def load(index: int) -> tuple[Image.Image, int | None]:
        images, labels = arrays()
        image = np.ascontiguousarray(images[index])
        if image.shape[2:] == (1,):
            image = image[..., 0]
        return Image.fromarray(image), int(labels[index]) if class_names else None

    name = lambda index: f"{where}[{index}]"  # noqa: E731
    return Source(lambda: len(arrays()[0]), load, name, fingerprint, class_names)


def fingerprint(lines: Sequence[str]) -> str:
    """SHA-256 of some lines."""
    # On POSIX a file name is bytes, and need not be text.
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint_of_files(paths: Sequence[pathlib.Path]) -> str:
    """A fingerprint of the files' paths, sizes and times, without reading them."""
    stats = [(path, path.stat()) for path in paths]
    return fingerprint([f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats])


def numbered_classes(labels: Sequence[int], where: str) -> tuple[str, ...]:
    """Names "0", "1", ... for labels that come without; ValueError for one that is no class."""
    lowest, highest = min(labels, default=0), max(labels, default=0)
    if lowest < 0 or highest >= 100_000:
        raise ValueError(
            f"{where}: labels must lie between 0 and 99,999, got {lowest} to {highest}"
        )
    return tuple(str(label) for label in range(highest + 1))
