"""Closed-form denoisers: the exact posterior means of Gaussian data and of a finite set of images.

For x0 ~ N(mu, S), diagonal in the DCT basis, with v = m^2 S + beta^2 per frequency:

    (1)  D = m mu + (m^2 S / v) (x - m mu),    D + R = mu + (m S / v) (x - m mu)

(the Wiener filter), and the probability flow of such data leads from x at one level to

    (2)  x' = m' mu + (x - m mu) (v' / v)^1/2

at another. For the empirical distribution of images x_i:

    (3)  E[f(x0) | x] = sum_i w_i f(x_i),      w = softmax(-|x - B x_i|^2 / (2 beta^2))

With them the loss minimum, the score, the samplers and their order have exact values to test
against, and a sampler can be studied without training anything.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Denoiser, Prediction


def _coefficients(mean: ArrayLike, spectrum: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """mu in the DCT basis and S, both [1, H, W, C or 1]."""
    mean, spectrum = jnp.asarray(mean), jnp.asarray(spectrum)
    if mean.ndim != 3 or spectrum.shape not in (mean.shape, mean.shape[:2]):
        raise ValueError(
            "expected mean [H, W, C] and spectrum [H, W] or [H, W, C], "
            f"got {mean.shape} and {spectrum.shape}"
        )
    return _dct.dct(mean)[None], (spectrum[..., None] if spectrum.ndim == 2 else spectrum)[None]


def _marginal(x: jax.Array, mean: ArrayLike, spectrum: ArrayLike, alpha, beta):
    """m, mu and v at a level, in the DCT basis."""
    centre, variance = _coefficients(mean, spectrum)
    if x.shape[1:] != centre.shape[1:]:
        raise ValueError(f"expected images like the mean {centre.shape[1:]}, got {x.shape}")
    m = _dct.transfer_like(alpha, x)
    return m, centre, m**2 * variance + _dct.expand_like(beta, x) ** 2


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
    centre, variance = _coefficients(mean, spectrum)

    def denoise(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        m = _dct.transfer_like(alpha, x)
        surprise = (_dct.dct(x) - m * centre) / (m**2 * variance + _dct.expand_like(beta, x) ** 2)
        clean = centre + m * variance * surprise
        blurry = m * clean
        return Prediction(_dct.idct(blurry), _dct.idct(clean - blurry))

    return denoise


def gaussian_state(
    noise: ArrayLike, mean: ArrayLike, spectrum: ArrayLike, alpha: ArrayLike, beta: ArrayLike
) -> jax.Array:
    """Forward states of Gaussian data at a level, m mu + v^1/2 noise.

    Args:
      noise: standard normal [B, H, W, C].
      mean: mean image mu [H, W, C].
      spectrum: variance S of each DCT coefficient, [H, W] or [H, W, C], >= 0.
      alpha: blur in pixels.
      beta: noise standard deviation.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      Variance 9 and 16 are 25.

      >>> one = np.ones((1, 1, 1, 1))
      >>> float(oracle.gaussian_state(one, 0 * one[0], 9 * one[0], 0.0, 4.0)[0, 0, 0, 0])
      5.0
    """
    noise = _dct.as_images(noise, "noise")
    m, centre, v = _marginal(noise, mean, spectrum, alpha, beta)
    return _dct.idct(m * centre + jnp.sqrt(v) * _dct.dct(noise))


def gaussian_flow(
    x: ArrayLike,
    mean: ArrayLike,
    spectrum: ArrayLike,
    start: tuple[ArrayLike, ArrayLike],
    end: tuple[ArrayLike, ArrayLike],
) -> jax.Array:
    """Where the probability flow of Gaussian data leads, eq. (2).

    Args:
      x: states [B, H, W, C] at `start`.
      mean: mean image mu [H, W, C].
      spectrum: variance S of each DCT coefficient, [H, W] or [H, W, C], >= 0.
      start: (alpha, beta) of x.
      end: (alpha, beta) of the result.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      From variance 9 + 16 to variance 9.

      >>> one = np.ones((1, 1, 1, 1))
      >>> x = oracle.gaussian_flow(5 * one, 0 * one[0], 9 * one[0], (0.0, 4.0), (0.0, 0.0))
      >>> round(float(x[0, 0, 0, 0]), 4)
      3.0
    """
    x = _dct.as_images(x, "x")
    m, centre, v = _marginal(x, mean, spectrum, *start)
    m_end, _, v_end = _marginal(x, mean, spectrum, *end)
    return _dct.idct(m_end * centre + (_dct.dct(x) - m * centre) * jnp.sqrt(v_end / v))


def mixture(images: ArrayLike) -> Denoiser:
    """The exact denoiser of the empirical distribution of a few images, eq. (3).

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
