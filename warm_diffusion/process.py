"""The blur-noise forward process, its exact transitions, score and probability flow.

Glossary (paper symbol -> name here):

    alpha        blur level: standard deviation, in pixels, of a Gaussian blur
    beta         noise level: standard deviation of white Gaussian noise (EDM's sigma)
    BNR          blur-to-noise ratio alpha / beta: 0 is hot diffusion, infinity cold diffusion
    x0           clean data [B, *spatial, C];  x  the blurred and noised ones
    B(alpha)     the blur, diagonal in the DCT basis with factors m(alpha) (`dct.py`)
    D, R         the two heads: blurry = E[B x0 | x] and residual = E[(I - B) x0 | x]

Per DCT frequency (dots are d/dt along a schedule t -> (alpha(t), beta(t)), both non-decreasing):

    (1)  q(x | x0)       = N(m(alpha) x0, beta^2)                      Warm Diffusion, sec. 3
    (2)  dx              = F x dt + G dw
         F = -lambda alpha alpha',   G^2 = 2 beta beta' + 2 lambda alpha alpha' beta^2
    (3)  x_t | x_s       = N(r x_s, beta_t^2 - r^2 beta_s^2),
         r = exp(-lambda (alpha_t^2 - alpha_s^2) / 2)
    (4)  score           = (D - x) / beta^2                            Tweedie's formula
    (5)  dx/dt           = B'(t) (D + R) + (beta' / beta) (x - D)      probability flow
         B'(t) = -alpha alpha' lambda m(alpha) per frequency

The paper states (1). Marginals do not determine transitions: the linear Markov process (2), with
(3), is the usual choice among those that have the marginals (1), and (5) follows from it. Blurring
directly to a level and in steps is the same thing, by (3). Letters never have DDPM's meaning: alpha
is no signal scale here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction, _checked
from warm_diffusion.schedules import _ROUNDING, Schedule, _check_schedule

Level = tuple[ArrayLike, ArrayLike]  # (alpha, beta), each a scalar or [B]


def _pair(x: ArrayLike, other: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Two arrays of data of one shape, in the type of the first."""
    x, other = _dct._array(x), _dct._array(other, "noise")
    if x.shape != other.shape:
        raise ValueError(f"data and noise must have the same shape, got {x.shape}, {other.shape}")
    return x, other


def _image_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """One stream of random numbers per image [batch_size], so that the batch does not matter.

    One key gives image i fold_in(key, i); one key per image stays as it is.
    """
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key must be a JAX PRNG key, such as jax.random.key(0), got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim == 0:
            got = f"{key.dtype} {key.shape}"
            raise ValueError(f"key must be a JAX PRNG key, such as jax.random.key(0), got {got}")
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ValueError(f"key must be one key or {batch_size}, got {key.shape}")
    return key


