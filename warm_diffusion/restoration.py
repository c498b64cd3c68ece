"""Restoration: from blurred and noisy data back to clean ones, and the levels read off the data.

Such an image y = B(alpha) x0 + beta eps is a state of the forward process, so the flow along the
ratio alpha / beta from there leads to a clean image, and D + R at y is the posterior mean: the best
in squared error, and smooth. No estimate is best in both error and looks (Blau & Michaeli 2018,
arXiv 1711.06077).

A step of the flow or of the reverse SDE, in units tau of the image's own levels, from tau to tau':

    (1)  a step of samplers.py down to tau_0 = tau' (1 - s^2 (1 - tau'^2 / tau^2))^1/2, then the
         exact forward transition up to tau';  s = 0: the flow, s = 1: the reverse SDE

So no step rises above the level it began at, and what y says is not lost.

The levels can be read off y itself (ours for blur and noise together): with S the data's spectrum
and P_k the power of y's DCT coefficients around the blurred mean image, averaged over channels,
they minimise the Whittle likelihood (Whittle 1953)

    (2)  sum_k  ln v_k + P_k / v_k,      v = c m(alpha)^2 S + beta^2

with c = 1, or c as the contrast of this one image with ln c ~ N(0, 1). In a = alpha^2 and beta^2 it
is minimised by Fisher's method of scoring, damped and within bounds, from the best of a grid.

    (3)  standard errors   F^-1 J F^-1 of (a, beta^2), F the Fisher matrix of (2) and J the sum over
         k of the squared scores: right also where channels go together (White 1982)

A photograph has a spectrum of its own. Its power in a third of an octave differs from c S by a
factor whose logarithm has a standard deviation of about tau = 0.5, as measured on photographs, and
that passes for blur and noise. Two numbers say by how much (both ours): in (3) J gains the square
of what such a change of band b does to the score, and z judges the fit,

    (4)  J   + tau^2 sum_b (sum_k w_k d ln v_k) (sum_k w_k d ln v_k)',   w = c m^2 S / v
    (5)  z_b = ln(sum_k P_k / sum_k v_k) / (2 / n_b + 0.05^2 + tau^2 w_b^2)^1/2

with n_b coefficients in band b and w_b the share of the signal there: where the noise is all there
is, it must be white within 5 %.

Absent on purpose: other blurs than a Gaussian one with reflecting borders (motion, defocus). Below
one pixel a sampled kernel is another blur (`dct.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion import oracle as _oracle
from warm_diffusion import samplers as _samplers
from warm_diffusion import spectra as _spectra
from warm_diffusion.denoiser import Denoiser
from warm_diffusion.process import _image_keys, _root
from warm_diffusion.schedules import _eager, hot, time_grid

_LAST = 0.02  # the last call's level in units of the image's own: its rest is below what shows
_FLOOR = 1e-10  # added to v: ln v stays finite where neither signal nor noise is left
_LARGEST_NOISE = 10.0
_CONTRASTS, _LARGEST_CONTRAST = (-1.5, 0.0, 1.5), 6.0  # starts and bound of ln c
_SCORING_STEPS = 40
TEXTURE = 0.5  # tau of eqs. (4) and (5)
_LOWEST = 0.04  # cycles per pixel: below, a photograph's power is a matter of what it shows


def wiener(
    images: ArrayLike,
    spectrum: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike | None = None,
) -> jax.Array:
    """The best linear restoration, in closed form: what `oracle.gaussian` makes of each image.

    Args:
      images: [B, *spatial, C].
      spectrum: variance of each DCT coefficient of clean images, [*sizes], carried over by
        frequency (`spectra.spectrum_at`); [*spatial, C] as it is.
      alpha: blur in pixels, scalar or [B].
      beta: noise > 0, scalar or [B].
      mean: mean clean image [*spatial, C]; None: each image's own colour.

    Example:
      A coefficient of variance 1 under noise of variance 1 is halved; the brightness is kept.

      >>> x = np.array([1.0, 0.0]).reshape(1, 1, 2, 1)
      >>> clean = restoration.wiener(x, np.array([[1.0, 1.0]]), alpha=0.0, beta=1.0)
      >>> print(np.asarray(clean).ravel().round(3))
      [0.75 0.25]
    """
    images, spectrum = _dct._array(images, "images"), jnp.asarray(spectrum)
    if spectrum.ndim == images.ndim - 2:
        spectrum = _spectra.spectrum_at(spectrum, *images.shape[1:-1])
    if mean is not None:
        return _oracle.gaussian(mean, spectrum)(images, alpha, beta).clean
    # The blur keeps the colour.
    colour = jnp.mean(images, axis=tuple(range(1, images.ndim - 1)), keepdims=True)
    centred = _oracle.gaussian(jnp.zeros(images.shape[1:], images.dtype), spectrum)
    return colour + centred(images - colour, alpha, beta).clean


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
    posterior, one per key, are images that look like the data.

    Args:
      denoise: (x, alpha, beta) -> Prediction, for levels [B].
      images: [B, *spatial, C], blurred and noisy.
      alpha: blur in pixels, >= 0; scalar or [B].
      beta: noise standard deviation, > 0 (8 bits alone make 0.0023); scalar or [B].
      num_steps: calls of the denoiser; by heun 2 n - 1.
      solver: euler, heun or multistep.
      key: PRNG key for stochastic; an array of B keys gives every image a stream of its own.
      stochastic: from 0, the flow, to 1, the reverse SDE, whose ends are samples of the posterior.

    Returns:
      [B, *spatial, C].

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
    x = _dct._array(images, "images")
    alpha, beta = (_dct._per_image(level, _dct._wide(x)) for level in (alpha, beta))
    _check_levels(alpha, beta)
    tau, down = _path(num_steps, stochastic)
    noise = raised = None
    if stochastic > 0:
        if key is None:
            raise ValueError("stochastic draws noise at each step: pass key=, one or one per image")
        noise, raised = (_image_keys(key, x.shape[0]), 1.0), _times_tau(tau[:-1], alpha, beta)
    levels = _times_tau(np.append(1.0, down), alpha, beta)
    return _samplers._integrate(denoise, x, levels, raised, solver, noise)


def _times_tau(tau: np.ndarray, *levels: jax.Array) -> tuple[jax.Array, ...]:
    """Levels [len(tau), B] in units tau of the image's own [B]."""
    return tuple(jnp.asarray(tau, level.dtype)[:, None] * level[None] for level in levels)


