"""Restoration: from a blurred and noisy photograph back to a clean one.

Such an image y = B(alpha) x0 + beta eps is a state of the forward process (`levels.py` reads alpha
and beta off it), so the flow along the ratio alpha / beta from there leads to a clean image, and
D + R at y is the posterior mean: the best in squared error, and smooth. No estimate is best in both
error and looks (Blau & Michaeli 2018, arXiv 1711.06077).

A step of the flow or of the reverse SDE, in units tau of the image's own levels, from tau to tau':

    (1)  samplers.py's eq. (1) or (2) down to tau_0 = tau' (1 - s^2 (1 - tau'^2 / tau^2))^1/2, then
         the exact forward transition up to tau';  s = 0: the flow, s = 1: the reverse SDE

So no step rises above the level it began at, and what y says is not lost. Absent on purpose: other
blurs than a Gaussian one with reflecting borders (motion, defocus).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion import oracle as _oracle
from warm_diffusion import sizes as _sizes
from warm_diffusion.denoiser import Denoiser, Prediction, check_prediction
from warm_diffusion.levels import estimate_levels as estimate_levels  # names of this module, too
from warm_diffusion.levels import level_errors as level_errors
from warm_diffusion.levels import per_image
from warm_diffusion.process import image_keys, transition
from warm_diffusion.samplers import SOLVERS
from warm_diffusion.schedules import hot, time_grid

_LAST = 0.02  # the last call's level in units of the image's own: its rest is below what shows


def wiener(
    images: ArrayLike,
    spectrum: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike | None = None,
) -> jax.Array:
    """The best linear restoration, in closed form: what `oracle.gaussian` makes of each image.

    Args:
      images: [B, H, W, C].
      spectrum: variance of each DCT coefficient of clean images, [h, w], carried over by frequency;
        [H, W, C] as it is.
      alpha: blur in pixels, scalar or [B].
      beta: noise > 0, scalar or [B].
      mean: mean clean image [H, W, C]; None: each image's own colour.

    Example:
      A coefficient of variance 1 under noise of variance 1 is halved; the brightness is kept.

      >>> x = np.array([1.0, 0.0]).reshape(1, 1, 2, 1)
      >>> clean = restoration.wiener(x, np.array([[1.0, 1.0]]), alpha=0.0, beta=1.0)
      >>> print(np.asarray(clean).ravel().round(3))
      [0.75 0.25]
    """
    images, spectrum = _dct.as_images(images), jnp.asarray(spectrum)
    if spectrum.ndim == 2:
        spectrum = _sizes.spectrum_at(spectrum, *images.shape[1:3])
    if mean is not None:
        return _oracle.gaussian(mean, spectrum)(images, alpha, beta).clean
    colour = jnp.mean(images, axis=(1, 2), keepdims=True)  # the blur keeps it
    centred = _oracle.gaussian(jnp.zeros(images.shape[1:]), spectrum)
    return colour + centred(images - colour, alpha, beta).clean


def _path(num_steps: int, solver: str, stochastic: float) -> np.ndarray:
    """Of each step tau, tau_0, tau' and multistep's weight, eq. (1): [num_steps, 4]."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not 0 <= stochastic <= 1:
        raise ValueError(
            f"stochastic must lie between 0 (the flow) and 1 (the reverse SDE), got {stochastic}"
        )
    with jax.ensure_compile_time_eval():  # known numbers under jit, too
        tau = np.asarray(time_grid(hot(beta_min=_LAST, beta_max=1.0), num_steps), np.float64)
    start, end = tau[:-1], tau[1:]
    down = end * np.sqrt(1 - stochastic**2 * (1 - (end / start) ** 2))
    weight = np.zeros(num_steps)
    if solver == "multistep":
        # None for the first step, nor for the last, to the clean image. Over ln(tau / tau') also
        # with noise, not over the longer way to tau_0: samples then have the posterior's variance
        # (to 4 % in 9 steps on Gaussian data; 3 times that otherwise, half of it by euler).
        ahead = np.log(start[1:-1] / end[1:-1])
        weight[1:-1] = ahead / (2 * np.log(start[:-2] / start[1:-1]))
    return np.stack([start, down, end, weight], axis=1)


