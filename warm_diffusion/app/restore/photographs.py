"""Photographs as people have them, into arrays in [-1, 1] and back: orientation, transparency,
depth, colour profile."""

import hashlib
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from warm_diffusion.data.files import SUFFIXES
from warm_diffusion.data.images import FORMATS, decode, is_deep, png, to_uint8, to_uint16
from warm_diffusion.runtime import storage

_LUMINANCE_AT_50 = 3688  # sum of the JPEG standard's table, which a quality scales


def find(where: str, flag: str) -> dict[str, pathlib.Path]:
    """The photographs in a file or a folder, by `name`.

    Raises:
      ValueError: nothing there, no image in it, or two of one name.
    """
    place = storage.local(where, flag)
    if place.is_file():
        return {name(place): place}
    if not place.is_dir():
        raise ValueError(f"{flag}: there is no file or folder {place}")
    found: dict[str, pathlib.Path] = {}
    for path in sorted(place.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if not path.is_file():  # a pipe would be waited for without end
            raise ValueError(f"{flag}: {path} is not a regular file; take it out")
        if name(path) in found:
            raise ValueError(
                f"{flag}: {found[name(path)].name} and {path.name} would have one name: rename one"
            )
        found[name(path)] = path
    if not found:
        raise ValueError(f"{flag}: no image ({', '.join(SUFFIXES)}) in {place}")
    return found


def name(path: pathlib.Path) -> str:
    """The file's name without its ending, where it can be a file's name again with another ending
    and is text; otherwise what can be kept of it with a hash of all."""
    plain = "".join(letter if letter.isprintable() else "_" for letter in path.stem)
    if plain == path.stem and len(plain.encode()) <= 200:
        return plain
    kept = plain.encode()[:150].decode(errors="ignore")
    return f"{kept}_{hashlib.sha256(os.fsencode(path.stem)).hexdigest()[:8]}"


class Photograph(NamedTuple):
    """A photograph and what is kept of its file."""

    pixels: np.ndarray  # [H, W, C] in [-1, 1], upright
    bits: int  # a colour: 8 or 16
    profile: bytes | None  # ICC
    quality: int | None  # of a JPEG, 1 to 100

    def png(self, pixels: np.ndarray) -> bytes:
        """A PNG file of other pixels, of this depth and in these colours."""
        return png((to_uint16 if self.bits == 16 else to_uint8)(pixels), self.profile)


def read(path: pathlib.Path, channels: int) -> Photograph:
    """A photograph, upright, at the depth that it has.

    Transparency that hides nothing is dropped.

    Raises:
      ValueError: no image, transparent pixels, another kind of colours, or grey for a network of
        colours and the reverse.
    """
    content = path.read_bytes()
    image = decode(io.BytesIO(content), str(path))
    profile = image.info.get("icc_profile")
    tags = getattr(Image.open(io.BytesIO(content), formats=FORMATS), "tag_v2", {})
    # Pillow reads planes (tag 284) of more bits per channel (258) than 8 as noise or as 8 bits.
    if tags.get(284) == 2 and image.mode == "RGB" and max(tags[258]) > 8:
        raise ValueError(
            f"{path}: has {max(tags[258])} bits per channel in separate planes, expected the "
            "colours of a pixel together: save it as a PNG"
        )
    if image.mode in ("I;16", "I;16L", "I;16B"):  # unsigned; I and I;16S have no known white
        pixels, bits = np.asarray(image).astype(np.float32), 16
        # Pillow turns a TIFF whose white is zero (tag 262) only where it has 8 bits.
        pixels = 65535 - pixels if tags.get(262) == 0 else pixels
    elif is_deep(io.BytesIO(content)):
        low = decode(io.BytesIO(content), str(path), low_bytes=True)
        pixels, bits = _colours(image, path).astype(np.float32) * 256 + _colours(low, path), 16
    else:
        pixels, bits = _colours(image, path).astype(np.float32), 8
    pixels = np.atleast_3d(pixels)
    if pixels.shape[0] * pixels.shape[1] == 1:
        raise ValueError(
            f"{path}: has one pixel, expected at least two, for one shows no blur: take it out"
        )
    if pixels.shape[2] != channels:
        kinds = {1: "grey", 3: "in colour"}
        raise ValueError(
            f"{path}: is {kinds[pixels.shape[2]]}, but this network restores images that are "
            f"{kinds[channels]}: convert it, or give another --checkpoint"
        )
    return Photograph(pixels * (2 / (2**bits - 1)) - 1, bits, profile, _quality(content))


def _colours(image: Image.Image, path: pathlib.Path) -> np.ndarray:
    """Bytes [H, W] or [H, W, 3] of an image without transparency or with one that hides nothing."""
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
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"{path}: has colours of kind {image.mode}: convert it to RGB first")
    return np.asarray(image)


def _quality(content: bytes) -> int | None:
    """The quality of a JPEG by the sum of its table for brightness; None for other files."""
    tables = getattr(Image.open(io.BytesIO(content), formats=FORMATS), "quantization", None)
    if not tables:
        return None
    scale = 100 * sum(tables[min(tables)]) / _LUMINANCE_AT_50
    return max(1, round(100 - scale / 2 if scale <= 100 else 5000 / scale))