def _path(num_steps: int, stochastic: float) -> tuple[np.ndarray, np.ndarray]:
    """tau at the ends of all steps [n + 1] and, after the first, tau_0 [n], eq. (1)."""
    if not 0 <= stochastic <= 1:
        raise ValueError(
            f"stochastic must lie between 0 (the flow) and 1 (the reverse SDE), got {stochastic}"
        )
    with _eager():  # known numbers under jit, too
        tau = np.asarray(time_grid(hot(beta_min=_LAST, beta_max=1.0), num_steps), np.float64)
    start, end = tau[:-1], tau[1:]
    return tau, end * np.sqrt(1 - stochastic**2 * (1 - (end / start) ** 2))


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


class _Statistics(NamedTuple):
    """Statistics of one image for eq. (2), each [K] over frequencies."""

    power: jax.Array  # mean over channels of y^2
    cross: jax.Array  # of y mu
    centre: jax.Array  # of mu^2
    eigen: jax.Array
    spectrum: jax.Array
    used: jax.Array  # 1; 0 for the brightness, where that is not known


def _statistics(images: ArrayLike, spectrum: ArrayLike, mean: ArrayLike | None) -> _Statistics:
    images = _dct._wide(_dct._array(images, "images"))
    count, sizes = images.shape[0], images.shape[1:-1]
    if mean is not None and jnp.shape(mean) != images.shape[1:]:
        raise ValueError(
            f"the mean image must be {images.shape[1:]} as the images are, got {jnp.shape(mean)}: "
            "for images of another size than the data's leave it out"
        )
    y = _dct._dct(images)
    mu = jnp.zeros_like(y) if mean is None else _dct._dct(jnp.asarray(mean).astype(y.dtype)[None])
    used = np.ones(sizes)
    used.flat[0] = mean is not None
    each = [jnp.mean(jnp.broadcast_to(part, y.shape), axis=-1) for part in (y**2, y * mu, mu**2)]
    shared = (_dct._eigenvalues(*sizes), _spectra.spectrum_at(spectrum, *sizes), used)
    shared = [jnp.asarray(part).astype(y.dtype)[None] for part in shared]
    flat = [jnp.broadcast_to(part, (count, *sizes)).reshape(count, -1) for part in each + shared]
    return _Statistics(*flat)


