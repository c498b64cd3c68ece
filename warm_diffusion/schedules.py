"""Paths t -> (alpha, beta) through blur and noise, their training distribution and time grids.

    (1)  hot            alpha = 0,      beta = t      EDM (Karras et al. 2022, arXiv 2206.00364)
    (2)  constant_bnr   alpha = bnr t,  beta = t      Warm Diffusion (arXiv 2511.16904), default 0.5
    (3)  cold           alpha = t,      beta constant inverse heat dissipation (arXiv 2206.13397)
    (4)  blurring_diffusion  alpha = sigma sin^2(pi t / 2), beta = tan(theta_0 + t (theta_1 -
                        theta_0)), log-SNR = -2 ln beta falls from 10 to -10: Hoogeboom & Salimans
                        2023 (arXiv 2209.05557), variance exploding; Warm Diffusion, table 4
    (5)  spectral       alpha(beta), beta = t         from the data's spectrum (`spectra.py`, ours)
    (6)  any_bnr        (2) with a ratio drawn for each training image (ours)
         from_functions any two functions of t

    (7)  training:      ln beta ~ N(p_mean, p_std^2)  EDM, table 1; (3): ln alpha uniform; (4): t
                        uniform; (6): ln bnr uniform besides, and 0 for a share of the images
    (8)  time grid:     t_i = (t_max^(1/rho) + i/(n-1) (t_min^(1/rho) - t_max^(1/rho)))^rho,
                        t_n = 0                       EDM, eq. (5)

Each is a `Schedule` (`process.py`: what a path must satisfy). Absent on purpose: the noise that
inverse heat dissipation adds anew at each sampling step (churn serves that) and its list of levels
(the path is continuous).
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import spectra as _spectra
from warm_diffusion.grids import spectral_grid as spectral_grid
from warm_diffusion.process import Draw, check_range
from warm_diffusion.process import Schedule as Schedule  # a name of this module for users, too


def _log_uniform(low: float, high: float) -> Draw:
    low, high = math.log(low), math.log(high)
    return lambda key, shape: jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))


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

    Example:
      >>> path = schedules.constant_bnr(0.5)
      >>> float(path.alpha(4.0)), float(path.beta(4.0))
      (2.0, 4.0)
    """
    # A traced ratio cannot be looked at (a jitted sampler over many ratios): it is let through.
    if not isinstance(bnr, jax.core.Tracer) and not bnr >= 0:
        raise ValueError(f"bnr must be >= 0, got {bnr}")
    check_range("beta_min", beta_min, "beta_max", beta_max)
    return Schedule(
        alpha=lambda t: bnr * jnp.asarray(t, dtype=float),
        beta=lambda t: jnp.asarray(t, dtype=float),
        t_min=beta_min,
        t_max=beta_max,
        sample_time=lambda key, shape: jnp.exp(p_mean + p_std * jax.random.normal(key, shape)),
    )


