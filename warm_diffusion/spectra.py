"""Power spectra in the DCT basis, the blur-to-noise ratio that they recommend, and departures.

    (1)  S_k  = variance of DCT coefficient k over the data
    (2)  noise takes over coefficient k at beta^2 = S_k; on a path of ratio rho the blur has by then
         left m_k = exp(-lambda_k rho^2 S_k / 2) of it

The blur is harmless where 1 - m_k is small: what it removes was already hidden by noise. For
natural images S_k ~ 1 / lambda_k, so (2) is about equal over all bands and one ratio serves all:
the paper's constant BNR (sec. 3.3), the ratio read off the data instead of searched for (ours).

The same for a ratio that changes: at beta = S_k^(1/2) the blur may have taken the share
`attenuation`, exp(-lambda_k alpha^2 / 2) = 1 - attenuation. These points, the highest frequency
that is still visible deciding, make up

    (6)  alpha(beta)           joined by power laws with rounded corners; beyond the first and the
                               last point the ratio stays (ours)

Data with S ~ 1 / f^2 get a constant ratio; S ~ f^-gamma gets alpha ~ beta^(2 / gamma).

How far a sampler's states x are from the forward process at the same level (ours; the paper argues
it from a drawing), with x+ forward states of other images:

    (3)  spectral departure    ln of the power of x over m^2 S + beta^2, by ring of frequencies
    (4)  sliced Wasserstein    (mean over directions u on the sphere of W_2(u . x, u . x+)^2)^1/2
                               (Rabin et al. 2011; Bonneel et al. 2015, sec. 3)

and what each head does in a step of samplers.py's eq. (1), by frequency; the two sum to the step:

    (5)  denoiser   (beta' / beta - 1)(x - D) + (m' - m) D        deblurrer   (m' - m) R
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction

_CORNER = 0.05  # width, in ln beta, over which the corners of (6) are rounded
PAPER_RATIOS = (0.1, 0.3, 0.5, 0.65, 1.0, 2.0, 10.0)  # Warm Diffusion, CIFAR-10


def power_spectrum(images: ArrayLike) -> jax.Array:
    """Variance of each DCT coefficient over images and channels, eq. (1).

    Args:
      images: [N, H, W, C] in [-1, 1].

    Returns:
      [H, W]; its mean is the variance of a pixel around the mean image.

    Raises:
      ValueError: images are not [N, H, W, C] in [-1, 1].

    Example:
      One pixel, as often -1 as 1: variance 1.

      >>> spectrum = spectra.power_spectrum(np.array([-1.0, 1.0]).reshape(2, 1, 1, 1))
      >>> round(float(spectrum[0, 0]), 4)
      1.0
    """
    images = _dct.as_images(images)
    _dct.check_scale(images)
    return _variance(images)


def _variance(x: ArrayLike) -> jax.Array:
    """`power_spectrum` of states, which may be far from [-1, 1]."""
    return jnp.var(_dct.dct(x), axis=(0, 3))


def rings(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ring of each coefficient [H, W], and the mean frequency of each ring [K]; see `radial_mean`.

    Example:
      >>> ring, frequency = spectra.rings(2, 2)
      >>> ring.tolist(), frequency.round(3).tolist()
      ([[0, 1], [1, 1]], [0.0, 0.285])
    """
    i, j = np.ogrid[:height, :width]
    radius = np.hypot(i / height, j / width)  # 1: the Nyquist frequency, half a cycle per pixel
    _, band = np.unique(np.rint(radius * max(height, width)), return_inverse=True)
    band = band.reshape(height, width)
    counts = np.bincount(band.ravel())
    return band, np.bincount(band.ravel(), weights=radius.ravel() / 2) / counts


