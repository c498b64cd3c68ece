"""The blur and the noise of an image, read off its spectrum.

A blurred and noisy image y = B(alpha) x0 + beta eps is a state of the forward process. With S the
data's spectrum and P_k the power of y's DCT coefficients around the blurred mean image, averaged
over channels, its levels minimise the Whittle likelihood (Whittle 1953; ours for blur and noise
together)

    (1)  sum_k  ln v_k + P_k / v_k,      v = c m(alpha)^2 S + beta^2

with c = 1, or c as the contrast of this one image with ln c ~ N(0, 1). In a = alpha^2 and beta^2 it
is minimised by Fisher's method of scoring, damped and within bounds, from the best of a grid.

    (2)  standard errors   F^-1 J F^-1 of (a, beta^2), F the Fisher matrix of (1) and J the sum over
         k of the squared scores: right also where channels go together (White 1982)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion import sizes as _sizes

_FLOOR = 1e-10  # added to v: ln v stays finite where neither signal nor noise is left
_LARGEST_NOISE = 10.0
_SCORING_STEPS = 40


def per_image(level: ArrayLike, images: ArrayLike) -> jax.Array:
    """A level, a scalar or [B], as floats [B].

    Example:
      >>> print(levels.per_image(2, np.zeros((3, 4, 4, 1))))
      [2. 2. 2.]
    """
    images = _dct.as_images(images)
    level = _dct.expand_like(jnp.asarray(level, dtype=float), images)[:, 0, 0, 0]
    return jnp.broadcast_to(level, images.shape[:1])


class _Statistics(NamedTuple):
    """What eq. (1) needs of one image, each [K] over frequencies."""

    power: jax.Array  # mean over channels of y^2
    cross: jax.Array  # of y mu
    centre: jax.Array  # of mu^2
    eigen: jax.Array
    spectrum: jax.Array
    used: jax.Array  # 1; 0 for the brightness, where that is not known


def _statistics(images: ArrayLike, spectrum: ArrayLike, mean: ArrayLike | None) -> _Statistics:
    images, spectrum = _dct.as_images(images), jnp.asarray(spectrum)
    _dct.check_scale(images)
    size = images.shape[1:3]
    if mean is not None and jnp.shape(mean) != images.shape[1:]:
        raise ValueError(
            f"the mean image must be {images.shape[1:]} as the images are, got {jnp.shape(mean)}: "
            "for images of another size than the data's leave it out"
        )
    count = len(images)
    y = _dct.dct(images)
    mu = jnp.zeros_like(y[:1]) if mean is None else _dct.dct(mean)[None]
    used = np.ones(size)
    used[0, 0] = mean is not None
    per_image = [
        jnp.mean(part, axis=-1) for part in (y**2, y * mu, jnp.broadcast_to(mu**2, y.shape))
    ]
    shared = (_dct.eigenvalues(*size), _sizes.spectrum_at(spectrum, *size), used)
    shared = [jnp.broadcast_to(jnp.asarray(part, y.dtype)[None], (count, *size)) for part in shared]
    return _Statistics(*(part.reshape(count, -1) for part in (*per_image, *shared)))


def _scores(theta: jax.Array, of: _Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eq. (1)'s terms [K], gradients [3, K] and Fisher matrix [3, 3]; theta = (a, beta^2, ln c)."""
    a, noise, log_contrast = theta
    m = jnp.exp(-of.eigen * a / 2)
    signal = jnp.exp(log_contrast) * m**2 * of.spectrum
    v = signal + noise + _FLOOR
    power = of.power - 2 * m * of.cross + m**2 * of.centre
    slopes = jnp.stack([-of.eigen * signal, jnp.ones_like(v), signal]) / v[None]
    gradients = (1 - power / v)[None] * slopes
    gradients = gradients.at[0].add(of.eigen * (m * of.cross - m**2 * of.centre) / v)
    fisher = jnp.einsum("ik,jk->ij", of.used[None] * slopes, slopes, precision="highest")
    moved = of.used * of.eigen**2 * m**2 * of.centre / (2 * v)  # blur also moves the mean image
    fisher = fisher.at[0, 0].add(jnp.sum(moved))
    return of.used * (jnp.log(v) + power / v), of.used[None] * gradients, fisher


