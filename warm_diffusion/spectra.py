"""Power spectra in the DCT basis, the blur-to-noise ratio that they recommend, and departures.

    (1)  S_k  = variance of DCT coefficient k over the data
    (2)  noise takes over coefficient k at beta^2 = S_k; on a path of ratio rho the blur has by then
         left m_k = exp(-lambda_k rho^2 S_k / 2) of it

The blur is harmless where 1 - m_k is small: what it removes was already hidden by noise. For
natural images S_k ~ 1 / lambda_k, so (2) is about equal over all bands and one ratio serves all:
the paper's constant BNR (sec. 3.3), the ratio read off the data instead of searched for (ours).

How far a sampler's states x are from the forward process at the same level (ours; the paper argues
it from a drawing):

    (3)  spectral departure    ln of the power of x over m^2 S + beta^2, by ring of frequencies

A spectrum of data of one size holds at any other, by frequency: an orthonormal DCT coefficient of a
stationary image has the variance that the image's power spectral density has at k_axis / (2 size)
cycles per pixel, however large the image. So with lambda as in `dct.py`, eq. (2),

    (4)  lambda S    interpolated linearly between the frequencies of the old size, along each axis
    (5)  S           = that / lambda at the frequencies of the new size
    (6)  S_DC        times the ratio of the areas: the variance of an image's mean is kept

At frequencies lower than the first of the old size, (4) goes on with the mean of the first of all
axes: S ~ 1 / f^2, the law of photographs, which looks the same at every scale and for which (5) is
exact. Beyond the last frequency, lambda S stays. (6) is an upper bound: larger images have means
that vary less.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct

PAPER_RATIOS = (0.1, 0.3, 0.5, 0.65, 1.0, 2.0, 10.0)  # Warm Diffusion, CIFAR-10


def power_spectrum(images: ArrayLike) -> jax.Array:
    """Variance of each DCT coefficient over images and channels, eq. (1).

    Args:
      images: [N, *spatial, C].

    Returns:
      [*spatial], float32 at least; its mean is the variance of a pixel around the mean image.

    Raises:
      ValueError: images are not a float array [N, *spatial, C].

    Example:
      One pixel, as often -1 as 1: variance 1.

      >>> spectrum = spectra.power_spectrum(np.array([-1.0, 1.0]).reshape(2, 1, 1, 1))
      >>> round(float(spectrum[0, 0]), 4)
      1.0
    """
    return jnp.var(_dct._dct(_dct._wide(_dct._array(images, "images"))), axis=(0, -1))


def _rings(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """Ring of each coefficient [*sizes], and the mean frequency of each ring [K]."""
    radius = np.sqrt(_dct._squares(*sizes))  # 1: the Nyquist frequency, half a cycle per pixel
    _, band = np.unique(np.rint(radius * max(sizes)), return_inverse=True)
    band = band.reshape(sizes)
    counts = np.bincount(band.ravel())
    return band, np.bincount(band.ravel(), weights=radius.ravel() / 2) / counts


def _ring_means(values: np.ndarray) -> np.ndarray:
    """Mean over each ring [K] in float64."""
    band = _rings(*values.shape)[0].ravel()
    return np.bincount(band, weights=np.ravel(values)) / np.bincount(band)


def radial_mean(spectrum: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Average over rings of equal frequency, one ring per cycle over the longest side times two.

    Args:
      spectrum: [*spatial], indexed as `dct.dct` does.

    Returns:
      (frequency, mean), both [K]: the ring's mean frequency in cycles per pixel, from 0 (the mean
      of the image, alone) to about 0.5 times the root of the number of axes (the corner), and the
      mean of `spectrum` over it.

    Example:
      Four coefficients make two rings: the mean alone, and (1 + 3 + 5) / 3.

      >>> frequency, mean = spectra.radial_mean(np.array([[9.0, 1.0], [3.0, 5.0]]))
      >>> print(np.asarray(frequency).round(3), np.asarray(mean).round(3))
      [0.    0.285] [9. 3.]
    """
    spectrum = _spectrum(spectrum)
    band, frequency = _rings(*spectrum.shape)
    total = jax.ops.segment_sum(spectrum.ravel(), jnp.asarray(band.ravel()), len(frequency))
    counts = jnp.asarray(np.bincount(band.ravel()), spectrum.dtype)
    return jnp.asarray(frequency, spectrum.dtype), total / counts


def _spectrum(spectrum: ArrayLike) -> jax.Array:
    """A spectrum as an array of floats; ValueError if it has no axis."""
    spectrum = jnp.asarray(spectrum)
    if spectrum.ndim == 0:
        raise ValueError("expected a spectrum [*spatial], got a number")
    return _dct._wide(_dct._floating(spectrum))


def _checked(spectrum: ArrayLike, attenuation: float = 0.5) -> np.ndarray:
    """The spectrum in float64; ValueError unless a path can be chosen by it."""
    spectrum = np.asarray(spectrum, np.float64)
    if not 0 < attenuation < 1:
        raise ValueError(f"attenuation must lie between 0 and 1, got {attenuation}")
    if spectrum.ndim == 0 or not np.all(np.isfinite(spectrum)) or np.any(spectrum < 0):
        raise ValueError(f"expected a finite spectrum [*spatial] >= 0, got shape {spectrum.shape}")
    if not np.any(spectrum.ravel()[1:] > 0):
        raise ValueError(
            "the images have no detail to blur: every DCT coefficient but DC is constant"
        )
    return spectrum


