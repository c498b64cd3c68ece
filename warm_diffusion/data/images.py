"""Pixels in and out: uint8 <-> [-1, 1], grids, PNG files.

    (1)  x  = u / 127.5 - 1                       uint8 u to float x
    (2)  u  = floor(clip(127.5 x + 128, 0, 255))  and back, the one rounding in the project

(2) inverts (1) exactly. Samples are clipped, never stretched to their own minimum and maximum.
"""

import io
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from warm_diffusion.runtime import storage


def from_uint8(images: jax.Array) -> jax.Array:
    """uint8 images to float32 in [-1, 1], eq. (1); runs inside a jitted step."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [-1, 1] to uint8, eq. (2).

    Raises:
      ValueError: numbers that are not finite; black would hide them.
    """
    images = np.asarray(images, np.float32)
    if not np.all(np.isfinite(images)):
        raise ValueError(
            "images are not finite: the network, its levels or the solver's settings do not work"
        )
    return quantized(images)


def quantized(images: jax.typing.ArrayLike):
    """Eq. (2) alone, of a numpy array or inside a jitted function; NaN becomes anything."""
    return (images * 127.5 + 128).clip(0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int = 0, min_side: int = 0) -> np.ndarray:
    """Tiles uint8 images [N, H, W, C] row by row, two white pixels apart.

    Args:
      images: uint8 [N, H, W, C].
      columns: images a row; 0 for the nearest to a square.
      min_side: images smaller than this are enlarged by whole factors (each pixel a block).

    Returns:
      uint8 [height, width, C].
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


def png(image: np.ndarray) -> bytes:
    """A uint8 image [H, W, 1] (grey) or [H, W, 3] as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()


def save_png(path: pathlib.Path, image: np.ndarray) -> None:
    """Writes one uint8 image as PNG, see `png`."""
    storage.write_bytes(path, png(image))


def save_pngs(folder: pathlib.Path, images: np.ndarray, names: Sequence[int]) -> None:
    """Writes uint8 images [N, H, W, C] as `folder`/NNNNNN.png."""
    for first in range(0, len(images), 256):  # as many as are kept in memory at once
        part = zip(names[first : first + 256], images[first : first + 256], strict=True)
        storage.write_files({folder / f"{name:06d}.png": png(image) for name, image in part})
