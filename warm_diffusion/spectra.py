"""Power spectra in the DCT basis, the blur-to-noise ratio that they recommend, and departures.

    (1)  S_k  = variance of DCT coefficient k over the data
    (2)  noise takes over coefficient k at beta^2 = S_k; on a path of ratio rho the blur has by then
         left m_k = exp(-lambda_k rho^2 S_k / 2) of it

The blur is harmless where 1 - m_k is small: what it removes was already hidden by noise. For
natural images S_k ~ 1 / lambda_k, so (2) is about equal over all bands and one ratio serves all:
the paper's constant BNR (sec. 3.3), the ratio read off the data instead of searched for (ours).

How far a sampler's states x are from the forward process at the same level (ours; the paper argues
it from a drawing), with x+ forward states of other images:

    (3)  spectral departure    ln of the power of x over m^2 S + beta^2, by ring of frequencies
    (4)  sliced Wasserstein    (mean over directions u on the sphere of W_2(u . x, u . x+)^2)^1/2
                               (Rabin et al. 2011; Bonneel et al. 2015, sec. 3)

and what each head does in a step of samplers.py's eq. (1), by frequency; the two sum to the step:

    (5)  denoiser   (beta' / beta - 1)(x - D) + (m' - m) D        deblurrer   (m' - m) R

A spectrum of data of one size holds at any other, by frequency: an orthonormal DCT coefficient of a
stationary image has the variance that the image's power spectral density has at k_axis / (2 size)
cycles per pixel, however large the image. So with lambda as in `dct.py`, eq. (2),

    (6)  lambda S    interpolated linearly between the frequencies of the old size, along each axis
    (7)  S           = that / lambda at the frequencies of the new size
    (8)  S_DC        times the ratio of the areas: the variance of an image's mean is kept

At frequencies lower than the first of the old size, (6) goes on with the mean of the first of all
axes: S ~ 1 / f^2, the law of photographs, which looks the same at every scale and for which (7) is
exact. Beyond the last frequency, lambda S stays. (8) is an upper bound: larger images have means
that vary less.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction

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
    floating = jnp.issubdtype(spectrum.dtype, jnp.floating)
    return _dct._wide(spectrum) if floating else spectrum.astype(float)


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


def kept_at_takeover(spectrum: ArrayLike, bnr: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """What blur has left of each ring of frequencies when noise takes over, eq. (2).

    Args:
      spectrum: S_k [*spatial].
      bnr: blur-to-noise ratio of the path.

    Returns:
      (frequency, kept), both [K]: m_k averaged over the rings of `radial_mean`; 1: untouched.

    Example:
      With S = 2 / lambda the blur of ratio 1 leaves exp(-1) of the one cosine.

      >>> spectrum = np.array([[1.0, 2 / (np.pi**2 / 4)]])
      >>> print(np.asarray(spectra.kept_at_takeover(spectrum, 1.0)[1]).round(4))
      [1.     0.3679]
    """
    spectrum = _spectrum(spectrum)
    eigen = jnp.asarray(_dct._eigenvalues(*spectrum.shape), spectrum.dtype)
    return radial_mean(jnp.exp(-eigen * bnr**2 * spectrum / 2))


def least_kept(spectrum: ArrayLike, bnr: float) -> float:
    """What blur has left of the worst ring of frequencies when noise takes over, eq. (2).

    Args:
      spectrum: S_k [*spatial], concrete (not traced).
      bnr: blur-to-noise ratio of the path.

    Returns:
      Smallest of `kept_at_takeover`, in [0, 1]; at `recommend_bnr`'s ratio it is 1 - attenuation.

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
    """The spectrum of the same kind of data at another size, eqs. (6)-(8).

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
    """How far states at one level are, in power, from where the forward process would have them.

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


def sliced_wasserstein(
    x: ArrayLike, y: ArrayLike, key: jax.Array, num_directions: int = 256
) -> jax.Array:
    """Distance between two sets of as many images, eq. (4); in units of a pixel.

    Two sets of N images of one distribution are about (variance of a pixel / N)^1/2 apart, not 0:
    compare with the distance between two such sets.

    Args:
      x: [N, *spatial, C].
      y: [N, *spatial, C].
      key: PRNG key of the directions.
      num_directions: how many.

    Raises:
      ValueError: other shapes.

    Example:
      One pixel, brighter by 3 in all images.

      >>> x = np.array([-1.0, 1.0]).reshape(2, 1, 1, 1)
      >>> round(float(spectra.sliced_wasserstein(x, x + 3, jax.random.key(0))), 4)
      3.0
    """
    x, y = (_dct._wide(_dct._array(a)) for a in (x, y))
    if x.shape != y.shape:
        raise ValueError(f"expected two sets of data of one shape, got {x.shape} and {y.shape}")
    x, y = (a.reshape(a.shape[0], -1) for a in (x, y.astype(x.dtype)))
    directions = jax.random.normal(key, (x.shape[1], num_directions), jnp.float32).astype(x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    one, two = (
        jnp.sort(jnp.matmul(a, directions, precision=jax.lax.Precision.HIGHEST), axis=0)
        for a in (x, y)
    )
    return jnp.sqrt(jnp.mean((one - two) ** 2))


def head_contributions(
    x: ArrayLike,
    prediction: Prediction,
    start: tuple[ArrayLike, ArrayLike],
    end: tuple[ArrayLike, ArrayLike],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each head contributes to a step from `start` to `end`, eq. (5).

    Args:
      x: states at `start`, [B, *spatial, C].
      prediction: both heads' estimates there.
      start: (alpha, beta), beta > 0.
      end: (alpha, beta).

    Returns:
      (frequency, denoiser, deblurrer), all [K]: the mean square of each head's part over images,
      channels and each ring of `radial_mean`.

    Example:
      Without blur the denoiser does it all: (beta' / beta - 1) (x - D) = -(1 - 0) / 2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> prediction = denoiser.Prediction(0 * one, 0 * one)
      >>> _, *parts = spectra.head_contributions(one, prediction, (0.0, 2.0), (0.0, 1.0))
      >>> [round(float(part[0]), 4) for part in parts]
      [0.25, 0.0]
    """
    x = _dct._wide(_dct._array(x))
    blurry, residual = (_dct._wide(_dct._array(part)) for part in prediction)
    change = _dct._transfer_like(end[0], x) - _dct._transfer_like(start[0], x)
    shrink = _dct._level(end[1], x) / _dct._level(start[1], x) - 1
    noise = shrink * _dct._dct(x - blurry)
    parts = (noise + change * _dct._dct(blurry), change * _dct._dct(residual))
    rings = [radial_mean(jnp.mean(part**2, axis=(0, -1))) for part in parts]
    return rings[0][0], rings[0][1], rings[1][1]
