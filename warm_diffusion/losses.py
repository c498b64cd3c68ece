"""Score matching on both heads.

With (alpha, beta) from the schedule's training distribution, eps ~ N(0, I) and
x = B(alpha) x0 + beta eps (Warm Diffusion, sec. 3.2; EDM's weighting):

    (1)  L   = E[ w_D |D - B x0|^2 + w_R |R - (I - B) x0|^2 ]
    (2)  w_D = (beta^2 + s^2) / (beta s)^2      = 1 / c_out^2
    (3)  w_R = residual_weight / s^2            (ours: 1 / the residual head's output scale squared)
    (4)  consistency = |D - B(D + R)|^2         zero for exact posterior means; logged, not trained

|.|^2 is the mean over pixels and channels, so losses of different resolutions compare. The minimum
of (1) is the posterior variance, not zero. Averages over the batch are the caller's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Denoiser
from warm_diffusion.process import image_keys
from warm_diffusion.schedules import Schedule


class LossTerms(NamedTuple):
    """Loss of each example, eqs. (1) and (4): all [B]; total = denoise + deblur, weighted."""

    total: jax.Array
    denoise: jax.Array
    deblur: jax.Array
    consistency: jax.Array


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=(1, 2, 3))


def score_matching_loss(
    denoise: Denoiser,
    key: jax.Array,
    x0: jax.Array,
    schedule: Schedule,
    *,
    sigma_data: float = 0.5,
    residual_weight: float = 1.0,
) -> LossTerms:
    """Denoising and deblurring loss at random levels, eq. (1).

    Args:
      denoise: the denoiser with its parameters closed over; called once.
      key: a JAX PRNG key, or one per image; level and noise of image i come from its own stream.
      x0: clean images [B, H, W, C] in [-1, 1].
      schedule: the path; its `sample_levels` draws the levels.
      sigma_data: standard deviation of the data, the same as in `denoiser.precondition`.
      residual_weight: weight of the residual head; 0 trains the denoiser alone.

    Returns:
      LossTerms, one number per example.

    Raises:
      ValueError: x0 is not [B, H, W, C].
    """
    x0 = jnp.asarray(x0)
    if x0.ndim != 4 or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 must be float images [B, H, W, C], got {x0.dtype} {x0.shape}")
    time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(image_keys(key, len(x0)))
    alpha, beta = jax.vmap(lambda key: schedule.sample_levels(key, ()))(time_keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))(noise_keys)
    blurry = _dct.blur(x0, alpha)
    prediction = denoise(blurry + _dct.expand_like(beta, x0) * noise, alpha, beta)

    denoise_weight = (beta**2 + sigma_data**2) / (beta * sigma_data) ** 2
    denoise_loss = denoise_weight * _mean_square(prediction.blurry - blurry)
    residual_error = _mean_square(prediction.residual - (x0 - blurry))
    deblur_loss = residual_weight / sigma_data**2 * residual_error
    consistency = _mean_square(prediction.blurry - _dct.blur(prediction.clean, alpha))
    return LossTerms(denoise_loss + deblur_loss, denoise_loss, deblur_loss, consistency)
