"""Likelihood by the probability flow: the change of variables from an image to the noise.

The sampler's flow (process.py, eq. (5)) turns N(0, beta(t_max)^2 I) at t_max into a density p at
t_min > 0, the last level that the network knows. Following it upwards from x = x(t_min),

    (1)  ln p(x) = ln N(x(t_max); 0, beta(t_max)^2 I) + integral of div v dt, t_min to t_max
                   (Chen et al. 2018, arXiv 1806.07366; Song et al. 2021, arXiv 2011.13456, 4.3)

States at t_min are blurred by B(alpha(t_min)). Undoing that is linear, exact, and part of the model
here: clean images are y = B^-1 x, with m the blur's factors and C channels

    (2)  ln p(y) = ln p(B y) + C sum ln m(alpha(t_min))

The noise beta(t_min) stays in (0.002 by default, a quarter of a grey level): p is the density of
what the sampler draws before its last, denoising step. At the other end N(0, beta(t_max)^2 I) is
where the sampler starts; the data's own marginal there has a mean, so even an exact denoiser gives
the data's density only up to about |mean| / beta(t_max) nats in a coefficient that the blur has not
wiped out. Nothing is approximated but the integral, and div v if estimated:

    exact        sum_i of e_i . J e_i                           d products J e: small images
    hutchinson   e . J e, signs e at random, fixed along the path    unbiased (Grathwohl et al.
                                                                2019, arXiv 1810.01367)

    (3)  bits per dimension = -(ln p(y + u) / d + ln(2 / 255)) / ln 2, u uniform in a grey level's
         cell of side 2 / 255: on average over u an upper bound for the 8-bit image (Theis et al.
         2016, arXiv 1511.01844, sec. 3.1), for any p

Time is ln t, in which the flow is smooth at every level. Deliberately absent: gradients through the
solver, and variational dequantization.
"""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Denoiser
from warm_diffusion.process import _image_keys, velocity
from warm_diffusion.schedules import Schedule

TRACES = ("exact", "hutchinson")
_CELL = 2 / 255  # side of a grey level's cell, images in [-1, 1]
_LEAST_NOISE = 1.0  # at t_max, in units of the images' range


class LogDensity(NamedTuple):
    """Log-densities in nats [B], steps that the solver took, and whether it came to the end."""

    values: jax.Array
    num_steps: jax.Array
    converged: jax.Array


def log_density(
    denoise: Denoiser,
    images: jax.Array,
    schedule: Schedule,
    *,
    key: jax.Array,
    trace: str = "hutchinson",
    tolerance: float = 1e-5,
    max_steps: int = 2000,
) -> LogDensity:
    """Log-densities in nats of clean images under the flow of a denoiser, (1) and (2); jittable.

    Args:
      denoise: (x, alpha, beta) -> Prediction; an image's must not depend on the others.
      images: [B, H, W, C] in [-1, 1], dequantized.
      schedule: the path; it must end in noise.
      key: of the estimated trace; one, or one per image.
      trace: exact or hutchinson.
      tolerance: relative and absolute, of state and of the density per dimension, at each step
        for the worst image.
      max_steps: of the solver (Tsit5, of order 5: six calls of the flow each).

    Raises:
      ValueError: an unknown trace, wrong shapes, or a path that does not end in noise.
    """
    if trace not in TRACES:
        raise ValueError(f"trace must be one of {', '.join(TRACES)}, got {trace!r}")
    images = jnp.asarray(images)
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats [B, H, W, C], got {images.dtype} {images.shape}")
    count, height, width, channels = images.shape
    with jax.ensure_compile_time_eval():  # known numbers under jit, too
        alpha_min = float(schedule.alpha(schedule.t_min))
        beta_max = float(schedule.beta(schedule.t_max))
        # ln m = -lambda alpha^2 / 2, not the logarithm of an m that may be 0 in float32.
        deblurring = -channels * float(jnp.sum(_dct.eigenvalues(height, width))) * alpha_min**2 / 2
    if beta_max < _LEAST_NOISE:
        raise ValueError(
            f"the path ends at noise {beta_max:g}, in blurred images: their density, and so the "
            "likelihood, is unknown"
        )
    dimensions = height * width * channels
    probes = _probes(_image_keys(key, count), images, trace)

    def rate(log_t, state, _):
        t = jnp.exp(log_t)

        def flow(x):
            prediction = denoise(x, schedule.alpha(t), schedule.beta(t))
            return t * velocity(x, prediction, schedule, t)

        moved, push = jax.linearize(flow, state[0])
        products = jax.lax.map(lambda e: jnp.sum(e * push(e), axis=(1, 2, 3)), probes)
        return moved, jnp.sum(products, axis=0) / dimensions

    start = _dct.blur(images, alpha_min)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rate),
        diffrax.Tsit5(),
        t0=np.log(schedule.t_min).astype(images.dtype),
        t1=np.log(schedule.t_max).astype(images.dtype),
        dt0=None,
        y0=(start, jnp.zeros(count, images.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=_worst),
        max_steps=max_steps,
        adjoint=diffrax.DirectAdjoint(),
        throw=False,
    )
    end, change = (part[-1] for part in solution.ys)
    squares = jnp.sum(end**2, axis=(1, 2, 3)) / beta_max**2
    prior = -squares / 2 - dimensions * (np.log(beta_max) + np.log(2 * np.pi) / 2)
    converged = solution.result == diffrax.RESULTS.successful
    return LogDensity(
        prior + dimensions * change + deblurring, solution.stats["num_steps"], converged
    )


def _probes(keys: jax.Array, images: jax.Array, trace: str) -> jax.Array:
    """Directions [K, B, H, W, C] whose products e . J e add up to the trace."""
    if trace == "exact":
        size = int(np.prod(images.shape[1:]))
        basis = jnp.eye(size, dtype=images.dtype).reshape(size, 1, *images.shape[1:])
        return jnp.broadcast_to(basis, (size, *images.shape))
    signs = jax.vmap(lambda key: jax.random.rademacher(key, images.shape[1:], images.dtype))(keys)
    return signs[None]


def _worst(error: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Largest scaled error of any image: the others in the batch give no image more slack."""
    state, change = error
    of_states = jnp.sqrt(jnp.mean(state**2, axis=(1, 2, 3)))
    return jnp.maximum(jnp.max(of_states), jnp.max(jnp.abs(change)))


def bits_per_dim(
    denoise: Denoiser, images: jax.Array, schedule: Schedule, *, key: jax.Array, **options
) -> LogDensity:
    """Bits per dimension of uint8 images [B, H, W, C] with uniform dequantization, eq. (3).

    `key` draws dequantization and trace; the rest is as for `log_density`, whose result has
    `values` in bits per dimension here.
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.dtype != jnp.uint8:
        raise ValueError(f"expected uint8 images [B, H, W, C], got {images.dtype} {images.shape}")
    keys = jax.vmap(lambda key: jax.random.split(key))(_image_keys(key, len(images)))
    noise = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:]))(keys[:, 0])
    dequantized = images.astype(jnp.float32) / 127.5 - 1 + _CELL * (noise - 0.5)
    found = log_density(denoise, dequantized, schedule, key=keys[:, 1], **options)
    dimensions = int(np.prod(images.shape[1:]))
    return found._replace(values=-(found.values / dimensions + np.log(_CELL)) / np.log(2))
