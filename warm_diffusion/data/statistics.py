"""Mean image and spectrum of a data set, in one pass over any number of images.

The spectrum is that of `spectra.power_spectrum`, for sets that do not fit in memory as floats.
"""

from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from warm_diffusion import dct
from warm_diffusion.data.images import from_uint8

_CHUNK = 2048


class Statistics(NamedTuple):
    """Statistics of the training data that a network carries, float32."""

    mean: np.ndarray  # image [H, W, C] in [-1, 1]
    spectrum: np.ndarray  # variance of each DCT coefficient over images and channels [H, W]


@jax.jit
def _chunk_moments(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    coefficients = dct.dct(from_uint8(images))
    return coefficients.mean(axis=(0, 3)), coefficients.var(axis=(0, 3))


def statistics(images: np.ndarray) -> Statistics:
    """Mean image and spectrum of uint8 images [N, H, W, C], possibly memory-mapped."""
    total = np.zeros(images.shape[1:], np.int64)
    mean, square = (
        0.0,
        0.0,
    )  # of the coefficients, float64
    with tqdm(total=len(images), desc="spectrum", unit=" images", disable=None) as bar:
        for first in range(0, len(images), _CHUNK):
            chunk = np.asarray(images[first : first + _CHUNK])
            total += chunk.sum(axis=0, dtype=np.int64)
            own, variance = (np.asarray(a, np.float64) for a in _chunk_moments(chunk))
            share = len(chunk) / len(images)
            mean, square = mean + share * own, square + share * (variance + own**2)
            bar.update(len(chunk))
    mean_image = total / (127.5 * len(images)) - 1
    return Statistics(mean_image.astype(np.float32), (square - mean**2).astype(np.float32))