def _increment(prediction: Prediction, x: jax.Array, alpha: jax.Array, at, start, end) -> jax.Array:
    """samplers.py's eq. (1) from start to end, all tau; `prediction` made of x at tau = at."""
    m, m_end = (_dct.transfer_like(alpha * level, x) for level in (start, end))
    deblurring = _dct.idct((m_end - m) * _dct.dct(prediction.clean))
    return deblurring + (end - start) / at * (x - prediction.blurry)


def restore(
    denoise: Denoiser,
    images: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    *,
    num_steps: int = 9,
    solver: str = "multistep",
    key: jax.Array | None = None,
    stochastic: float = 0.0,
) -> jax.Array:
    """Clean images, by the flow along the constant ratio from each image's own levels, eq. (1).

    The posterior mean is `denoise(images, alpha, beta).clean`, one call and the nearest in PSNR,
    but smooth where several images would do. The flow, and with `stochastic` samples of the
    posterior, one a key, are images that look like the data.

    Args:
      denoise: (x, alpha, beta) -> Prediction, for levels [B].
      images: [B, H, W, C], blurred and noisy.
      alpha: blur in pixels, >= 0; scalar or [B].
      beta: noise standard deviation, > 0 (8 bits alone make 0.0023); scalar or [B].
      num_steps: calls of the denoiser; by heun 2 n - 1.
      solver: euler, heun or multistep.
      key: PRNG key for stochastic; an array of B keys gives every image a stream of its own.
      stochastic: from 0, the flow, to 1, the reverse SDE, whose ends are samples of the posterior.

    Returns:
      [B, H, W, C].

    Raises:
      ValueError: wrong shapes, an unknown solver, levels out of range, no key where one is needed.

    Example:
      The exact denoiser of a single image leads back to it.

      >>> image = np.full((1, 4, 4, 1), 0.25)
      >>> y = process.perturb(image, samplers.initial_noise([7], (4, 4, 1)), 0.5, 0.1)
      >>> x = restoration.restore(oracle.mixture(image), y, alpha=0.5, beta=0.1)
      >>> bool(jnp.all(abs(x - 0.25) < 1e-4))
      True
    """
    x = _dct.as_images(images)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    alpha, beta = (per_image(level, x).astype(x.dtype) for level in (alpha, beta))
    _check_levels(alpha, beta)
    steps = jnp.asarray(_path(num_steps, solver, stochastic), x.dtype)
    if stochastic > 0:
        if key is None:
            raise ValueError("stochastic draws noise at each step: pass key=, one or one per image")
        key = image_keys(key, len(x))

    def call(x: jax.Array, tau: jax.Array) -> Prediction:
        return check_prediction(denoise(x, tau * alpha, tau * beta))

    def body(carry, inputs):
        x, previous = carry
        index, (start, down, end, weight) = inputs
        prediction = call(x, start)
        moved = x + _increment(prediction, x, alpha, start, start, down)
        if solver == "heun":
            second = _increment(call(moved, down), moved, alpha, down, start, down)
            moved = (moved + x + second) / 2
        if solver == "multistep":
            m, m_down = (_dct.transfer_like(alpha * level, x) for level in (start, down))
            ahead = weight * (prediction.clean - previous)
            moved += _dct.idct((m_down - down / start * m) * _dct.dct(ahead))
        if stochastic > 0:
            keys = jax.vmap(lambda one: jax.random.fold_in(one, index))(key)
            noise = jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(keys)
            levels = ((level * alpha, level * beta) for level in (down, end))
            moved = transition(moved, noise, *levels)
        return (moved, prediction.clean), None

    steps, last = jax.tree.map(lambda a: a[:-1], (jnp.arange(num_steps), steps)), steps[-1, 0]
    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x)), steps)
    return x + _increment(call(x, last), x, alpha, last, last, 0.0)


def _check_levels(alpha: jax.Array, beta: jax.Array) -> None:
    """Refuses levels that no image can have, where they can be looked at."""
    for name, level, sign in (("alpha", alpha, ">="), ("beta", beta, ">")):
        if isinstance(level, jax.core.Tracer):
            continue
        level = np.asarray(level)
        inside = np.isfinite(level) & ((level > 0) | ((level == 0) & (sign == ">=")))
        if not np.all(inside):
            hint = "; 8 bits alone make noise of 1 / 127.5 / 12^1/2 = 0.0023" if sign == ">" else ""
            raise ValueError(f"{name} must be finite and {sign} 0, got {level[~inside][0]:g}{hint}")
