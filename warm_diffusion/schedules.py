"""Paths t -> (alpha, beta) through blur and noise, their training distribution and time grids.

    (1)  hot            alpha = 0,      beta = t      EDM (Karras et al. 2022, arXiv 2206.00364)
    (2)  constant_bnr   alpha = bnr t,  beta = t      Warm Diffusion (arXiv 2511.16904), default 0.5
    (3)  cold           alpha = t,      beta constant inverse heat dissipation (arXiv 2206.13397)

    (4)  training:      ln beta ~ N(p_mean, p_std^2)  EDM, table 1; (3): ln alpha uniform
    (5)  time grid:     t_i = (t_max^(1/rho) + i/(n-1) (t_min^(1/rho) - t_max^(1/rho)))^rho,
                        t_n = 0                       EDM, eq. (5)

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
      p_mean: mean of ln beta in training, eq. (4).
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


def time_grid(schedule: Schedule, num_steps: int, rho: float = 7.0) -> jax.Array:
    """The sampler's times, eq. (5): from t_max down to t_min, then 0, the clean image.

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