def from_functions(
    alpha: Callable[[jax.Array], ArrayLike] | float,
    beta: Callable[[jax.Array], ArrayLike] | float,
    *,
    t_min: float,
    t_max: float,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    sample_time: Draw | None = None,
) -> Schedule:
    """A path of any blur and noise that do not fall, with the clean image put at t = 0.

    Args:
      alpha: t > 0 [...] -> blur in pixels, by jax.numpy; a bare number stands for a constant.
      beta: t > 0 [...] -> noise standard deviation > 0, likewise.
      t_min: smallest time that the network sees, > 0.
      t_max: time at which sampling starts.
      p_mean: mean of ln beta in training, eq. (7), within the path's range of beta.
      p_std: standard deviation of ln beta in training.
      sample_time: (key, shape) -> t instead; needed where beta does not rise all the way.

    Raises:
      ValueError: a rule of `Schedule` is broken, or beta stays constant without `sample_time`.

    Example:
      >>> path = schedules.from_functions(
      ...     alpha=lambda t: 0.5 * t, beta=lambda t: t**2, t_min=0.05, t_max=9.0
      ... )
      >>> float(path.alpha(4.0)), float(path.beta(4.0)), float(path.beta(0.0))
      (2.0, 16.0, 0.0)
    """
    check_range("t_min", t_min, "t_max", t_max)

    alpha, beta = (
        level if callable(level) else lambda t, value=level: jnp.full_like(t, value)
        for level in (alpha, beta)
    )

    def from_clean(level: Callable[[jax.Array], ArrayLike]) -> Callable[[ArrayLike], jax.Array]:
        def at(t: ArrayLike) -> jax.Array:
            t = jnp.asarray(t, dtype=float)
            # The formula never sees 0, where it or its derivative may be infinite.
            return jnp.where(t > 0, level(jnp.where(t > 0, t, t_min)), 0.0)

        return at

    alpha, beta = from_clean(alpha), from_clean(beta)
    if sample_time is None:
        log_t = np.linspace(math.log(t_min), math.log(t_max), 1025)
        with jax.ensure_compile_time_eval():
            log_beta = jnp.log(beta(np.exp(log_t)))
        if not isinstance(log_beta, jax.core.Tracer) and not np.all(np.diff(log_beta) > 0):
            raise ValueError(
                "beta must be > 0 and rise all the way from t_min to t_max, so that each level has "
                "one time to train at: pass sample_time=, (key, shape) -> t"
            )

        def sample_time(key, shape):
            # Levels beyond the table get its ends' times: that clips them to the path.
            levels = p_mean + p_std * jax.random.normal(key, shape)
            return jnp.exp(jnp.interp(levels, log_beta, log_t))

    return Schedule(alpha, beta, t_min, t_max, sample_time)


def hot(**levels: float) -> Schedule:
    """Noise only, eq. (1): exactly EDM. `levels` as in `constant_bnr`.

    Example:
      >>> float(schedules.hot().alpha(4.0)), float(schedules.hot().beta(4.0))
      (0.0, 4.0)
    """
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

    Example:
      >>> path = schedules.cold()
      >>> float(path.alpha(4.0)), round(float(path.beta(4.0)), 4), path.needs_start
      (4.0, 0.01, True)
    """
    check_range("alpha_min", alpha_min, "alpha_max", alpha_max)
    if not beta > 0:
        raise ValueError(f"beta must be > 0 (the loss weights errors by 1 / beta^2), got {beta}")
    return from_functions(
        alpha=lambda t: t,
        beta=lambda t: beta,
        t_min=alpha_min,
        t_max=alpha_max,
        sample_time=_log_uniform(alpha_min, alpha_max),
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

    Example:
      Half way, log-SNR 0.

      >>> path = schedules.blurring_diffusion()
      >>> round(float(path.alpha(0.5)), 3), round(float(path.beta(0.5)), 3)
      (10.0, 1.0)
    """
    if not sigma_blur_max >= 0:
        raise ValueError(f"sigma_blur_max must be >= 0, got {sigma_blur_max}")
    if not log_snr_max > 0:
        raise ValueError(f"log_snr_max must be > 0, got {log_snr_max}")
    angles = [math.atan(math.exp(sign * log_snr_max / 2)) for sign in (-1, 1)]

    def inside(t):
        # Churn may ask for a time beyond the end, where sine and tangent would turn back.
        return jnp.where(t > 1, 1.0, t)

    return from_functions(
        alpha=lambda t: sigma_blur_max * jnp.sin(jnp.pi / 2 * inside(t)) ** 2,
        beta=lambda t: jnp.tan(angles[0] + inside(t) * (angles[1] - angles[0])),
        t_min=t_min,
        t_max=1.0,
        sample_time=lambda key, shape: jax.random.uniform(key, shape, minval=t_min, maxval=1.0),
    )


