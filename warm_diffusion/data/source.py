"""What a source of images is."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Source:
    """A numbered set of images.

    Attributes:
      count: () -> number of images; only called when a cache has to be made.
      load: index -> (decoded image, label or None); raises ValueError naming the image.
      name: index -> what a message calls that image.
      fingerprint: changes whenever the images do.
      class_names: names of the labels, empty without labels.
    """

    count: Callable[[], int]
    load: Callable[[int], tuple[Image.Image, int | None]]
    name: Callable[[int], str]
    fingerprint: str
    class_names: tuple[str, ...] = ()


def fingerprint(lines: Sequence[str]) -> str:
    """SHA-256 of some lines."""
    # On POSIX a file name is bytes, and need not be text.
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def fingerprint_of_files(paths: Sequence[pathlib.Path]) -> str:
    """A fingerprint of the files' paths, sizes and times, without reading them."""
    stats = [(path, path.stat()) for path in paths]
    return fingerprint([f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats])


def numbered_classes(labels: Sequence[int], where: str) -> tuple[str, ...]:
    """Names "0", "1", ... for labels that come without names.

    Raises:
      ValueError: a label that is no number of a class.
    """
    lowest, highest = min(labels, default=0), max(labels, default=0)
    if lowest < 0 or highest >= 100_000:
        raise ValueError(
            f"{where}: labels must lie between 0 and 99,999, got {lowest} to {highest}"
        )
    return tuple(str(label) for label in range(highest + 1))