def _model(theta: jax.Array, of: _Statistics) -> tuple[jax.Array, ...]:
    """m, the power P, v and the share w of the signal in v, each [K]; theta = (a, beta^2, ln c)."""
    a, noise, log_contrast = theta
    m = jnp.exp(-of.eigen * a / 2)
    signal = jnp.exp(log_contrast) * m**2 * of.spectrum
    v = signal + noise + _FLOOR
    return m, of.power - 2 * m * of.cross + m**2 * of.centre, v, signal / v


def _scores(theta: jax.Array, of: _Statistics) -> tuple[jax.Array, ...]:
    """Eq. (2)'s terms [K], gradients [3, K], Fisher matrix [3, 3], and what (4) sums [3, K]."""
    m, power, v, share = _model(theta, of)
    slopes = jnp.stack([-of.eigen * share, 1 / v, share])
    gradients = (1 - power / v)[None] * slopes
    gradients = gradients.at[0].add(of.eigen * (m * of.cross - m**2 * of.centre) / v)
    fisher = jnp.einsum("ik,jk->ij", of.used[None] * slopes, slopes, precision="highest")
    moved = of.used * of.eigen**2 * m**2 * of.centre / (2 * v)  # blur also moves the mean image
    fisher = fisher.at[0, 0].add(jnp.sum(moved))
    terms = of.used * (jnp.log(v) + power / v)
    return terms, of.used[None] * gradients, fisher, (of.used * share)[None] * slopes


