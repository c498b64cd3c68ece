"""Moments of a data set's DCT coefficients, in one pass over any number of images.

The spectrum of `spectra.power_spectrum` for sets that do not fit in memory as floats: chunks of
images are merged exactly (Chan, Golub and LeVeque 1979).
"""

import jax
import numpy as np
from tqdm import tqdm

from warm_diffusion import dct
from warm_diffusion.data.images import from_uint8

_CHUNK = 2048


@jax.jit
def _chunk_moments(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    coefficients = dct.dct(from_uint8(images))
    return coefficients.mean(axis=(0, 3)), coefficients.var(axis=(0, 3))


def coefficient_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each DCT coefficient over images and channels.

    Args:
      images: uint8 [N, H, W, C], possibly memory-mapped.

    Returns:
      (mean, variance), float64 [H, W]; the variance is the power spectrum of the data.
    """
    count, mean, scatter = 0, 0.0, 0.0
    with tqdm(total=len(images), desc="spectrum", unit=" images", disable=None) as bar:
        for first in range(0, len(images), _CHUNK):
            chunk = np.asarray(images[first : first + _CHUNK])
            new_mean, variance = (np.asarray(a, np.float64) for a in _chunk_moments(chunk))
            added, difference = len(chunk) * chunk.shape[3], new_mean - mean
            # The scatter of two groups is theirs plus that between their means.
            scatter = scatter + variance * added
            scatter = scatter + difference**2 * count * added / (count + added)
            mean = mean + difference * added / (count + added)
            count += added
            bar.update(len(chunk))
    return mean, scatter / count