def _target(theta: jax.Array, of: _Statistics) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean of eq. (1) with the prior of ln c, its gradient [3] and its Fisher matrix [3, 3]."""
    terms, gradients, fisher = _scores(theta, of)
    share = 1 / jnp.sum(of.used)  # the prior's: (1) has twice the minus log-likelihood
    value = share * (jnp.sum(terms) + theta[2] ** 2)
    gradient = share * (jnp.sum(gradients, axis=1) + jnp.array([0.0, 0.0, 2.0]) * theta)
    return value, gradient, share * (fisher + jnp.diag(jnp.array([0.0, 0.0, 2.0], theta.dtype)))


def _free(gradient, theta, low, high):
    """The parameters that no bound holds."""
    return ~(((theta <= low) & (gradient >= 0)) | ((theta >= high) & (gradient <= 0)))


def _on_free(matrix: jax.Array, free: jax.Array) -> jax.Array:
    """The matrix with the parameters that are held decoupled from the others."""
    both = free[:, None] & free[None, :]
    return jnp.where(both, matrix, jnp.eye(3, dtype=matrix.dtype))


def _minimise(of: _Statistics, starts: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """theta [3] of least (1) for one image, by Levenberg-Marquardt on the Fisher matrix."""
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
        told = _target(trial, of)
        better = told[0] < value
        kept = jax.tree.map(
            lambda new, old: jnp.where(better, new, old),
            (trial, *told),
            (theta, value, gradient, fisher),
        )
        return *kept, jnp.where(better, damping / 4, jnp.maximum(8 * damping, 1e-3))

    carry = (theta, *_target(theta, of), jnp.asarray(1e-3, theta.dtype))
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


def _root(square: jax.Array) -> jax.Array:
    """Square root with derivative 0 at 0, where a level is held by its bound."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def estimate_levels(
    images: ArrayLike,
    spectrum: ArrayLike,
    mean: ArrayLike | None = None,
    *,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    contrast: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Blur and noise of each image by the largest Whittle likelihood, eq. (1).

    Args:
      images: [B, H, W, C] in [-1, 1] before noise; of a large photograph, tiles as channels
        [1, h, w, n C] give one estimate.
      spectrum: variance of each DCT coefficient of clean images, of any size [h, w]: it is carried
        over by frequency (`sizes.spectrum_at`).
      mean: mean clean image [H, W, C]; None: not known, then the brightness says nothing.
      alpha: blur where it is known, scalar or [B]; only the noise is estimated.
      beta: noise where it is known.
      contrast: fit the contrast of each image as well, for images of other kinds than the data.

    Returns:
      (alpha [B] in pixels, beta [B]), both >= 0; differentiable by the images.

    Raises:
      ValueError: wrong shapes or scale.

    Example:
      Noise alone shows as such.

      >>> noise = 0.1 * samplers.initial_noise([0], (32, 32, 3))
      >>> spectrum = 0.5 / (0.01 + dct.eigenvalues(32, 32))
      >>> alpha, beta = levels.estimate_levels(noise, spectrum, alpha=0.0, contrast=True)
      >>> alpha.shape, abs(float(beta[0]) - 0.1) < 0.01
      ((1,), True)
    """
    of = _statistics(images, spectrum, mean)
    shape, dtype = jnp.shape(images), of.power.dtype
    low = jnp.array([0.0, 0.0, -6.0 if contrast else 0.0], dtype)
    high = jnp.array([max(shape[1:3]) ** 2 / 4, _LARGEST_NOISE**2, 6.0 if contrast else 0.0], dtype)
    bounds = [jnp.tile(bound[None], (shape[0], 1)) for bound in (low, high)]
    for i, level in enumerate((alpha, beta)):
        if level is not None:
            square = per_image(level, images).astype(dtype) ** 2
            bounds = [bound.at[:, i].set(square) for bound in bounds]
    blurs = np.append(0.0, np.geomspace(0.3, max(shape[1:3]) / 4, 9)) ** 2
    noises = np.geomspace(1e-3, 3.0, 14) ** 2
    contrasts = (-1.5, 0.0, 1.5) if contrast else (0.0,)
    grid = np.stack(np.meshgrid(blurs, noises, contrasts), axis=-1).reshape(-1, 3)

    def one(of, low, high):
        starts = jnp.clip(jnp.asarray(grid, dtype), low[None], high[None])
        fixed = jax.lax.stop_gradient((of, starts, low, high))
        return _implicit(_minimise(*fixed), of, low, high)

    theta = jax.vmap(one)(of, *bounds)
    return _root(theta[:, 0]), _root(theta[:, 1])


def level_errors(
    images: ArrayLike,
    spectrum: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    mean: ArrayLike | None = None,
    *,
    contrast: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Standard errors of `estimate_levels`'s (alpha [B], beta [B]), eq. (2).

    They are of the squares, where a level may be 0: what is returned is the step in the level that
    moves its square by one standard error, (alpha^2 + error^2)^1/2 - alpha. They say how far the
    scatter of the coefficients moves the levels, not how far this image's spectrum is from the
    data's.

    Args:
      images: as given to `estimate_levels`, and likewise spectrum, mean and contrast.
      spectrum: [h, w].
      alpha: what it returned.
      beta: what it returned.
      mean: [H, W, C] or None.
      contrast: whether the contrast was fitted.

    Example:
      Of K coefficients of noise, its variance is known within (2 / K)^1/2, the noise half of that.

      >>> noise = 0.1 * samplers.initial_noise([0], (32, 32, 1))
      >>> _, error = levels.level_errors(noise, jnp.zeros((32, 32)), 0.0, 0.1)
      >>> round(float(error[0]), 3), round(0.1 * (1 / 2 / 1023) ** 0.5, 3)
      (0.002, 0.002)
    """
    of = _statistics(images, spectrum, mean)
    levels = [per_image(level, images).astype(of.power.dtype) for level in (alpha, beta)]

    def one(of, alpha, beta):
        theta = jnp.stack([alpha**2, beta**2, jnp.zeros_like(alpha)])
        if contrast:
            theta = theta.at[2].set(_contrast(theta, of))
        free = jnp.array([True, True, contrast])
        _, gradients, fisher = _scores(theta, of)
        # In units of the diagonal, which a spectrum without detail leaves at 0 for the blur.
        unit = jnp.where(jnp.diag(fisher) > 0, jax.lax.rsqrt(jnp.diag(fisher)), 0.0)
        known = free & (unit > 0)
        inverse = jnp.linalg.inv(_on_free(fisher * unit[:, None] * unit[None, :], known))
        scatter = jnp.where(known[:, None], unit[:, None] * gradients, 0.0)
        scatter = jnp.einsum("ik,jk->ij", scatter, scatter, precision="highest")
        error = unit * jnp.sqrt(jnp.diag(inverse @ scatter @ inverse))
        return jnp.where(known, error, jnp.inf)

    error = jax.vmap(one)(of, *levels)
    return tuple(jnp.sqrt(x**2 + error[:, i]) - x for i, x in enumerate(levels))


def _contrast(theta: jax.Array, of: _Statistics) -> jax.Array:
    """ln c of least (1) at known levels."""
    low = jnp.stack([theta[0], theta[1], jnp.full_like(theta[2], -6.0)])
    high = low.at[2].set(6.0)
    starts = low[None] + jnp.array([[0.0, 0.0, 4.5], [0.0, 0.0, 6.0], [0.0, 0.0, 7.5]], theta.dtype)
    return _minimise(of, starts, low, high)[2]
