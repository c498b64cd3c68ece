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
is the same thing, by (3). A path is a `Schedule`, which checks itself. Letters never have DDPM's
meaning: alpha is no signal scale here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction, check_prediction

Level = tuple[ArrayLike, ArrayLike]  # (alpha, beta), each a scalar or [B]
Draw = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> random numbers

_ROUNDING = 1e-5  # relative fall of a level that is no more than rounding in float32
_MEND = "schedules.from_functions makes it so"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A path through blur and noise, which checks itself when it is made.

    The rules, a ValueError where one is broken (values that are traced cannot be looked at):

      1. 0 < t_min < t_max, both finite.
      2. alpha(0) = beta(0) = 0: t = 0 is the clean image.
      3. On [t_min, t_max] both are finite and never fall, alpha >= 0 and beta > 0.
      4. sample_time(key, shape) has that shape, and its times are finite and > 0.

    `schedules.py` has the known paths, and `schedules.from_functions` makes one of any functions.

    Attributes:
      alpha: t [...] -> blur in pixels [...]; differentiable on [t_min, t_max].
      beta: t [...] -> noise standard deviation [...]; differentiable on [t_min, t_max].
      t_min: smallest time that the network sees, > 0.
      t_max: time at which sampling starts.
      sample_time: (key, shape) -> t, the training distribution.
      sample_bnr: (key, shape) -> ratios to train at, apart from the path's (`schedules.any_bnr`).

    Example:
      >>> path = schedules.constant_bnr(0.5)
      >>> float(path.alpha(4.0)), float(path.beta(4.0)), float(path.bnr(4.0)), path.needs_start
      (2.0, 4.0, 0.5, False)
    """

    alpha: Callable[[ArrayLike], jax.Array]
    beta: Callable[[ArrayLike], jax.Array]
    t_min: float
    t_max: float
    sample_time: Draw
    sample_bnr: Draw | None = None

    def __post_init__(self) -> None:
        if any(isinstance(end, jax.core.Tracer) for end in (self.t_min, self.t_max)):
            return
        check_range("t_min", self.t_min, "t_max", self.t_max)
        t = np.append(0.0, np.geomspace(self.t_min, self.t_max, 65))
        for name, level in (("alpha", self.alpha), ("beta", self.beta)):
            values = _known(level, t)
            if values is not None:
                _check_level(name, t, values)
        times = _known(self.sample_time, jax.random.key(0), (8,))
        if times is None or (times.shape == (8,) and np.all((times > 0) & (times < np.inf))):
            return
        raise ValueError(
            f"sample_time(key, (8,)) must return 8 finite times > 0, got {times}: "
            "for example jnp.exp(jax.random.normal(key, shape))"
        )

    @property
    def needs_start(self) -> bool:
        """Whether noise at t_max, below 1, leaves images in [-1, 1] visible: sample from `start=`.

        False where that noise is traced.
        """
        noise = _known(self.beta, self.t_max)
        return noise is not None and bool(noise < 1)

    def bnr(self, t: ArrayLike) -> jax.Array:
        """Blur-to-noise ratio alpha / beta at t > 0, in pixels per unit of noise."""
        return self.alpha(t) / self.beta(t)

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Levels (alpha, beta) to train at, each of `shape`: the path's, or of ratios drawn."""
        if self.sample_bnr is None:
            t = self.sample_time(key, shape)
            return self.alpha(t), self.beta(t)
        time_key, bnr_key = jax.random.split(key)
        beta = self.beta(self.sample_time(time_key, shape))
        return self.sample_bnr(bnr_key, shape) * beta, beta


def _known(function: Callable[..., ArrayLike], *arguments: Any) -> np.ndarray | None:
    """What a function returns, as numpy; None if that is traced and cannot be looked at."""
    # Formulas may divide by t = 0: the rules tell it, not numpy's warnings.
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        value = function(*arguments)
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def check_range(low_name: str, low: float, high_name: str, high: float) -> None:
    """Refuses a range that is not 0 < low < high, both finite, by the names of its ends.

    Example:
      >>> process.check_range("t_min", 0.0, "t_max", 1.0)
      Traceback (most recent call last):
      ValueError: expected 0 < t_min < t_max < infinity, got t_min=0.0, t_max=1.0
    """
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"expected 0 < {low_name} < {high_name} < infinity, got {low_name}={low}, "
            f"{high_name}={high}"
        )


def _check_level(name: str, t: np.ndarray, level: np.ndarray) -> None:
    """Rules 2 and 3 of `Schedule` for alpha or beta at times t = 0, t_min, ..., t_max."""
    if level.shape != t.shape:
        raise ValueError(
            f"{name}(t) must have the shape of t, got {level.shape} for {t.shape}: {_MEND}"
        )
    if level[0] != 0:
        raise ValueError(f"{name}(0) must be 0, the clean image, got {level[0]:g}: {_MEND}")
    t, level = t[1:], level[1:]
    sign, inside = (">", level > 0) if name == "beta" else (">=", level >= 0)
    inside &= np.isfinite(level)
    if not np.all(inside):
        i = np.argmin(inside)
        raise ValueError(
            f"{name} must be finite and {sign} 0 on [t_min, t_max], got {level[i]:g} at t = "
            f"{t[i]:g}: choose t_min and t_max where it is"
        )
    rising = level[1:] >= (1 - _ROUNDING) * level[:-1]
    if not np.all(rising):
        i = np.argmin(rising)
        raise ValueError(
            f"{name} must never fall as t rises, got {level[i]:g} at t = {t[i]:g}, then "
            f"{level[i + 1]:g} at t = {t[i + 1]:g}: end at a t_max before it turns, or let t run "
            "from the clean image to blur and noise"
        )


