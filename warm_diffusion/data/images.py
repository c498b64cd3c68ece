"""Pixels in and out: uint8 <-> [-1, 1], image files read, grids, PNG files written.

    (1)  x  = u / 127.5 - 1                       uint8 u to float x
    (2)  u  = floor(clip(127.5 x + 128, 0, 255))  and back, the one rounding in the project

(2) inverts (1) exactly. Samples are clipped, never stretched to their own minimum and maximum.
"""

import io
import pathlib
import struct
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from warm_diffusion.runtime import storage

# What an image file may be, by its content. Pillow would open others too, and start Ghostscript for
# PostScript that is named a.png.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")


# Pillow keeps the upper 8 of 16 bits per channel. In the other order of bytes it keeps the lower 8.
_OTHER_BYTES = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}


def decode(stream: io.BufferedIOBase, name: str, *, low_bytes: bool = False) -> Image.Image:
    """An image file, turned as its EXIF orientation says.

    With `low_bytes` of an image of 16 bits per channel the lower 8, where its upper 8 come without.

    Raises:
      ValueError: `name` is damaged, is none of `FORMATS`, or holds several frames or pages.
    """
    try:
        image = Image.open(stream, formats=FORMATS)
        # Telephones append pictures to a JPEG (MPO); the first one is the photograph.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if low_bytes:
            image.tile = [_of_low_bytes(tile) for tile in image.tile]
        grey = image.mode == "RGBA" and _kinds(image) == ["LA;16B"]
        image.load()
        image = image.convert("LA") if grey else image
    # Pillow reports damage by many types: OSError, SyntaxError (broken PNG), its bomb error.
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else error
        raise ValueError(
            f"{name}: not a readable image ({reason}); replace it or take it out"
        ) from error
    if frames > 1:
        raise ValueError(f"{name}: holds {frames} frames or pages, expected one; save one of them")
    try:
        return ImageOps.exif_transpose(image)
    # Broken metadata, by as many types, makes no sound image unreadable.
    except Exception:
        return image


def _of_low_bytes(tile):
    """Pillow's instruction how to unpack a part of an image, in the other order of bytes."""
    kind, *others = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    kind = kind[:-4] + _OTHER_BYTES[kind[-4:]]
    return tile._replace(args=(kind, *others) if others else kind)


def is_deep(stream: io.BufferedIOBase) -> bool:
    """Whether an image file in colour has 16 bits per channel; ValueError where it is none."""
    kinds = _kinds(Image.open(stream, formats=FORMATS))
    # Of grey, I and LA, Pillow has no other order of bytes.
    return bool(kinds) and all(kind[-4:] in _OTHER_BYTES and kind[0] not in "IL" for kind in kinds)


def _kinds(image: Image.Image) -> list[str]:
    """How Pillow unpacks the parts of an image that is not loaded yet."""
    kinds = [tile.args[0] if isinstance(tile.args, tuple) else tile.args for tile in image.tile]
    return [str(kind) for kind in kinds]


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 images to float32 in [-1, 1], eq. (1); runs inside a jitted step."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [-1, 1] to uint8, eq. (2); ValueError for NaN, which black would hide."""
    return quantized(_finite(images))


def to_uint16(images: np.ndarray) -> np.ndarray:
    """The same to uint16, floor(clip(32767.5 x + 32768, 0, 65535))."""
    return (_finite(images) * 32767.5 + 32768).clip(0, 65535).astype(np.uint16)


def _finite(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images, np.float32)
    if not np.all(np.isfinite(images)):
        raise ValueError(
            "images are not finite: the network, its levels or the solver's settings do not work"
        )
    return images


def quantized(images: jax.typing.ArrayLike):
    """Eq. (2) alone, of a numpy array or inside a jitted function; NaN becomes anything."""
    return (images * 127.5 + 128).clip(0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int = 0, min_side: int = 0) -> np.ndarray:
    """One picture [height, width, C] of uint8 images [N, H, W, C], two white pixels apart.

    Args:
      images: are put row by row.
      columns: images per row; 0 for the nearest to a square.
      min_side: images smaller than this are enlarged by whole factors (each pixel a block).
    """
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images [N, H, W, C], got {images.dtype} {images.shape}")
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    factor = max(1, -(-min_side // max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    gap, (height, width) = 2, images.shape[1:3]
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def png(image: np.ndarray, profile: bytes | None = None) -> bytes:
    """A uint8 or uint16 image [H, W, 1] (grey) or [H, W, 3] as a PNG file, with its ICC profile."""
    if image.dtype == np.uint16 and image.shape[-1] == 3:
        return _png_of_48_bits(image, profile)
    content = io.BytesIO()
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    image.save(content, "PNG", icc_profile=profile)
    return content.getvalue()


def _png_of_48_bits(image: np.ndarray, profile: bytes | None) -> bytes:
    """Pillow writes no more than 8 bits per channel. Each row is stored as the change from the row
    above, filter 2 of the format, which is simple and nearly as small as the best."""
    height, width, _ = image.shape
    rows = image.astype(">u2").view(np.uint8).reshape(height, -1)
    rows[1:] -= rows[:-1]
    rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=2)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    if profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes one uint8 image as PNG, see `png`."""
    storage.write_bytes(path, png(image))


def save_pngs(folder: pathlib.Path, images: np.ndarray, names: Sequence[int]) -> None:
    """Writes uint8 images [N, H, W, C] as `folder`/NNNNNN.png."""
    for first in range(0, len(images), 256):  # as many as are kept in memory at once
        part = zip(names[first : first + 256], images[first : first + 256], strict=True)
        storage.write_files({folder / f"{name:06d}.png": png(image) for name, image in part})