def least_kept(spectrum: ArrayLike, bnr: float) -> float:
    """Returns what blur leaves of the worst ring of frequencies when noise reaches it, eq. (2).

    Args:
      spectrum: S_k [*spatial], concrete (not traced).
      bnr: blur-to-noise ratio of the path.

    Returns:
      The smallest mean of m_k over a ring, in [0, 1]; 1 - attenuation at `recommend_bnr`'s ratio.

    Example:
      >>> round(spectra.least_kept(np.array([[1.0, 2 / (np.pi**2 / 4)]]), 1.0), 4)
      0.3679
    """
    spectrum = np.asarray(spectrum, np.float64)
    kept = np.exp(-_dct._eigenvalues(*spectrum.shape) * bnr**2 * spectrum / 2)
    return float(np.min(_ring_means(kept)))


def recommend_bnr(spectrum: ArrayLike, attenuation: float = 0.05) -> float:
    """Largest ratio at which blur removes at most `attenuation` of what noise has not yet hidden.

    The largest rho for which the radially averaged 1 - m_k of eq. (2) stays within `attenuation`
    in every band; CIFAR-10 gives about 0.53, the paper's best ratio is 0.5.

    Args:
      spectrum: S_k [*spatial], concrete (not traced).
      attenuation: share in (0, 1).

    Raises:
      ValueError: attenuation out of range, or images without any detail (no variance beyond DC).

    Example:
      With S = 2 / lambda a ratio rho leaves exp(-rho^2): half of it at (ln 2)^1/2.

      >>> round(spectra.recommend_bnr(np.array([[1.0, 8 / np.pi**2]]), 0.5), 4)
      0.8326
    """
    spectrum = _checked(spectrum, attenuation)
    exponent = _dct._eigenvalues(*spectrum.shape) * spectrum / 2

    def worst(bnr: float) -> float:
        return np.max(_ring_means(-np.expm1(-exponent * bnr**2)))

    # A band with some coefficients that never vary may stay within `attenuation` for ever.
    low, high = 0.0, 1.0
    while worst(high) <= attenuation:
        if high > 1e12:
            raise ValueError(
                f"no blur removes more than {attenuation} of any band of this spectrum"
            )
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle) <= attenuation else (low, middle)
    return low


def _interpolation(new: int, old: int) -> np.ndarray:
    """The matrix [new, old] from values at i / old to those at i / new: linear, then constant."""
    position = np.minimum(np.arange(new) * old / new, old - 1)
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(old)))


def spectrum_at(spectrum: ArrayLike, *sizes: int) -> jax.Array:
    """The spectrum of the same kind of data at another size, eqs. (4)-(6).

    Args:
      spectrum: variance (or mean square) of each DCT coefficient [*spatial].
      *sizes: of the other data, one per axis.

    Returns:
      [*sizes]; at the size of `spectrum` itself.

    Raises:
      ValueError: another number of axes.

    Example:
      A spectrum 1 / lambda stays one; the variance of the mean, 4 / (2 x 2), too.

      >>> spectrum = 1 / np.maximum(dct.eigenvalues(2, 2), np.pi**2 / 36) * [[1 / 9, 1], [1, 1]]
      >>> larger = spectra.spectrum_at(spectrum, 4, 6) * dct.eigenvalues(4, 6)
      >>> print(np.asarray(larger)[1].round(4))
      [1. 1. 1. 1. 1. 1.]
    """
    spectrum = _spectrum(spectrum)
    if spectrum.ndim != len(sizes):
        raise ValueError(f"expected a spectrum of {len(sizes)} axes, got {spectrum.shape}")
    old = spectrum.shape
    if old == sizes:
        return spectrum
    dc, dtype = (0,) * len(sizes), spectrum.dtype
    flat = spectrum * jnp.asarray(_dct._eigenvalues(*old), dtype)
    first = [flat[(*dc[:i], 1, *dc[i + 1 :])] for i, size in enumerate(old) if size > 1]
    flat = flat.at[dc].set(sum(first) / max(len(first), 1))
    for axis, pair in enumerate(zip(sizes, old, strict=True)):
        matrix = jnp.asarray(_interpolation(*pair), dtype)
        moved = jnp.tensordot(matrix, flat, ((1,), (axis,)), precision=jax.lax.Precision.HIGHEST)
        flat = jnp.moveaxis(moved, 0, axis)
    eigen = _dct._eigenvalues(*sizes)
    eigen[dc] = 1.0
    area = math.prod(sizes) / spectrum.size
    return (flat / jnp.asarray(eigen, dtype)).at[dc].set(spectrum[dc] * area)


def spectral_departure(
    x: ArrayLike, spectrum: ArrayLike, alpha: ArrayLike, beta: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Returns the departure of states at one level, in power, from the forward process.

    Args:
      x: states [B, *spatial, C] of a sampler at level (alpha, beta).
      spectrum: the data's S_k [*spatial].
      alpha: blur in pixels, scalar.
      beta: noise standard deviation, scalar.

    Returns:
      (frequency, departure), both [K]: ln of the states' variance over m^2 S + beta^2 in each ring
      of `radial_mean`; zero on the forward process.

    Raises:
      ValueError: x is not [B, *spatial, C].

    Example:
      Noise alone, of variance 4 where the path has 1: ln 4.

      >>> x = np.array([-2.0, 2.0]).reshape(2, 1, 1, 1)
      >>> _, departure = spectra.spectral_departure(x, np.zeros((1, 1)), alpha=0.0, beta=1.0)
      >>> round(float(departure[0]), 4)
      1.3863
    """
    power = power_spectrum(x)
    spectrum = _spectrum(spectrum).astype(power.dtype)
    alpha, beta = (jnp.asarray(level).astype(power.dtype) for level in (alpha, beta))
    m = _dct.transfer(alpha, *spectrum.shape)[..., 0]
    frequency, expected = radial_mean(m**2 * spectrum + beta**2)
    return frequency, jnp.log(radial_mean(power)[1] / expected)