def _check_same_shape(x: ArrayLike, noise: ArrayLike) -> None:
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

    Example:
      >>> keys = process.image_keys(jax.random.key(0), 3)
      >>> keys.shape, bool(keys[1] == jax.random.fold_in(jax.random.key(0), 1))
      ((3,), True)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a raw uint32 key
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ValueError(f"expected one key or {batch_size} keys, got shape {key.shape}")
    return key


def perturb(x0: ArrayLike, noise: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> jax.Array:
    """A blurred and noised image, B(alpha) x0 + beta noise, eq. (1).

    Args:
      x0: clean images [B, H, W, C] in [-1, 1].
      noise: standard normal, same shape.
      alpha: blur in pixels, >= 0; scalar or [B].
      beta: noise standard deviation, >= 0; scalar or [B].

    Raises:
      ValueError: shapes that do not fit, or images in 0..255.

    Example:
      Without blur: 1 + 0.5 * 2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> float(process.perturb(one, 2 * one, alpha=0.0, beta=0.5)[0, 0, 0, 0])
      2.0
    """
    _check_same_shape(x0, noise)
    x0 = jnp.asarray(x0)
    _dct.check_scale(x0, "x0")
    blurry = _dct.blur(x0, alpha)
    return blurry + _dct.expand_like(beta, blurry) * noise


def transition(x: ArrayLike, noise: ArrayLike, start: Level, end: Level) -> jax.Array:
    """Takes a forward state on to a later level: the exact transition, eq. (3).

    Args:
      x: states at `start`, [B, H, W, C].
      noise: standard normal, same shape.
      start: (alpha, beta), each a scalar or [B].
      end: (alpha, beta), neither below `start`'s: going back is the samplers' work, and gives NaN.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      Variances add up: from noise 3 to noise 5 takes 4.

      >>> one = np.ones((1, 1, 1, 1))
      >>> round(float(process.transition(0 * one, one, (0.0, 3.0), (0.0, 5.0))[0, 0, 0, 0]), 3)
      4.0
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


def _value_and_rate(
    level: Callable[[ArrayLike], jax.Array], t: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    t = jnp.asarray(t, dtype=float)
    return jax.jvp(level, (t,), (jnp.ones_like(t),))


def drift_and_diffusion(
    schedule: Schedule, t: ArrayLike, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """F and G of the forward SDE per frequency, eq. (2): each [..., H, W, 1] for t [...].

    Example:
      EDM's SDE (no blur, beta = t) has F = 0 and G^2 = 2 t.

      >>> drift, diffusion = process.drift_and_diffusion(schedules.hot(), 8.0, 1, 1)
      >>> abs(float(drift[0, 0, 0])), round(float(diffusion[0, 0, 0]), 3)
      (0.0, 4.0)
    """
    levels = (_value_and_rate(schedule.alpha, t), _value_and_rate(schedule.beta, t))
    (alpha, alpha_rate), (beta, beta_rate) = (
        tuple(part[..., None, None, None] for part in level) for level in levels
    )
    eigen = _dct.eigenvalues(height, width).reshape((1,) * (alpha.ndim - 3) + (height, width, 1))
    drift = -eigen * alpha * alpha_rate
    return drift, jnp.sqrt(2 * beta * beta_rate - 2 * drift * beta**2)


def score(x: ArrayLike, blurry: ArrayLike, beta: ArrayLike) -> jax.Array:
    """Gradient of the log-density of x [B, H, W, C] from the denoiser's `blurry`, eq. (4).

    Example:
      (0 - 1) / 0.5^2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> float(process.score(one, 0 * one, beta=0.5)[0, 0, 0, 0])
      -4.0
    """
    _check_same_shape(x, blurry)
    x, blurry = jnp.asarray(x), jnp.asarray(blurry)
    return (blurry - x) / _dct.expand_like(beta, x) ** 2


def velocity(x: ArrayLike, prediction: Prediction, schedule: Schedule, t: ArrayLike) -> jax.Array:
    """Probability flow dx/dt, eq. (5).

    Args:
      x: states [B, H, W, C] at time t.
      prediction: both heads' estimates at x.
      schedule: the path t -> (alpha, beta).
      t: scalar or [B], > 0.

    Raises:
      ValueError: no Prediction, or a time that is not one per image.

    Example:
      EDM's (x - D) / t: here (1 - 0) / 2.

      >>> one = np.ones((1, 1, 1, 1))
      >>> prediction = denoiser.Prediction(0 * one, 0 * one)
      >>> float(process.velocity(one, prediction, schedules.hot(), 2.0)[0, 0, 0, 0])
      0.5
    """
    x, prediction = jnp.asarray(x), check_prediction(prediction)
    (alpha, alpha_rate), (beta, beta_rate) = (
        tuple(_dct.expand_like(part, x) for part in _value_and_rate(level, t))
        for level in (schedule.alpha, schedule.beta)
    )
    eigen = _dct.eigenvalues(*x.shape[-3:-1]).reshape((1,) * (x.ndim - 3) + (*x.shape[-3:-1], 1))
    blur_rate = -alpha * alpha_rate * eigen * jnp.exp(-eigen * alpha**2 / 2)
    deblurring = _dct.idct(blur_rate * _dct.dct(prediction.clean))
    return deblurring + beta_rate / beta * (x - prediction.blurry)
