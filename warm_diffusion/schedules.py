"""Paths t -> (alpha, beta) through blur and noise, their training distribution and time grids.

    (1)  hot            alpha = 0,      beta = t      EDM (Karras et al. 2022, arXiv 2206.00364)
    (2)  constant_bnr   alpha = bnr t,  beta = t      Warm Diffusion (arXiv 2511.16904), default 0.5
    (3)  cold           alpha = t,      beta constant inverse heat dissipation (arXiv 2206.13397)
    (4)  blurring_diffusion  alpha = sigma sin^2(pi t / 2), beta = tan(theta_0 + t (theta_1 -
                        theta_0)), log-SNR = -2 ln beta falls from 10 to -10: Hoogeboom & Salimans
                        2023 (arXiv 2209.05557), variance exploding; Warm Diffusion, table 4
    (5)  spectral       alpha(beta), beta = t         from the data's spectrum (ours), below
    (6)  any_bnr        (2) with a ratio drawn for each training image (ours)

    (7)  training:      ln beta ~ N(p_mean, p_std^2)  EDM, table 1; (3): ln alpha uniform; (4): t
                        uniform; (6): ln bnr uniform besides, and 0 for a share of the images
    (8)  time grid:     t_i = (t_max^(1/rho) + i/(n-1) (t_min^(1/rho) - t_max^(1/rho)))^rho,
                        t_n = 0                       EDM, eq. (5)

(5): at beta = S_k^(1/2) noise takes over frequency k of the data, and the blur may by then have
taken the share `attenuation` of it: exp(-lambda_k alpha^2 / 2) = 1 - attenuation. These points,
with the highest frequency that is still visible deciding, make up alpha(beta), joined by power laws
with rounded corners; beyond the first and the last point the ratio stays. Data with S ~ 1 / f^2 get
a constant ratio, (2); S ~ f^-gamma gets alpha ~ beta^(2 / gamma).

On every path t lies in [t_min, t_max] with t_min > 0, and t = 0 is the clean image:
alpha(0) = beta(0) = 0. Absent on purpose: the noise that inverse heat dissipation adds anew at
each sampling step (churn serves that) and its list of levels (the path is continuous).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion import dct as _dct
from warm_diffusion import spectra as _spectra

_CORNER = 0.05  # width, in ln beta, over which the corners of (5) are rounded


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A path through blur and noise, both non-decreasing in t.

    Attributes:
      alpha: t [...] -> blur in pixels [...]; differentiable on [t_min, t_max].
      beta: t [...] -> noise standard deviation [...]; differentiable on [t_min, t_max].
      t_min: smallest time that the network sees, > 0.
      t_max: time at which sampling starts.
      sample_time: (key, shape) -> t, the training distribution.
    """

    alpha: Callable[[jax.Array], jax.Array]
    beta: Callable[[jax.Array], jax.Array]
    t_min: float
    t_max: float
    sample_time: Callable[[jax.Array, tuple[int, ...]], jax.Array]

    def bnr(self, t: jax.Array) -> jax.Array:
        """Blur-to-noise ratio alpha / beta at t > 0, in pixels per unit of noise."""
        return self.alpha(t) / self.beta(t)

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Levels (alpha, beta) to train at, each of `shape`: those at times of `sample_time`."""
        t = self.sample_time(key, shape)
        return self.alpha(t), self.beta(t)


@dataclasses.dataclass(frozen=True)
class _AnyBnr(Schedule):
    """The path of one ratio, trained over many; see `any_bnr`."""

    sample_bnr: Callable[[jax.Array, tuple[int, ...]], jax.Array]

    def sample_levels(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Levels (alpha, beta) to train at, eq. (7): beta as on every path, the ratio drawn."""
        time_key, bnr_key = jax.random.split(key)
        beta = self.beta(self.sample_time(time_key, shape))
        return self.sample_bnr(bnr_key, shape) * beta, beta


