"""The blur-noise forward process, its exact transitions, score and probability flow.

Glossary (paper symbol -> name here):

    alpha        blur level: standard deviation, in pixels, of a Gaussian blur
    beta         noise level: standard deviation of white Gaussian noise (EDM's sigma)
    BNR          blur-to-noise ratio alpha / beta: 0 is hot diffusion, infinity cold diffusion
    x0           clean image in [-1, 1];  x  the blurred and noised one
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

(2), (3) and (5) follow from (1); the paper states (1). Blurring directly to a level and in steps
is the same thing, by (3). Letters never have DDPM's meaning: alpha is no signal scale here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction
from warm_diffusion.schedules import Schedule

Level = tuple[jax.Array, jax.Array]  # (alpha, beta), each a scalar or [B]


def _check_same_shape(x: jax.Array, noise: jax.Array) -> None:
    if jnp.shape(x) != jnp.shape(noise):
        raise ValueError(
            f"images and noise must have the same shape, got {jnp.shape(x)} and {jnp.shape(noise)}"
        )


def image_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """One stream of random numbers an image [batch_size], so that the batch does not matter.

    Args:
      key: one PRNG key, of which image i gets fold_in(key, i), or one per image, kept as they are.
      batch_size: number of images.

    Raises:
      ValueError: another number of keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a raw uint32 key
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ValueError(f"expected one key or {batch_size} keys, got shape {key.shape}")
    return key


def perturb(x0: jax.Array, noise: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """A blurred and noised image, B(alpha) x0 + beta noise, eq. (1).

    Args:
      x0: clean images [B, H, W, C] in [-1, 1].
      noise: standard normal, same shape.
      alpha: blur in pixels, >= 0; scalar or [B].
      beta: noise standard deviation, >= 0; scalar or [B].

    Raises:
      ValueError: shapes that do not fit.
    """
    _check_same_shape(x0, noise)
    blurry = _dct.blur(x0, alpha)
    return blurry + _dct.expand_like(beta, blurry) * noise


def transition(x: jax.Array, noise: jax.Array, start: Level, end: Level) -> jax.Array:
    """Takes a forward state on to a later level: the exact transition, eq. (3).

    Args:
      x: states at `start`, [B, H, W, C].
      noise: standard normal, same shape.
      start: (alpha, beta), each a scalar or [B].
      end: (alpha, beta), neither below `start`'s: going back is the samplers' work, and gives NaN.

    Raises:
      ValueError: shapes that do not fit.
    """
    _check_same_shape(x, noise)
    x = jnp.asarray(x)
    (alpha, beta), (alpha_end, beta_end) = (
        tuple(_dct.expand_like(level, x) for level in pair) for pair in (start, end)
    )
    eigen = _dct.eigenvalues(*x.shape[-3:-1]).reshape((1,) * (x.ndim - 3) + (*x.shape[-3:-1], 1))
    exponent = -eigen * (alpha_end - alpha) * (alpha_end + alpha) / 2
    # beta_t^2 - r^2 beta_s^2 as a sum of two terms >= 0: no cancellation when the levels are close.
    variance = (beta_end - beta) * (beta_end + beta) - beta**2 * jnp.expm1(2 * exponent)
    coefficients = jnp.exp(exponent) * _dct.dct(x) + jnp.sqrt(variance) * _dct.dct(noise)
    return _dct.idct(coefficients)


def _value_and_rate(level: Callable[[jax.Array], jax.Array], t: jax.Array) -> Level:
    t = jnp.asarray(t, dtype=float)
    return jax.jvp(level, (t,), (jnp.ones_like(t),))


def drift_and_diffusion(
    schedule: Schedule, t: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """F and G of the forward SDE per frequency, eq. (2): each [..., H, W, 1] for t [...]."""
    levels = (_value_and_rate(schedule.alpha, t), _value_and_rate(schedule.beta, t))
    (alpha, alpha_rate), (beta, beta_rate) = (
        tuple(part[..., None, None, None] for part in level) for level in levels
    )
    eigen = _dct.eigenvalues(height, width).reshape((1,) * (alpha.ndim - 3) + (height, width, 1))
    drift = -eigen * alpha * alpha_rate
    return drift, jnp.sqrt(2 * beta * beta_rate - 2 * drift * beta**2)


def score(x: jax.Array, blurry: jax.Array, beta: jax.Array) -> jax.Array:
    """Gradient of the log-density of x [B, H, W, C] from the denoiser's `blurry`, eq. (4)."""
    _check_same_shape(x, blurry)
    return (blurry - x) / _dct.expand_like(beta, x) ** 2


def velocity(x: jax.Array, prediction: Prediction, schedule: Schedule, t: jax.Array) -> jax.Array:
    """Probability flow dx/dt, eq. (5).

    Args:
      x: states [B, H, W, C] at time t.
      prediction: both heads' estimates at x.
      schedule: the path t -> (alpha, beta).
      t: scalar or [B], > 0.
    """
    (alpha, alpha_rate), (beta, beta_rate) = (
        tuple(_dct.expand_like(part, x) for part in _value_and_rate(level, t))
        for level in (schedule.alpha, schedule.beta)
    )
    eigen = _dct.eigenvalues(*x.shape[-3:-1]).reshape((1,) * (x.ndim - 3) + (*x.shape[-3:-1], 1))
    blur_rate = -alpha * alpha_rate * eigen * jnp.exp(-eigen * alpha**2 / 2)
    deblurring = _dct.idct(blur_rate * _dct.dct(prediction.clean))
    return deblurring + beta_rate / beta * (x - prediction.blurry)