def _target(theta: jax.Array, of: _Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean of eq. (2) with the prior of ln c, its gradient [3] and its Fisher matrix [3, 3]."""
    terms, gradients, fisher, _ = _scores(theta, of)
    share = 1 / jnp.sum(of.used)  # the prior's: (2) has twice the minus log-likelihood
    value = share * (jnp.sum(terms) + theta[2] ** 2)
    prior = jnp.array([0.0, 0.0, 2.0], theta.dtype)
    gradient = share * (jnp.sum(gradients, axis=1) + prior * theta)
    return value, gradient, share * (fisher + jnp.diag(prior))


def _free(gradient, theta, low, high):
    """The parameters that no bound holds."""
    return ~(((theta <= low) & (gradient >= 0)) | ((theta >= high) & (gradient <= 0)))


def _on_free(matrix: jax.Array, free: jax.Array) -> jax.Array:
    """The matrix with the parameters that are held decoupled from the others."""
    both = free[:, None] & free[None, :]
    return jnp.where(both, matrix, jnp.eye(3, dtype=matrix.dtype))


def _minimise(of: _Statistics, starts: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """theta [3] of least (2) for one image, by Levenberg-Marquardt on the Fisher matrix."""
    values = jax.lax.map(lambda theta: _target(theta, of)[0], starts)
    theta = starts[jnp.argmin(values)]

    def step(_, carry):
        theta, value, gradient, fisher, damping = carry
        free = _free(gradient, theta, low, high)
        damped = fisher + damping * jnp.diag(jnp.diag(fisher) + 1e-30)
        # The three have units of their own: solved in units of the Fisher matrix's diagonal.
        unit = jax.lax.rsqrt(jnp.diag(damped))
        scaled = _on_free(damped * unit[:, None] * unit[None, :], free)
        change = unit * jnp.linalg.solve(scaled, jnp.where(free, unit * gradient, 0.0))
        trial = jnp.clip(theta - change, low, high)
        at_trial = _target(trial, of)
        better = at_trial[0] < value
        kept = jax.tree.map(
            lambda new, old: jnp.where(better, new, old),
            (trial, *at_trial),
            (theta, value, gradient, fisher),
        )
        return *kept, jnp.where(better, damping / 4, jnp.maximum(8 * damping, 1e-3))

    carry = (theta, *_target(theta, of), 1e-3 + 0 * theta[0])
    theta, *_ = jax.lax.fori_loop(0, _SCORING_STEPS, step, carry)
    return theta


def _implicit(theta: jax.Array, of: _Statistics, low: jax.Array, high: jax.Array) -> jax.Array:
    """The same theta, as a function of the image: the implicit function theorem, Newton's step."""
    theta = jax.lax.stop_gradient(theta)
    gradient = _target(theta, of)[1]
    hessian = jax.lax.stop_gradient(jax.jacfwd(lambda theta: _target(theta, of)[1])(theta))
    free = _free(jax.lax.stop_gradient(gradient), theta, low, high)
    unit = jax.lax.rsqrt(jnp.abs(jnp.diag(hessian)) + 1e-30)
    scaled = _on_free(hessian * unit[:, None] * unit[None, :], free)
    gradient = gradient - jax.lax.stop_gradient(gradient)  # moves nothing, only differentiates
    return theta - unit * jnp.linalg.solve(scaled, jnp.where(free, unit * gradient, 0.0))


def estimate_levels(
    images: ArrayLike,
    spectrum: ArrayLike,
    mean: ArrayLike | None = None,
    *,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    beta_max: ArrayLike | None = None,
    contrast: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Blur and noise of each image by the largest Whittle likelihood, eq. (2).

    Args:
      images: [B, *spatial, C]; of a large photograph, tiles as channels [1, h, w, n C] give one
        estimate.
      spectrum: variance of each DCT coefficient of clean images, of any size: it is carried over by
        frequency (`spectra.spectrum_at`).
      mean: mean clean image [*spatial, C]; None: not known, then the brightness says nothing.
      alpha: blur where it is known, scalar or [B]; only the noise is estimated.
      beta: noise where it is known.
      beta_max: the most that it can be: in photographs `quiet_noise`, so that texture does not pass
        for noise; scalar or [B].
      contrast: fit the contrast of each image as well, for images of other kinds than the data.

    Returns:
      (alpha [B] in pixels, beta [B]), both >= 0; differentiable by the images.

    Raises:
      ValueError: wrong shapes.

    Example:
      Noise alone shows as such.

      >>> noise = 0.1 * samplers.initial_noise([0], (32, 32, 3))
      >>> spectrum = 0.5 / (0.01 + dct.eigenvalues(32, 32))
      >>> alpha, beta = restoration.estimate_levels(noise, spectrum, alpha=0.0, contrast=True)
      >>> alpha.shape, abs(float(beta[0]) - 0.1) < 0.01
      ((1,), True)
    """
    of = _statistics(images, spectrum, mean)
    images, dtype = _dct._wide(jnp.asarray(images)), of.power.dtype
    longest = max(images.shape[1:-1])
    ends = _LARGEST_CONTRAST if contrast else 0.0
    low = jnp.array([0.0, 0.0, -ends], dtype)
    high = jnp.array([longest**2 / 4, _LARGEST_NOISE**2, ends], dtype)
    varies = 0 * jnp.sum(of.power, axis=1, keepdims=True)  # from device to device, in shard_map
    bounds = [bound[None] + varies for bound in (low, high)]
    if beta_max is not None:
        most = jnp.minimum(_dct._per_image(beta_max, images), _LARGEST_NOISE)
        bounds[1] = bounds[1].at[:, 1].set(most**2)
    for i, level in enumerate((alpha, beta)):
        if level is not None:
            square = _dct._per_image(level, images) ** 2
            bounds = [bound.at[:, i].set(square) for bound in bounds]
    blurs = np.append(0.0, np.geomspace(0.3, longest / 4, 9)) ** 2
    noises = np.geomspace(1e-3, 3.0, 14) ** 2
    contrasts = _CONTRASTS if contrast else (0.0,)
    grid = np.stack(np.meshgrid(blurs, noises, contrasts), axis=-1).reshape(-1, 3)

    def one(of, low, high):
        starts = jnp.clip(jnp.asarray(grid, dtype), low[None], high[None])
        fixed = jax.lax.stop_gradient((of, starts, low, high))
        return _implicit(_minimise(*fixed), of, low, high)

    theta = jax.vmap(one)(of, *bounds)
    return _root(theta[:, 0]), _root(theta[:, 1])


def _theta(of: _Statistics, alpha: jax.Array, beta: jax.Array, contrast: bool) -> jax.Array:
    """(a, beta^2, ln c) at known levels; c = 1, or with `contrast` that of least (2)."""
    theta = jnp.stack([alpha**2, beta**2, jnp.zeros_like(alpha)])
    if not contrast:
        return theta
    starts = jnp.stack([theta.at[2].set(start) for start in _CONTRASTS])
    low, high = (theta.at[2].set(end) for end in (-_LARGEST_CONTRAST, _LARGEST_CONTRAST))
    return _minimise(of, starts, low, high)


def level_errors(
    images: ArrayLike,
    spectrum: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike | None = None,
    *,
    contrast: bool = False,
    texture: float = 0.0,
    known: tuple[bool, bool] = (False, False),
) -> tuple[jax.Array, jax.Array]:
    """Standard errors of `estimate_levels`'s (alpha [B], beta [B]), eqs. (3) and (4).

    They belong to the squares, as a level may be 0: returned is the step in the level that moves
    its square by one standard error, (alpha^2 + error^2)^1/2 - alpha. They say how far the
    scatter of the coefficients moves the levels and, with `texture`, how far an image's own
    spectrum does, which is most of it in a photograph.

    Args:
      images: as given to `estimate_levels`, and likewise spectrum, mean and contrast.
      spectrum: [h, w].
      alpha: what it returned.
      beta: what it returned.
      mean: [*spatial, C] or None.
      contrast: whether the contrast was fitted.
      texture: tau of eq. (4): `TEXTURE` for photographs, 0 where `spectrum` is the image's own.
      known: whether alpha and beta were given, which leaves the other one less uncertain. The error
        of a given level is inf.

    Example:
      Of K coefficients of noise, its variance is known within (2 / K)^1/2, the noise half of that.

      >>> noise = 0.1 * samplers.initial_noise([0], (32, 32, 1))
      >>> _, error = restoration.level_errors(noise, jnp.zeros((32, 32)), 0.0, 0.1)
      >>> round(float(error[0]), 3), round(0.1 * (1 / 2 / 1023) ** 0.5, 3)
      (0.002, 0.002)
    """
    of = _statistics(images, spectrum, mean)
    images = _dct._wide(jnp.asarray(images))
    levels = [_dct._per_image(level, images) for level in (alpha, beta)]
    band, frequency = _thirds(*images.shape[1:-1])
    largest = max(images.shape[1:-1]) ** 2 / 4

    def one(of, alpha, beta):
        theta = _theta(of, alpha, beta, contrast)
        free = jnp.array([not known[0], not known[1], contrast])
        # The largest blur that is looked for stands for one that the image says nothing about.
        free = free.at[0].set(free[0] & (alpha**2 < 0.99 * largest))
        _, gradients, fisher, moved = _scores(theta, of)
        moved = jax.ops.segment_sum(moved.T, band, len(frequency))  # [bands, 3]
        # In units of the diagonal, which a spectrum without detail leaves at 0 for the blur.
        unit = jnp.where(jnp.diag(fisher) > 0, jax.lax.rsqrt(jnp.diag(fisher)), 0.0)
        shown, scaled = free & (unit > 0), fisher * unit[:, None] * unit[None, :]
        # Blur that noise and contrast imitate, all but a part in 10,000, does not show.
        inflation = jnp.linalg.inv(_on_free(scaled, shown))[0, 0]
        shown = shown.at[0].set(shown[0] & (inflation > 0) & (inflation < 1e4))
        inverse = jnp.linalg.inv(_on_free(scaled, shown))
        scatter = jnp.where(shown[:, None], unit[:, None] * gradients, 0.0)
        moved = jnp.where(shown[None], texture * unit[None] * moved, 0.0)
        scatter = jnp.einsum("ik,jk->ij", scatter, scatter, precision="highest")
        scatter += jnp.einsum("bi,bj->ij", moved, moved, precision="highest")
        error = unit * jnp.sqrt(jnp.diag(inverse @ scatter @ inverse))
        return jnp.where(shown, error, jnp.inf)

    error = jax.vmap(one)(of, *levels)
    return tuple(jnp.sqrt(x**2 + error[:, i]) - x for i, x in enumerate(levels))


# --- does the model of blur and noise fit? -------------------------------------------------------


def _thirds(*sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """The third of an octave of each coefficient [K], from 0 for the highest, and the frequencies
    in the middle of each, in cycles per pixel."""
    radius = np.sqrt(_dct._squares(*sizes)).ravel()
    radius[0] = np.min(radius[1:], initial=1.0)  # the brightness, which has no frequency
    below = np.log2(np.sqrt(len(sizes)) / radius)  # octaves
    _, band = np.unique(np.floor(3 * below), return_inverse=True)
    counts = np.bincount(band)
    return band, np.exp2(np.bincount(band, np.log2(radius / 2)) / counts)


def goodness_of_fit(
    images: ArrayLike,
    spectrum: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike | None = None,
    *,
    contrast: bool = False,
) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """How far each image is from blur alpha and white noise beta, by third of an octave, eq. (5).

    Args:
      images: as given to `estimate_levels`, and likewise spectrum, mean and contrast.
      spectrum: [h, w].
      alpha: blur in pixels, scalar or [B].
      beta: noise, scalar or [B].
      mean: [*spatial, C] or None.
      contrast: whether the contrast was fitted.

    Returns:
      (frequency [K] in cycles per pixel, ln(power / expected power) [B, K], z [B, K]: the same in
      units of what noise and texture explain; above 3 the model does not fit).

    Example:
      Noise that was smoothed along one axis is not white.

      >>> noise = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
      >>> smooth = (noise + jnp.roll(noise, 1, axis=1)) / 2**0.5
      >>> fits = [restoration.goodness_of_fit(x, jnp.zeros((64, 64)), 0.0, 1.0)
      ...         for x in (noise, smooth)]
      >>> [bool(jnp.max(abs(z)) < 3) for _, _, z in fits]
      [True, False]
    """
    of = _statistics(images, spectrum, mean)
    images = _dct._wide(jnp.asarray(images))
    band, frequency = _thirds(*images.shape[1:-1])
    levels = [_dct._per_image(level, images) for level in (alpha, beta)]

    def one(of, alpha, beta):
        theta = _theta(of, alpha, beta, contrast)
        _, power, v, share = _model(theta, of)
        parts = of.used[:, None] * jnp.stack([power, v, share * v, jnp.ones_like(v)], 1)
        power, v, signal, count = jax.ops.segment_sum(parts, band, len(frequency)).T
        departure = jnp.log(power + _FLOOR) - jnp.log(v + _FLOOR)
        scatter = 2 / jnp.maximum(count * images.shape[-1], 1) + 0.05**2
        return departure, departure / jnp.sqrt(scatter + (TEXTURE * signal / (v + _FLOOR)) ** 2)

    departure, z = jax.vmap(one)(of, *levels)
    judged = frequency >= _LOWEST
    return frequency[judged], departure[:, judged], z[:, judged]


def quiet_noise(images: ArrayLike) -> jax.Array:
    """The most white noise [B] that the quietest parts of each image allow.

    Noise is the same everywhere, texture is not: the root of the mean square of second differences
    along every axis, in tiles of 16 pixels, at the fraction of 0.05 of them, over what noise of 1
    has there. Tiles that hold the smallest or the largest value, where noise is clipped, count only
    where fewer than 8 others are left.

    Args:
      images: [B, *spatial, C].

    Example:
      Texture on one half of an image does not pass for noise.

      >>> noise = 0.1 * samplers.initial_noise([0], (96, 96, 3))
      >>> textured = noise.at[:, :48].multiply(5.0)
      >>> abs(float(restoration.quiet_noise(textured)[0]) - 0.1) < 0.01
      True
    """
    x = _dct._wide(_dct._array(images, "images"))
    d, inner, axes = x, x, range(1, x.ndim - 1)
    count = x.shape[-1]
    for axis in (axis for axis in axes if x.shape[axis] > 2):
        first, middle, last = (
            jax.lax.slice_in_dim(d, i, d.shape[axis] - 2 + i, axis=axis) for i in range(3)
        )
        d = (first - 2 * middle + last) / 6**0.5  # (1, -2, 1): noise of 1 stays 1
        inner = jax.lax.slice_in_dim(inner, 1, inner.shape[axis] - 1, axis=axis)
        count *= min(16, d.shape[axis]) / (35 / 18)  # its autocorrelation, squared, sums to 35 / 18

    def tiles(of, reduce):
        for axis in axes:
            size = min(16, of.shape[axis])
            of = jax.lax.slice_in_dim(of, 0, of.shape[axis] // size * size, axis=axis)
            of = reduce(of.reshape(*of.shape[:axis], -1, size, *of.shape[axis + 1 :]), axis + 1)
        return reduce(of, -1).reshape(len(x), -1)

    squares = tiles(d**2, jnp.mean)
    low, high = (f(x, axis=range(1, x.ndim), keepdims=True) for f in (jnp.min, jnp.max))
    clipped = tiles((inner == low) | (inner == high), jnp.any)
    clipped &= jnp.sum(~clipped, axis=1, keepdims=True) >= 8
    squares = jnp.sort(jnp.where(clipped, jnp.inf, squares), axis=1)
    rank = jnp.sum(~clipped, axis=1, keepdims=True) // 20
    # The quantile 0.05 of the mean of squares of `count` normal numbers (Wilson & Hilferty 1931).
    spread = 2 / (9 * count)
    # With few numbers the quantile is nearly 0, and they bound nothing.
    expected = max(0.01, 1 - spread - 1.645 * spread**0.5) ** 3
    return jnp.sqrt(jnp.take_along_axis(squares, rank, axis=1)[:, 0] / expected)


def block_edges(images: ArrayLike) -> jax.Array:
    """How far edges every 8 pixels, as JPEG leaves them, stand out of each image's others [B].

    In standard errors of the mean step between neighbours, less the steps beside it, over the
    columns or rows of one remainder by 8; the largest over both axes and all remainders. Above 5
    an image was a JPEG.

    Args:
      images: [B, H, W, C].

    Example:
      >>> noise = jax.random.normal(jax.random.key(0), (1, 64, 64, 1))
      >>> blocks = noise[:, :8, :8].repeat(8, 1).repeat(8, 2)
      >>> [bool(restoration.block_edges(x)[0] > 5) for x in (noise, noise + blocks)]
      [False, True]
    """
    images, found = _dct._wide(_dct._array(images, "images")), []
    for x in (images, jnp.swapaxes(images, 1, 2)):
        step = jnp.mean(abs(x[:, :, 1:] - x[:, :, :-1]), axis=(1, 3))  # [B, W - 1]
        stands_out = step[:, 1:-1] - (step[:, 2:] + step[:, :-2]) / 2
        stands_out = stands_out[:, : stands_out.shape[1] // 8 * 8].reshape(len(x), -1, 8)
        if not stands_out.size:  # fewer than eight
            found.append(jnp.zeros(len(x), x.dtype))
            continue
        spread = jnp.std(stands_out, axis=(1, 2)) + _FLOOR
        means = jnp.max(jnp.mean(stands_out, axis=1), axis=1)
        found.append(means / spread * stands_out.shape[1] ** 0.5)
    return jnp.maximum(*found)