def _normal(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise like data x, of one key per image; the same numbers in every type."""
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)
    return noise.astype(x.dtype)


def _root(square: jax.Array) -> jax.Array:
    """Square root with derivative 0 at 0; of a negative number NaN."""
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def perturb(x0: ArrayLike, noise: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> jax.Array:
    """Blurred and noised data, B(alpha) x0 + beta noise, eq. (1).

    Args:
      x0: clean data [B, *spatial, C].
      noise: standard normal, same shape.
      alpha: blur in pixels, >= 0; scalar or [B].
      beta: noise standard deviation, >= 0; scalar or [B].

    Raises:
      ValueError: shapes that do not fit, or integers.

    Example:
      Without blur: 1 + 0.5 * 2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> float(process.perturb(one, 2 * one, alpha=0.0, beta=0.5)[0, 0, 0, 0])
      2.0
    """
    given, noise = _pair(x0, noise)
    x0 = _dct._wide(given)
    x = _dct._blur(x0, alpha) + _dct._level(beta, x0) * noise.astype(x0.dtype)
    return x.astype(given.dtype)


def _rise(start: jax.Array, end: jax.Array) -> jax.Array:
    """The end level, or the start where it falls short of that by no more than rounding."""
    return jnp.where((end < start) & (end >= (1 - _ROUNDING) * start), start, end)


def transition(x: ArrayLike, noise: ArrayLike, start: Level, end: Level) -> jax.Array:
    """Takes a forward state on to a later level: the exact transition, eq. (3).

    Args:
      x: states at `start`, [B, *spatial, C].
      noise: standard normal, same shape.
      start: (alpha, beta), each a scalar or [B].
      end: (alpha, beta), neither below `start`'s, up to rounding: going back is the samplers'
        work, and gives NaN.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      Variances add up: from noise 3 to noise 5 takes 4.

      >>> one = np.ones((1, 1, 1, 1))
      >>> round(float(process.transition(0 * one, one, (0.0, 3.0), (0.0, 5.0))[0, 0, 0, 0]), 3)
      4.0
    """
    given, noise = _pair(x, noise)
    x = _dct._wide(given)
    (alpha, beta), (alpha_end, beta_end) = (
        tuple(_dct._level(level, x) for level in pair) for pair in (start, end)
    )
    alpha_end, beta_end = _rise(alpha, alpha_end), _rise(beta, beta_end)
    exponent = -_dct._eigenvalues_like(x) * (alpha_end - alpha) * (alpha_end + alpha) / 2
    # beta_t^2 - r^2 beta_s^2 as a sum of two terms >= 0: no cancellation when the levels are close.
    variance = (beta_end - beta) * (beta_end + beta) - beta**2 * jnp.expm1(2 * exponent)
    noise = _root(variance) * _dct._dct(noise.astype(x.dtype))
    return _dct._idct(jnp.exp(exponent) * _dct._dct(x) + noise).astype(given.dtype)


def _levels_and_rates(schedule: Schedule, t: ArrayLike) -> list[tuple[jax.Array, jax.Array]]:
    """alpha and beta at times t, each with its derivative."""
    _check_schedule(schedule)
    t = _dct._floating(t)
    return [jax.jvp(level, (t,), (jnp.ones_like(t),)) for level in (schedule.alpha, schedule.beta)]


def drift_and_diffusion(
    schedule: Schedule, t: ArrayLike, *sizes: int
) -> tuple[jax.Array, jax.Array]:
    """F and G of the forward SDE per frequency, eq. (2): each [..., *sizes, 1] for t [...].

    Example:
      EDM's SDE (no blur, beta = t) has F = 0 and G^2 = 2 t.

      >>> drift, diffusion = process.drift_and_diffusion(schedules.hot(), 8.0, 1, 1)
      >>> abs(float(drift[0, 0, 0])), round(float(diffusion[0, 0, 0]), 3)
      (0.0, 4.0)
    """
    (alpha, alpha_rate), (beta, beta_rate) = (
        tuple(part.reshape(part.shape + (1,) * (len(sizes) + 1)) for part in level)
        for level in _levels_and_rates(schedule, t)
    )
    eigen = jnp.asarray(_dct._eigenvalues(*sizes), alpha.dtype)
    eigen = eigen.reshape((1,) * (alpha.ndim - len(sizes) - 1) + (*sizes, 1))
    drift = -eigen * alpha * alpha_rate
    return drift, _root(2 * beta * beta_rate - 2 * drift * beta**2)


def score(x: ArrayLike, blurry: ArrayLike, beta: ArrayLike) -> jax.Array:
    """Gradient of the log-density of x [B, *spatial, C] from the denoiser's `blurry`, eq. (4).

    Example:
      (0 - 1) / 0.5^2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> float(process.score(one, 0 * one, beta=0.5)[0, 0, 0, 0])
      -4.0
    """
    given, blurry = _pair(x, blurry)
    x = _dct._wide(given)
    return ((blurry.astype(x.dtype) - x) / _dct._level(beta, x) ** 2).astype(given.dtype)


def velocity(x: ArrayLike, prediction: Prediction, schedule: Schedule, t: ArrayLike) -> jax.Array:
    """Probability flow dx/dt, eq. (5).

    Args:
      x: states [B, *spatial, C] at time t.
      prediction: both heads' estimates at x.
      schedule: the path t -> (alpha, beta).
      t: scalar or [B], > 0.

    Raises:
      ValueError: no Prediction, no schedule, or a time that is not one per image.

    Example:
      EDM's (x - D) / t: here (1 - 0) / 2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> prediction = denoiser.Prediction(0 * one, 0 * one)
      >>> float(process.velocity(one, prediction, schedules.hot(), 2.0)[0, 0, 0, 0])
      0.5
    """
    (alpha, alpha_rate), (beta, beta_rate) = _levels_and_rates(schedule, t)
    given = _dct._array(x)
    x = _dct._wide(given)
    prediction = _checked(prediction, x)
    alpha_rate, beta, beta_rate = (_dct._level(part, x) for part in (alpha_rate, beta, beta_rate))
    slope = -_dct._level(alpha, x) * alpha_rate * _dct._eigenvalues_like(x)
    blur_rate = slope * _dct._transfer_like(alpha, x)
    deblurring = _dct._idct(blur_rate * _dct._dct(prediction.clean))
    return (deblurring + beta_rate / beta * (x - prediction.blurry)).astype(given.dtype)
