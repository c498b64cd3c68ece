"""Photographs as people have them, into arrays in [-1, 1]: orientation, transparency, depth."""

import io
import pathlib

import numpy as np

from warm_diffusion.data.files import SUFFIXES
from warm_diffusion.data.images import decode
from warm_diffusion.runtime import storage


def find(where: str, flag: str) -> dict[str, pathlib.Path]:
    """The photographs in a file or a folder, by the name of the file without its ending.

    Raises:
      ValueError: nothing there, no image in it, or two of one name.
    """
    place = storage.local(where, flag)
    if place.is_file():
        return {place.stem: place}
    if not place.is_dir():
        raise ValueError(f"{flag}: there is no file or folder {place}")
    found: dict[str, pathlib.Path] = {}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if not path.is_file():  # a pipe would be waited for without end
            raise ValueError(f"{flag}: {path} is not a regular file; take it out")
        if path.stem in found:
            raise ValueError(
                f"{flag}: {found[path.stem].name} and {path.name} would have one name: rename one"
            )
        found[path.stem] = path
    if not found:
        raise ValueError(f"{flag}: no image ({', '.join(SUFFIXES)}) in {place}")
    return found


def read(path: pathlib.Path, channels: int) -> np.ndarray:
    """A photograph [H, W, channels] in [-1, 1], upright.

    Transparency that hides nothing is dropped; 16 bits keep their depth where Pillow reads them.

    Raises:
      ValueError: no image, transparent pixels, another kind of colours, or grey for a network of
        colours and the reverse.
    """
    image = decode(io.BytesIO(path.read_bytes()), str(path))
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            raise ValueError(
                f"{path}: has transparent pixels, which have neither blur nor noise: put it on a "
                "background first"
            )
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode in ("I;16", "I;16L", "I;16B"):  # unsigned; I and I;16S have no known white
        pixels, largest = np.asarray(image).astype(np.float32), 65535
    elif image.mode in ("L", "RGB"):
        pixels, largest = np.asarray(image).astype(np.float32), 255
    else:
        raise ValueError(f"{path}: has colours of kind {image.mode}: convert it to RGB first")
    pixels = np.atleast_3d(pixels)
    if pixels.shape[2] != channels:
        kinds = {1: "grey", 3: "in colour"}
        raise ValueError(
            f"{path}: is {kinds[pixels.shape[2]]}, and this network restores images that are "
            f"{kinds[channels]}"
        )
    return pixels * (2 / largest) - 1