def _check_range(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(
            f"expected 0 < {low_name} < {high_name}, got {low_name}={low}, {high_name}={high}"
        )


def constant_bnr(
    bnr: float,
    *,
    beta_min: float = 0.002,
    beta_max: float = 80.0,
    p_mean: float = -1.2,
    p_std: float = 1.2,
) -> Schedule:
    """The paper's path, eq. (2): blur in a constant ratio to noise.

    Args:
      bnr: blur-to-noise ratio, pixels of blur per unit of noise, >= 0; the paper's best is 0.5.
      beta_min: smallest noise level of the sampler.
      beta_max: noise level at which sampling starts.
      p_mean: mean of ln beta in training, eq. (7).
      p_std: standard deviation of ln beta in training.

    Raises:
      ValueError: a negative ratio, or levels out of order.
    """
    # A traced ratio cannot be looked at (a jitted sampler over many ratios): it is let through.
    if not isinstance(bnr, jax.core.Tracer) and not bnr >= 0:
        raise ValueError(f"bnr must be >= 0, got {bnr}")
    _check_range("beta_min", beta_min, "beta_max", beta_max)
    return Schedule(
        alpha=lambda t: bnr * jnp.asarray(t, dtype=float),
        beta=lambda t: jnp.asarray(t, dtype=float),
        t_min=beta_min,
        t_max=beta_max,
        sample_time=lambda key, shape: jnp.exp(p_mean + p_std * jax.random.normal(key, shape)),
    )


def hot(**levels: float) -> Schedule:
    """Noise only, eq. (1): exactly EDM. `levels` as in `constant_bnr`."""
    return constant_bnr(0.0, **levels)


def cold(*, alpha_min: float = 0.5, alpha_max: float = 20.0, beta: float = 0.01) -> Schedule:
    """Blur only, at a small constant noise, eq. (3): inverse heat dissipation's path.

    It does not end in pure noise, so sampling must start from blurred images (`samplers.sample`'s
    `start`), and inverse heat dissipation's log-spaced levels are `time_grid(..., rho=inf)`.

    Args:
      alpha_min: smallest blur in pixels (CIFAR-10: 0.5).
      alpha_max: blur at which sampling starts (CIFAR-10: 20).
      beta: the noise level, > 0 (training: 0.01).

    Raises:
      ValueError: levels out of order, or no noise at all.
    """
    _check_range("alpha_min", alpha_min, "alpha_max", alpha_max)
    if not beta > 0:
        raise ValueError(f"beta must be > 0 (the loss weights errors by 1 / beta^2), got {beta}")
    log_range = math.log(alpha_min), math.log(alpha_max)
    return Schedule(
        alpha=lambda t: jnp.asarray(t, dtype=float),
        beta=lambda t: jnp.where(jnp.asarray(t) > 0, beta, 0.0),
        t_min=alpha_min,
        t_max=alpha_max,
        sample_time=lambda key, shape: jnp.exp(
            jax.random.uniform(key, shape, minval=log_range[0], maxval=log_range[1])
        ),
    )


def blurring_diffusion(
    *, sigma_blur_max: float = 20.0, log_snr_max: float = 10.0, t_min: float = 1e-3
) -> Schedule:
    """Blurring Diffusion's cosine schedule in variance-exploding form, eq. (4).

    Its authors step evenly in t: `time_grid(..., rho=1)`.

    Args:
      sigma_blur_max: blur in pixels at t = 1 (CIFAR-10: 20).
      log_snr_max: log-SNR next to the clean image, and minus that at t = 1.
      t_min: smallest time that the network sees, in (0, 1).

    Raises:
      ValueError: a negative blur, no range of log-SNR, or t_min out of range.
    """
    if not sigma_blur_max >= 0:
        raise ValueError(f"sigma_blur_max must be >= 0, got {sigma_blur_max}")
    if not log_snr_max > 0:
        raise ValueError(f"log_snr_max must be > 0, got {log_snr_max}")
    _check_range("t_min", t_min, "t_max", 1.0)
    angles = [math.atan(math.exp(sign * log_snr_max / 2)) for sign in (-1, 1)]

    def inside(t):
        # Churn may ask for a time beyond the end, where sine and tangent would turn back.
        t = jnp.asarray(t, dtype=float)
        return jnp.where(t > 1, 1.0, t)

    def beta(t):
        # At t = 0 the formula still has a little noise; the clean image has none.
        level = jnp.tan(angles[0] + inside(t) * (angles[1] - angles[0]))
        return jnp.where(jnp.asarray(t) > 0, level, 0.0)

    return Schedule(
        alpha=lambda t: sigma_blur_max * jnp.sin(jnp.pi / 2 * inside(t)) ** 2,
        beta=beta,
        t_min=t_min,
        t_max=1.0,
        sample_time=lambda key, shape: jax.random.uniform(key, shape, minval=t_min, maxval=1.0),
    )


def _takeover_points(spectrum: np.ndarray, attenuation: float) -> tuple[np.ndarray, np.ndarray]:
    """(ln beta, ln alpha) of eq. (5), both rising: where noise takes over a ring of frequencies."""
    eigen = np.array(_dct.eigenvalues(*spectrum.shape), np.float64)
    eigen[0, 0] = 1.0  # in a ring of its own, left out below
    power, inverse = (
        np.asarray(_spectra.radial_mean(a)[1], np.float64)[:0:-1] for a in (spectrum, 1 / eigen)
    )
    # From the highest frequency down. A ring with less power than one above it decides nothing:
    # when noise reaches its power, the finer detail is still visible and allows less blur.
    decides = np.diff(np.maximum.accumulate(power), prepend=0.0) > 0
    alpha = np.sqrt(-2 * math.log1p(-attenuation) * inverse)
    return np.log(power[decides]) / 2, np.log(alpha[decides])


def spectral(spectrum: jax.Array, attenuation: float = 0.05, **levels: float) -> Schedule:
    """As much blur at each noise level as the data's spectrum allows there, eq. (5).

    Args:
      spectrum: variance S of each DCT coefficient [H, W] (`spectra.power_spectrum`), not traced.
      attenuation: share in (0, 1) of a frequency that blur may take before noise hides it.
      **levels: beta_min, beta_max, p_mean, p_std as in `constant_bnr`.

    Raises:
      ValueError: no spectrum, attenuation or levels out of range, or images without any detail.
    """
    spectrum = _spectra.check_spectrum(spectrum, attenuation)
    with jax.ensure_compile_time_eval():  # numbers, also under jit
        log_beta, log_alpha = _takeover_points(spectrum, attenuation)
    slopes = np.diff(log_alpha) / np.diff(log_beta)
    # d ln alpha / d ln beta is 1 outside and these slopes between the points. Every corner is a
    # softplus, so the slope everywhere is an average of them: alpha rises and is smooth.
    corners = np.diff(slopes, prepend=1.0, append=1.0) if len(slopes) else np.zeros(1)
    first = float(log_alpha[0] - log_beta[0])

    def alpha(t):
        t = jnp.asarray(t, dtype=float)
        shape = (1,) * t.ndim + (-1,)
        distance = jnp.log(jnp.where(t > 0, t, 1.0))[..., None] - log_beta.reshape(shape)
        bend = _CORNER * jax.nn.softplus(distance / _CORNER) * corners.reshape(shape)
        return t * jnp.exp(first + jnp.sum(bend, axis=-1))

    return dataclasses.replace(constant_bnr(0.0, **levels), alpha=alpha)


def any_bnr(
    bnr: float = 0.5,
    bnr_range: tuple[float, float] = (0.1, 10.0),
    hot_share: float = 0.1,
    **levels: float,
) -> Schedule:
    """One network for every ratio, eq. (6): it sees alpha and beta apart, so it can tell.

    As a path it is `constant_bnr(bnr)`; the network may be sampled along any other.

    Args:
      bnr: ratio of the path.
      bnr_range: smallest and largest ratio in training, ln bnr uniform in between.
      hot_share: share of the training images in [0, 1] that are not blurred at all.
      **levels: beta_min, beta_max, p_mean, p_std as in `constant_bnr`.

    Raises:
      ValueError: a ratio, a share or levels out of range.
    """
    low, high = bnr_range
    _check_range("bnr_range[0]", low, "bnr_range[1]", high)
    if not 0 <= hot_share <= 1:
        raise ValueError(f"hot_share must lie between 0 and 1, got {hot_share}")

    def sample_bnr(key, shape):
        ratio_key, hot_key = jax.random.split(key)
        log_ratio = jax.random.uniform(
            ratio_key, shape, minval=math.log(low), maxval=math.log(high)
        )
        return jnp.where(jax.random.uniform(hot_key, shape) < hot_share, 0.0, jnp.exp(log_ratio))

    path = constant_bnr(bnr, **levels)
    return _AnyBnr(**vars(path), sample_bnr=sample_bnr)


def time_grid(schedule: Schedule, num_steps: int, rho: float = 7.0) -> jax.Array:
    """The sampler's times, eq. (8): from t_max down to t_min, then 0, the clean image.

    Args:
      schedule: the path; its t_min and t_max bound the grid.
      num_steps: number of steps n, >= 1 (n = 1 goes from t_max to 0 at once).
      rho: how much the steps shorten towards t_min; 1 is uniform, infinity geometric.

    Returns:
      [num_steps + 1], strictly decreasing.

    Raises:
      ValueError: no step, rho < 1, or a schedule whose t_min is not between 0 and t_max.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}")
    _check_range("t_min", schedule.t_min, "t_max", schedule.t_max)
    fraction = np.arange(num_steps) / max(num_steps - 1, 1)
    if math.isinf(rho):
        times = schedule.t_max * (schedule.t_min / schedule.t_max) ** fraction
    else:
        root_max, root_min = schedule.t_max ** (1 / rho), schedule.t_min ** (1 / rho)
        times = (root_max + fraction * (root_min - root_max)) ** rho
    return jnp.asarray(np.append(times, 0.0), dtype=float)
