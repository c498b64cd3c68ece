"""Closed-form denoisers: the exact posterior means of Gaussian data and of a finite set of images.

For x0 ~ N(mu, S), diagonal in the DCT basis, with v = m^2 S + beta^2 per frequency:

    (1)  D = m mu + (m^2 S / v) (x - m mu),    D + R = mu + (m S / v) (x - m mu)

(the Wiener filter). For the empirical distribution of images x_i:

    (2)  E[f(x0) | x] = sum_i w_i f(x_i),      w = softmax(-|x - B x_i|^2 / (2 beta^2))

With them the loss minimum, the score, the samplers and their order have exact values to test
against, and a sampler can be studied without training anything.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Denoiser, Prediction


def _moments(
    mean: ArrayLike, spectrum: ArrayLike, x: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """mu in the DCT basis and S, both [1, *spatial, C or 1], in the type of data x."""
    mean, spectrum = jnp.asarray(mean), jnp.asarray(spectrum)
    if mean.ndim < 2 or spectrum.shape not in (mean.shape, mean.shape[:-1]):
        raise ValueError(
            "expected mean [*spatial, C] and spectrum [*spatial] or [*spatial, C], "
            f"got {mean.shape} and {spectrum.shape}"
        )
    if x is not None and x.shape[1:] != mean.shape:
        raise ValueError(f"expected data like the mean {mean.shape}, got {x.shape}")
    dtype = mean.dtype if x is None else x.dtype
    spectrum = spectrum[..., None] if spectrum.ndim < mean.ndim else spectrum
    return _dct._dct(_dct._array(mean[None], "mean").astype(dtype)), spectrum[None].astype(dtype)


def gaussian(mean: ArrayLike, spectrum: ArrayLike) -> Denoiser:
    """The exact denoiser of Gaussian data, eq. (1).

    Args:
      mean: mean image mu [*spatial, C].
      spectrum: variance S of each DCT coefficient, [*spatial] or [*spatial, C], >= 0.

    Returns:
      (x [B, *spatial, C], alpha, beta) -> Prediction; beta > 0.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      One pixel of variance 1 seen through noise of variance 1: half of what was seen.

      >>> denoise = oracle.gaussian(np.zeros((1, 1, 1)), np.ones((1, 1)))
      >>> round(float(denoise(jnp.ones((1, 1, 1, 1)), 0.0, 1.0).clean[0, 0, 0, 0]), 4)
      0.5
    """
    _moments(mean, spectrum)

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        given = _dct._array(x)
        x = _dct._wide(given)
        centre, variance = _moments(mean, spectrum, x)
        m = _dct._transfer_like(alpha, x)
        surprise = (_dct._dct(x) - m * centre) / (m**2 * variance + _dct._level(beta, x) ** 2)
        clean = centre + m * variance * surprise
        parts = m * clean, (1 - m) * clean
        return Prediction(*(_dct._idct(part).astype(given.dtype) for part in parts))

    return denoise


def mixture(images: ArrayLike) -> Denoiser:
    """The exact denoiser of the empirical distribution of a few images, eq. (2).

    Args:
      images: [N, *spatial, C]; memory grows as B N times the size of an image.

    Returns:
      (x [B, *spatial, C], alpha, beta) -> Prediction; beta > 0.

    Raises:
      ValueError: images are not a float array [N, *spatial, C].

    Example:
      A state near one of two images, at little noise, is that image.

      >>> black_and_white = np.stack([-np.ones((2, 2, 1)), np.ones((2, 2, 1))])
      >>> denoise = oracle.mixture(black_and_white)
      >>> round(float(denoise(jnp.full((1, 2, 2, 1), 0.9), 0.0, 0.1).clean[0, 0, 0, 0]), 4)
      1.0
    """
    images = _dct._array(images, "images")

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        given = _dct._array(x)
        x = _dct._wide(given)
        coefficients = _dct._dct(images.astype(x.dtype))[None]
        blurred = _dct._transfer_like(alpha, x)[:, None] * coefficients
        pixels = tuple(range(2, blurred.ndim))
        distance = jnp.sum((_dct._dct(x)[:, None] - blurred) ** 2, axis=pixels)
        scale = 2 * _dct._per_image(beta, x)[:, None] ** 2
        weights = jnp.expand_dims(jax.nn.softmax(-distance / scale, axis=1), pixels)
        blurry = jnp.sum(weights * blurred, axis=1)
        parts = blurry, jnp.sum(weights * coefficients, axis=1) - blurry
        return Prediction(*(_dct._idct(part).astype(given.dtype) for part in parts))

    return denoise
