"""Score matching on both heads.

With (alpha, beta) from the schedule's training distribution, eps ~ N(0, I) and
x = B(alpha) x0 + beta eps (Warm Diffusion, sec. 3.2; EDM's weighting):

    (1)  L   = E[ w_D |D - B x0|^2 + w_R |R - (I - B) x0|^2 ]
    (2)  w_D = (beta^2 + s^2) / (beta s)^2      = 1 / c_out^2
    (3)  w_R = residual_weight / s^2            (ours: 1 / the residual head's output scale squared)
         or, in the DCT basis, (w^2 + floor) / s^2,  w = lambda alpha^2 m(alpha)   "flow"
    (4)  consistency = |D - B(D + R)|^2         zero for exact posterior means; logged, not trained

w is what an error of R does to the probability flow, per unit of ln beta at a constant ratio: R
matters only in the band that the blur is leaving just then (lambda alpha^2 ~ 2, w <= 2 / e). "flow"
(ours) trains it there; the floor keeps the rest from being anything at all, which solvers that use
D + R as a whole need.

|.|^2 is the mean over pixels and channels, so losses of different resolutions compare. The minimum
of (1) is the posterior variance, not zero. Averages over the batch are the caller's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Denoiser, check_prediction
from warm_diffusion.process import image_keys
from warm_diffusion.schedules import Schedule


class LossTerms(NamedTuple):
    """Loss of each example, eqs. (1) and (4): all [B]; total = denoise + deblur, weighted.

    Example:
      >>> losses.LossTerms(total=3.0, denoise=2.0, deblur=1.0, consistency=0.0).deblur
      1.0
    """

    total: jax.Array
    denoise: jax.Array
    deblur: jax.Array
    consistency: jax.Array


def _mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(x), axis=(1, 2, 3))


def check_residual_weight(weight: float | str, floor: float) -> None:
    """Raises ValueError unless eq. (3) has such a weight: a number, or "flow" and its floor.

    Example:
      >>> losses.check_residual_weight("flow", 0.1)
      >>> losses.check_residual_weight("flwo", 0.1)
      Traceback (most recent call last):
      ValueError: residual_weight must be a number or flow, got 'flwo'
    """
    flow = isinstance(weight, str) and weight == "flow"
    if not flow and isinstance(weight, str | bool | tuple | None):  # a traced number passes
        raise ValueError(f"residual_weight must be a number or flow, got {weight!r}")
    if not flow and floor:
        raise ValueError(f"residual_floor={floor} goes with residual_weight=flow, not {weight}")


def _flow_gain(alpha: jax.Array, x: jax.Array) -> jax.Array:
    """w of eq. (3) for each DCT coefficient of images x."""
    eigen = _dct.eigenvalues(*x.shape[1:3]).reshape(1, *x.shape[1:3], 1)
    return eigen * _dct.expand_like(alpha, x) ** 2 * _dct.transfer_like(alpha, x)


def score_matching_loss(
    denoise: Denoiser,
    key: jax.Array,
    x0: ArrayLike,
    schedule: Schedule,
    *,
    sigma_data: float = 0.5,
    residual_weight: float | str = 1.0,
    residual_floor: float = 0.0,
) -> LossTerms:
    """Denoising and deblurring loss at random levels, eq. (1).

    Args:
      denoise: the denoiser with its parameters closed over; called once.
      key: a JAX PRNG key, or one per image; level and noise of image i come from its own stream.
      x0: clean images [B, H, W, C] in [-1, 1].
      schedule: the path; its `sample_levels` draws the levels.
      sigma_data: standard deviation of the data, the same as in `denoiser.precondition`.
      residual_weight: weight of the residual head, eq. (3): a number, 0 training the denoiser
        alone, or "flow".
      residual_floor: of "flow"; w^2 itself is at most 0.54.

    Returns:
      LossTerms, one number per example.

    Raises:
      ValueError: x0 is not [B, H, W, C] in [-1, 1], or `denoise` a network that is not wrapped; a
        weight by an unknown name, a floor without "flow".

    Example:
      The exact denoiser of a single image makes no error.

      >>> x0 = np.ones((4, 8, 8, 3))
      >>> terms = losses.score_matching_loss(
      ...     oracle.mixture(x0[:1]), jax.random.key(0), x0, schedules.constant_bnr(0.5)
      ... )
      >>> terms.total.shape, bool(jnp.all(terms.total < 1e-6))
      ((4,), True)
    """
    check_residual_weight(residual_weight, residual_floor)
    x0 = _dct.as_images(x0, "x0")
    _dct.check_scale(x0, "x0")
    time_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(image_keys(key, len(x0)))
    alpha, beta = jax.vmap(lambda key: schedule.sample_levels(key, ()))(time_keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))(noise_keys)
    blurry = _dct.blur(x0, alpha)
    x = blurry + _dct.expand_like(beta, x0) * noise
    prediction = check_prediction(denoise(x, alpha, beta))

    denoise_weight = (beta**2 + sigma_data**2) / (beta * sigma_data) ** 2
    denoise_loss = denoise_weight * _mean_square(prediction.blurry - blurry)
    error = prediction.residual - (x0 - blurry)
    if isinstance(residual_weight, str):  # flow
        weighted = jnp.sqrt(_flow_gain(alpha, x0) ** 2 + residual_floor) * _dct.dct(error)
        deblur_loss = _mean_square(weighted) / sigma_data**2
    else:
        deblur_loss = residual_weight / sigma_data**2 * _mean_square(error)
    consistency = _mean_square(prediction.blurry - _dct.blur(prediction.clean, alpha))
    return LossTerms(denoise_loss + deblur_loss, denoise_loss, deblur_loss, consistency)
