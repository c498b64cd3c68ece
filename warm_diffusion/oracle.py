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


def gaussian(mean: ArrayLike, spectrum: ArrayLike) -> Denoiser:
    """The exact denoiser of Gaussian data, eq. (1).

    Args:
      mean: mean image mu [H, W, C].
      spectrum: variance S of each DCT coefficient, [H, W] or [H, W, C], >= 0.

    Returns:
      (x [B, H, W, C], alpha, beta) -> Prediction; beta > 0.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      One pixel of variance 1 seen through noise of variance 1: half of what was seen.

      >>> denoise = oracle.gaussian(np.zeros((1, 1, 1)), np.ones((1, 1)))
      >>> round(float(denoise(jnp.ones((1, 1, 1, 1)), 0.0, 1.0).clean[0, 0, 0, 0]), 4)
      0.5
    """
    mean, spectrum = jnp.asarray(mean), jnp.asarray(spectrum)
    if mean.ndim != 3 or spectrum.shape not in (mean.shape, mean.shape[:2]):
        raise ValueError(
            "expected mean [H, W, C] and spectrum [H, W] or [H, W, C], "
            f"got {mean.shape} and {spectrum.shape}"
        )
    variance = (spectrum[..., None] if spectrum.ndim == 2 else spectrum)[None]
    centre = _dct.dct(mean)[None]

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        m = _dct.transfer_like(alpha, x)
        surprise = (_dct.dct(x) - m * centre) / (m**2 * variance + _dct.expand_like(beta, x) ** 2)
        clean = centre + m * variance * surprise
        blurry = m * clean
        return Prediction(_dct.idct(blurry), _dct.idct(clean - blurry))

    return denoise


def mixture(images: ArrayLike) -> Denoiser:
    """The exact denoiser of the empirical distribution of a few images, eq. (2).

    Args:
      images: [N, H, W, C] in [-1, 1]; memory grows as B N H W C.

    Returns:
      (x [B, H, W, C], alpha, beta) -> Prediction; beta > 0.

    Raises:
      ValueError: images are not [N, H, W, C] in [-1, 1].

    Example:
      A state near one of two images, at little noise, is that image.

      >>> black_and_white = np.stack([-np.ones((2, 2, 1)), np.ones((2, 2, 1))])
      >>> denoise = oracle.mixture(black_and_white)
      >>> round(float(denoise(jnp.full((1, 2, 2, 1), 0.9), 0.0, 0.1).clean[0, 0, 0, 0]), 4)
      1.0
    """
    images = _dct.as_images(images)
    _dct.check_scale(images)
    coefficients = _dct.dct(images)[None]

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        m = _dct.transfer_like(alpha, x)[:, None]
        blurred = m * coefficients
        distance = jnp.sum((_dct.dct(x)[:, None] - blurred) ** 2, axis=(2, 3, 4))
        scale = 2 * _dct.expand_like(beta, x)[:, :, 0, 0] ** 2
        weights = jax.nn.softmax(-distance / scale, axis=1)[:, :, None, None, None]
        blurry = jnp.sum(weights * blurred, axis=1)
        clean = jnp.sum(weights * coefficients, axis=1)
        return Prediction(_dct.idct(blurry), _dct.idct(clean - blurry))

    return denoise
