"""The spectrum of images of other sizes than those that it was measured on.

A spectrum S_k (`spectra.py`) of images H x W holds at any size, by frequency: an orthonormal DCT
coefficient of a stationary image has the variance that the image's power spectral density has at
(i / 2H, j / 2W) cycles per pixel, however large the image. So with lambda as in `dct.py`, eq. (2),

    (1)  lambda S    interpolated linearly between the frequencies of H x W, along each axis
    (2)  S           = that / lambda at the frequencies of the new size
    (3)  S_DC        times the ratio of the areas: the variance of an image's mean is kept

At frequencies lower than the first of H x W, (1) goes on with the mean of the first of both axes:
S ~ 1 / f^2, the law of photographs, which looks the same at every scale and for which (2) is exact.
Beyond the last frequency, lambda S stays. (3) is an upper bound: larger images have means that vary
less.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct


def _interpolation(new: int, old: int) -> np.ndarray:
    """The matrix [new, old] from values at i / old to those at i / new: linear, then constant."""
    position = np.minimum(np.arange(new) * old / new, old - 1)
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(old)))


def spectrum_at(spectrum: ArrayLike, height: int, width: int) -> jax.Array:
    """The spectrum of the same kind of images at another size, eqs. (1)-(3).

    Args:
      spectrum: variance (or mean square) of each DCT coefficient [H, W].
      height: of the other images.
      width: of the other images.

    Returns:
      [height, width]; at the size of `spectrum` itself.

    Raises:
      ValueError: spectrum is not [H, W].

    Example:
      A spectrum 1 / lambda stays one; the variance of the mean, 4 / (2 x 2), too.

      >>> spectrum = 1 / np.maximum(dct.eigenvalues(2, 2), np.pi**2 / 36) * [[1 / 9, 1], [1, 1]]
      >>> larger = sizes.spectrum_at(spectrum, 4, 6) * dct.eigenvalues(4, 6)
      >>> print(np.asarray(larger)[1].round(4))
      [1. 1. 1. 1. 1. 1.]
    """
    spectrum = jnp.asarray(spectrum, dtype=float)
    if spectrum.ndim != 2:
        raise ValueError(f"expected a spectrum [H, W], got {spectrum.shape}")
    old = spectrum.shape
    if old == (height, width):
        return spectrum
    flat = spectrum * _dct.eigenvalues(*old)
    first = [flat[index] for index, size in (((1, 0), old[0]), ((0, 1), old[1])) if size > 1]
    flat = flat.at[0, 0].set(sum(first) / max(len(first), 1))
    rows, columns = (
        jnp.asarray(_interpolation(*pair), flat.dtype)
        for pair in ((height, old[0]), (width, old[1]))
    )
    flat = jnp.einsum("ih,hw,jw->ij", rows, flat, columns, precision=jax.lax.Precision.HIGHEST)
    eigen = _dct.eigenvalues(height, width).at[0, 0].set(1.0)
    area = height * width / spectrum.size
    return (flat / eigen).at[0, 0].set(spectrum[0, 0] * area)