def radial_mean(spectrum: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Average over rings of equal frequency, one ring per cycle over the longer side times two.

    Args:
      spectrum: [H, W], indexed as `dct.dct` does.

    Returns:
      (frequency, mean), both [K]: the ring's mean frequency in cycles per pixel, from 0 (the mean
      of the image, alone) to about 0.71 (the corner), and the mean of `spectrum` over it.

    Raises:
      ValueError: spectrum is not [H, W].

    Example:
      Four coefficients make two rings: the mean alone, and (1 + 3 + 5) / 3.

      >>> frequency, mean = spectra.radial_mean(np.array([[9.0, 1.0], [3.0, 5.0]]))
      >>> print(np.asarray(frequency).round(3), np.asarray(mean).round(3))
      [0.    0.285] [9. 3.]
    """
    spectrum = jnp.asarray(spectrum)
    if spectrum.ndim != 2:
        raise ValueError(f"expected a spectrum [H, W], got {spectrum.shape}")
    band, frequency = rings(*spectrum.shape)
    total = jax.ops.segment_sum(spectrum.ravel(), band.ravel(), len(frequency))
    return jnp.asarray(frequency), total / np.bincount(band.ravel())


def check_spectrum(spectrum: ArrayLike, attenuation: float) -> np.ndarray:
    """The spectrum [H, W] in float64, if a path can be chosen by it.

    Raises:
      ValueError: attenuation out of range, no spectrum, or images without any detail.

    Example:
      >>> spectra.check_spectrum([[1.0, 0.5]], attenuation=0.05).tolist()
      [[1.0, 0.5]]
    """
    spectrum = np.asarray(spectrum, np.float64)
    if not 0 < attenuation < 1:
        raise ValueError(f"attenuation must lie between 0 and 1, got {attenuation}")
    if spectrum.ndim != 2 or not np.all(np.isfinite(spectrum)) or np.any(spectrum < 0):
        raise ValueError(f"expected a finite spectrum [H, W] >= 0, got shape {spectrum.shape}")
    if not np.any(spectrum.ravel()[1:] > 0):
        raise ValueError(
            "the images have no detail to blur: every DCT coefficient but DC is constant"
        )
    return spectrum


def kept_at_takeover(spectrum: ArrayLike, bnr: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """What blur has left of each ring of frequencies when noise takes over, eq. (2).

    Args:
      spectrum: S_k [H, W] of images in [-1, 1].
      bnr: blur-to-noise ratio of the path.

    Returns:
      (frequency, kept), both [K]: m_k averaged over the rings of `radial_mean`; 1: untouched.

    Example:
      With S = 2 / lambda the blur of ratio 1 leaves exp(-1) of the one cosine.

      >>> spectrum = np.array([[1.0, 2 / (np.pi**2 / 4)]])
      >>> print(np.asarray(spectra.kept_at_takeover(spectrum, 1.0)[1]).round(4))
      [1.     0.3679]
    """
    spectrum = jnp.asarray(spectrum, dtype=float)
    return radial_mean(jnp.exp(-_dct.eigenvalues(*spectrum.shape) * bnr**2 * spectrum / 2))


def least_kept(spectrum: ArrayLike, bnr: float) -> float:
    """What blur has left of the worst ring of frequencies when noise takes over, eq. (2).

    Args:
      spectrum: S_k [H, W] of images in [-1, 1], concrete (not traced).
      bnr: blur-to-noise ratio of the path.

    Returns:
      Smallest of `kept_at_takeover`, in [0, 1]; at `recommend_bnr`'s ratio it is 1 - attenuation.

    Example:
      >>> round(spectra.least_kept(np.array([[1.0, 2 / (np.pi**2 / 4)]]), 1.0), 4)
      0.3679
    """
    with jax.ensure_compile_time_eval():  # a number, also under jit
        return float(np.min(kept_at_takeover(spectrum, bnr)[1]))


def recommend_bnr(spectrum: ArrayLike, attenuation: float = 0.05) -> float:
    """Largest ratio at which blur removes at most `attenuation` of what noise has not yet hidden.

    The largest rho for which the radially averaged 1 - m_k of eq. (2) stays within `attenuation`
    in every band; CIFAR-10 gives about 0.53, the paper's best ratio is 0.5.

    Args:
      spectrum: S_k [H, W] of images in [-1, 1], concrete (not traced).
      attenuation: share in (0, 1).

    Raises:
      ValueError: attenuation out of range, or images without any detail (no variance beyond DC).

    Example:
      With S = 2 / lambda a ratio rho leaves exp(-rho^2): half of it at (ln 2)^1/2.

      >>> round(spectra.recommend_bnr(np.array([[1.0, 8 / np.pi**2]]), 0.5), 4)
      0.8326
    """
    spectrum = check_spectrum(spectrum, attenuation)
    with jax.ensure_compile_time_eval():  # a number, also under jit
        exponent = np.asarray(_dct.eigenvalues(*spectrum.shape), np.float64) * spectrum / 2
    band, _ = rings(*spectrum.shape)
    counts = np.bincount(band.ravel())

    def worst(bnr: float) -> float:
        removed = -np.expm1(-exponent * bnr**2)
        return np.max(np.bincount(band.ravel(), weights=removed.ravel()) / counts)

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


def _takeover_points(spectrum: np.ndarray, attenuation: float) -> tuple[np.ndarray, np.ndarray]:
    """(ln beta, ln alpha) of eq. (6), both rising: where noise takes over a ring of frequencies."""
    eigen = np.array(_dct.eigenvalues(*spectrum.shape), np.float64)
    eigen[0, 0] = 1.0  # in a ring of its own, left out below
    power, inverse = (
        np.asarray(radial_mean(a)[1], np.float64)[:0:-1] for a in (spectrum, 1 / eigen)
    )
    # From the highest frequency down. A ring with less power than one above it decides nothing:
    # when noise reaches its power, the finer detail is still visible and allows less blur.
    decides = np.diff(np.maximum.accumulate(power), prepend=0.0) > 0
    alpha = np.sqrt(-2 * math.log1p(-attenuation) * inverse)
    return np.log(power[decides]) / 2, np.log(alpha[decides])


def allowed_blur(
    spectrum: ArrayLike, attenuation: float = 0.05
) -> Callable[[ArrayLike], jax.Array]:
    """The most blur at each noise level that takes no more than `attenuation` of what is visible.

    Args:
      spectrum: S_k [H, W] of images in [-1, 1], concrete (not traced).
      attenuation: share in (0, 1).

    Returns:
      beta [...] -> alpha [...] in pixels, eq. (6): smooth, rising, 0 at 0.

    Raises:
      ValueError: no spectrum, attenuation out of range, or images without any detail.

    Example:
      With S = 2 / lambda a blur of alpha = beta leaves exp(-1).

      >>> blur = spectra.allowed_blur(np.array([[1.0, 8 / np.pi**2]]), 1 - np.exp(-1))
      >>> print(np.asarray(blur(np.array([0.0, 0.5, 3.0]))).round(3))
      [0.  0.5 3. ]
    """
    spectrum = check_spectrum(spectrum, attenuation)
    with jax.ensure_compile_time_eval():  # numbers, also under jit
        log_beta, log_alpha = _takeover_points(spectrum, attenuation)
    slopes = np.diff(log_alpha) / np.diff(log_beta)
    # d ln alpha / d ln beta is 1 outside and these slopes between the points. Every corner is a
    # softplus, so the slope everywhere is an average of them: alpha rises and is smooth.
    corners = np.diff(slopes, prepend=1.0, append=1.0) if len(slopes) else np.zeros(1)
    first = float(log_alpha[0] - log_beta[0])

    def blur(beta: ArrayLike) -> jax.Array:
        beta = jnp.asarray(beta, dtype=float)
        shape = (1,) * beta.ndim + (-1,)
        distance = jnp.log(jnp.where(beta > 0, beta, 1.0))[..., None] - log_beta.reshape(shape)
        bend = _CORNER * jax.nn.softplus(distance / _CORNER) * corners.reshape(shape)
        return beta * jnp.exp(first + jnp.sum(bend, axis=-1))

    return blur


def spectral_departure(
    x: ArrayLike, spectrum: ArrayLike, alpha: ArrayLike, beta: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """How far states at one level are, in power, from where the forward process would have them.

    Args:
      x: states [B, H, W, C] of a sampler at level (alpha, beta).
      spectrum: the data's S_k [H, W].
      alpha: blur in pixels, scalar.
      beta: noise standard deviation, scalar.

    Returns:
      (frequency, departure), both [K]: ln of the states' variance over m^2 S + beta^2 in each ring
      of `radial_mean`; zero on the forward process.

    Raises:
      ValueError: x is not [B, H, W, C].

    Example:
      Noise alone, of variance 4 where the path has 1: ln 4.

      >>> x = np.array([-2.0, 2.0]).reshape(2, 1, 1, 1)
      >>> _, departure = spectra.spectral_departure(x, np.zeros((1, 1)), alpha=0.0, beta=1.0)
      >>> round(float(departure[0]), 4)
      1.3863
    """
    x, spectrum = _dct.as_images(x, "x"), jnp.asarray(spectrum)
    m = _dct.transfer(alpha, *spectrum.shape)[..., 0]
    frequency, expected = radial_mean(m**2 * spectrum + beta**2)
    return frequency, jnp.log(radial_mean(_variance(x))[1] / expected)


def sliced_wasserstein(
    x: ArrayLike, y: ArrayLike, key: jax.Array, num_directions: int = 256
) -> jax.Array:
    """Distance between two sets of as many images, eq. (4); in units of a pixel.

    Two sets of N images of one distribution are about (variance of a pixel / N)^1/2 apart, not 0:
    compare with the distance between two such sets.

    Args:
      x: [N, H, W, C].
      y: [N, H, W, C].
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
    if jnp.ndim(x) != 4 or jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"expected two sets of images of one shape [N, H, W, C], got {jnp.shape(x)} and "
            f"{jnp.shape(y)}"
        )
    x, y = (jnp.asarray(a).reshape(jnp.shape(a)[0], -1) for a in (x, y))
    directions = jax.random.normal(key, (x.shape[1], num_directions), x.dtype)
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
      x: states at `start`, [B, H, W, C].
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
    x = jnp.asarray(x)
    size = x.shape[1:3]
    change = _dct.transfer(end[0], *size) - _dct.transfer(start[0], *size)
    change = jnp.reshape(change, (1, *size, 1))
    noise = (jnp.asarray(end[1]) / start[1] - 1) * _dct.dct(x - prediction.blurry)
    parts = (noise + change * _dct.dct(prediction.blurry), change * _dct.dct(prediction.residual))
    rings = [radial_mean(jnp.mean(part**2, axis=(0, 3))) for part in parts]
    return rings[0][0], rings[0][1], rings[1][1]
