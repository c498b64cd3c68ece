"""Score matching on both heads.

With (alpha, beta) from a training distribution, eps ~ N(0, I) and x = B(alpha) x0 + beta eps (Warm
Diffusion, sec. 3.2; EDM's weighting):

    (1)  L   = E[ w_D |D - B x0|^2 + w_R |R - (I - B) x0|^2 ]
    (2)  w_D = (beta^2 + s^2) / (beta s)^2      = 1 / c_out^2
    (3)  w_R = residual_weight / s^2            (ours: 1 / the residual head's output scale squared)
    (4)  consistency = |D - B(D + R)|^2         zero for exact posterior means; logged, not trained

|.|^2 is the mean over pixels and channels, so losses of different resolutions compare. The minimum
of (1) is the posterior variance, not zero. Averages over the batch are the caller's.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion import schedules as _schedules
from warm_diffusion.denoiser import Denoiser, _predict
from warm_diffusion.process import _image_keys, _normal
from warm_diffusion.schedules import Schedule

# (key, shape) -> (alpha, beta), each of that shape
TrainingLevels = Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, jax.Array]]


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
    return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


def _sigma_data(denoise: Denoiser, given: ArrayLike | None) -> ArrayLike:
    """The standard deviation of the data that the denoiser carries, or was given, or 0.5."""
    while isinstance(denoise, functools.partial):
        denoise = denoise.func
    carried = getattr(inspect.unwrap(denoise), "sigma_data", None)
    if given is None:
        return 0.5 if carried is None else carried
    known = carried is not None and not _schedules._traced(carried, given)
    if known and float(carried) != float(given):
        raise ValueError(
            f"sigma_data must be that of the denoiser, {carried}, got {given}: leave it out here"
        )
    return given


def _check_range(x0: jax.Array, sigma_data: ArrayLike) -> None:
    """Raises ValueError where the data cannot have this standard deviation, if both are known."""
    if _schedules._traced(x0, sigma_data) or not x0.size:
        return
    with _schedules._eager():
        largest = float(max(x0.max(), -x0.min()))
    if largest > 20 * float(sigma_data):
        raise ValueError(
            f"x0 has values up to {largest:g}, which does not go with sigma_data = {sigma_data:g}: "
            "scale images by x / 127.5 - 1, or give denoiser.precondition the standard deviation "
            "of the data, sigma_data="
        )


def _weight(residual_weight, alpha: jax.Array, x: jax.Array) -> jax.Array:
    weight = residual_weight(alpha, x) if callable(residual_weight) else residual_weight
    if isinstance(weight, str) or jnp.shape(weight) not in ((), x.shape[:1]):
        got = repr(weight) if isinstance(weight, str) else f"shape {jnp.shape(weight)}"
        raise ValueError(
            "residual_weight must be a number, or a function of (alpha, x) that returns one "
            f"number per image, ({x.shape[0]},), got {got}"
        )
    return _dct._per_image(weight, x)


def score_matching_loss(
    denoise: Denoiser,
    key: jax.Array,
    x0: ArrayLike,
    schedule: Schedule | TrainingLevels,
    *,
    sigma_data: float | None = None,
    residual_weight: float | Callable[[jax.Array, jax.Array], jax.Array] = 1.0,
) -> LossTerms:
    """Denoising and deblurring loss at random levels, eq. (1).

    Args:
      denoise: the denoiser with its parameters closed over; called once.
      key: a JAX PRNG key, or one per image; level and noise of image i come from its own stream.
      x0: clean data [B, *spatial, C].
      schedule: a path, whose `sample_levels` draws the levels, or any function (key, shape) ->
        (alpha, beta).
      sigma_data: standard deviation of the data; None: what `denoiser.precondition` was given, or
        0.5 where the denoiser does not carry it.
      residual_weight: weight of the residual head, eq. (3): a number (0 trains the denoiser alone),
        or a function of (alpha [B], x [B, *spatial, C]) -> [B].

    Returns:
      LossTerms, one number per example, in float32 at least.

    Raises:
      ValueError: x0 is not [B, *spatial, C] or has values far beyond sigma_data, `denoise` is a
        network that is not wrapped, or another argument is not of its kind.

    Example:
      The exact denoiser of a single image makes no error.

      >>> x0 = np.ones((4, 8, 8, 3))
      >>> terms = losses.score_matching_loss(
      ...     oracle.mixture(x0[:1]), jax.random.key(0), x0, schedules.constant_bnr(0.5)
      ... )
      >>> terms.total.shape, bool(jnp.all(terms.total < 1e-6))
      ((4,), True)
    """
    x0, sigma_data = _dct._wide(_dct._array(x0, "x0")), _sigma_data(denoise, sigma_data)
    _check_range(x0, sigma_data)
    keys = _image_keys(key, x0.shape[0])
    # fold_in instead of split: keys of a split batch cannot be unpacked under debug_key_reuse.
    level_keys, noise_keys = (
        jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys) for i in (0, 1)
    )
    draw = _schedules._training_levels(schedule)
    alpha, beta = (
        _dct._per_image(level, x0) for level in jax.vmap(lambda key: draw(key, ()))(level_keys)
    )
    blurry = _dct._blur(x0, alpha)
    x = blurry + _dct._level(beta, x0) * _normal(noise_keys, x0)
    prediction = _predict(denoise, x, alpha, beta)

    denoise_weight = (beta**2 + sigma_data**2) / (beta * sigma_data) ** 2
    denoise_loss = denoise_weight * _mean_square(prediction.blurry - blurry)
    weight = _weight(residual_weight, alpha, x)
    deblur_loss = weight / sigma_data**2 * _mean_square(prediction.residual - (x0 - blurry))
    consistency = _mean_square(prediction.blurry - _dct._blur(prediction.clean, alpha))
    return LossTerms(denoise_loss + deblur_loss, denoise_loss, deblur_loss, consistency)