def spectral(spectrum: ArrayLike, attenuation: float = 0.05, **levels: float) -> Schedule:
    """As much blur at each noise level as the data's spectrum allows there, eq. (5).

    Args:
      spectrum: variance S of each DCT coefficient [H, W] (`spectra.power_spectrum`), not traced.
      attenuation: share in (0, 1) of a frequency that blur may take before noise hides it.
      **levels: beta_min, beta_max, p_mean, p_std as in `constant_bnr`.

    Raises:
      ValueError: no spectrum, attenuation or levels out of range, or images without any detail.

    Example:
      >>> path = schedules.spectral(np.array([[1.0, 8 / np.pi**2]]), attenuation=1 - np.exp(-1))
      >>> round(float(path.bnr(0.3)), 3), round(float(path.bnr(3.0)), 3)
      (1.0, 1.0)
    """
    blur = _spectra.allowed_blur(spectrum, attenuation)
    return dataclasses.replace(constant_bnr(0.0, **levels), alpha=blur)


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

    Example:
      >>> path = schedules.any_bnr(0.5, bnr_range=(2.0, 3.0), hot_share=0.0)
      >>> alpha, beta = path.sample_levels(jax.random.key(0), (100,))
      >>> bool(jnp.all((alpha / beta > 1.99) & (alpha / beta < 3.01))), float(path.bnr(1.0))
      (True, 0.5)
    """
    low, high = bnr_range
    check_range("bnr_range[0]", low, "bnr_range[1]", high)
    if not 0 <= hot_share <= 1:
        raise ValueError(f"hot_share must lie between 0 and 1, got {hot_share}")

    def sample_bnr(key, shape):
        ratio_key, hot_key = jax.random.split(key)
        ratio = _log_uniform(low, high)(ratio_key, shape)
        return jnp.where(jax.random.uniform(hot_key, shape) < hot_share, 0.0, ratio)

    return dataclasses.replace(constant_bnr(bnr, **levels), sample_bnr=sample_bnr)


def time_grid(schedule: Schedule, num_steps: int, rho: float = 7.0) -> jax.Array:
    """The sampler's times, eq. (8): from t_max down to t_min, then 0, the clean image.

    Args:
      schedule: the path; its t_min and t_max bound the grid.
      num_steps: number of steps n, >= 1 (n = 1 goes from t_max to 0 at once).
      rho: how much the steps shorten towards t_min; 1 is uniform, infinity geometric.

    Returns:
      [num_steps + 1], strictly decreasing.

    Raises:
      ValueError: no step, or rho < 1.

    Example:
      >>> path = schedules.hot(beta_min=1.0, beta_max=100.0)
      >>> print(np.asarray(schedules.time_grid(path, 3, rho=np.inf)).round(3))
      [100.  10.   1.   0.]
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}")
    fraction = np.arange(num_steps) / max(num_steps - 1, 1)
    if math.isinf(rho):
        times = schedule.t_max * (schedule.t_min / schedule.t_max) ** fraction
    else:
        root_max, root_min = schedule.t_max ** (1 / rho), schedule.t_min ** (1 / rho)
        times = (root_max + fraction * (root_min - root_max)) ** rho
    return jnp.asarray(np.append(times, 0.0), dtype=float)


def by_name(name: str, spectrum: ArrayLike | None = None, **numbers: Any) -> Schedule:
    """The path of a name, as a saved model's settings hold it.

    Args:
      name: hot, constant_bnr, any_bnr, spectral, blurring_diffusion or cold.
      spectrum: variance of each DCT coefficient [H, W], for `spectral`; the others ignore it.
      **numbers: arguments of the function of that name: plain numbers, bnr_range also as a list.

    Raises:
      ValueError: an unknown name or argument, a missing one, or a number out of range.

    Example:
      >>> float(schedules.by_name("constant_bnr", bnr=0.5, beta_max=40.0).alpha(4.0))
      2.0
    """
    paths = {
        f.__name__: f for f in (hot, constant_bnr, any_bnr, spectral, blurring_diffusion, cold)
    }
    if name not in paths:
        raise ValueError(f"schedule name must be one of {', '.join(paths)}, got {name!r}")
    known = set(inspect.signature(paths[name]).parameters)
    if "levels" in known:
        known |= set(constant_bnr.__kwdefaults__)
    given = {"spectrum": spectrum} if name == "spectral" else {}
    try:
        return paths[name](**given, **numbers)
    except TypeError as error:  # Python's, for an argument too many or too few
        takes = ", ".join(sorted(known - {"levels", "spectrum"}))
        raise ValueError(f"schedule {name} takes {takes}: {error}") from error
