"""Samplers of the blur-noise probability flow: euler, heun, multistep, and EDM's churn.

One step from (alpha, beta) to (alpha', beta') in difference form, exact when D + R is constant over
the step and D = B(alpha) (D + R) all along it (the integral of process.py's eq. (5)):

    (1)  x' = x + [B(alpha') - B(alpha)] (D + R) + (beta' - beta) (x - D) / beta

euler      (1). At BNR 0 it is EDM's and DDIM's step, at constant beta Cold Diffusion's Algorithm 2
           (Bansal et al. 2022, arXiv 2208.09392) except for the last step. n calls of the denoiser.
heun       averages the increments of (1) at both ends (EDM, Algorithm 1); 2 n - 1 calls.
multistep  DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) carried over to the blur-noise path
           (ours). With h = ln(beta / beta'), r = h_prev / h, x0_bar - x0 = (x0 - x0_prev) / (2 r):
    (2)  x' = (1) + [B(alpha') - (beta' / beta) B(alpha)] (x0_bar - x0),   x0 = D + R; n calls.
churn      before each step raises the level by the exact forward transition (EDM, Algorithm 2).

A step to the clean image (0, 0) is (1) for all solvers: D + (I - B)(D + R). Sampling starts from
noise alone, or from a draw of Gaussian data (`gaussian_start`; Wang and Vastola 2024, arXiv
2412.09726, for noise alone): where noise is well above the data's largest standard deviation the
denoiser sees no difference, so times may start there, and the calls above are saved.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct as _dct
from warm_diffusion import oracle as _oracle
from warm_diffusion.denoiser import Denoiser, Prediction, _predict
from warm_diffusion.process import Level, _image_keys, _normal, _root, transition
from warm_diffusion.schedules import Schedule, _check_schedule, _eager, time_grid

SOLVERS = ("euler", "heun", "multistep")


class Churn(NamedTuple):
    """EDM's stochasticity (Algorithm 2), on either one-step solver; s_min, s_max bound beta.

    Example:
      >>> samplers.Churn(40.0, s_max=50.0)
      Churn(s_churn=40.0, s_min=0.0, s_max=50.0, s_noise=1.0)
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0


def _seeds(seeds: ArrayLike | Sequence[int]) -> jax.Array:
    """Seeds [B] as uint32: integers from 0 to 2^32 - 1, or a ValueError."""
    # By numpy, where they are known: jax.numpy would overflow, or wrap, before they are looked at.
    known = not isinstance(seeds, jax.core.Tracer)
    array = np.asarray(seeds) if known else seeds
    if array.ndim != 1 or (array.dtype != object and not jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"seeds must be integers [B], got {array.dtype} {array.shape}")
    if known and array.size and not (array.min() >= 0 and array.max() < 2**32):
        raise ValueError(
            f"seeds must lie between 0 and 2^32 - 1, got {array.min()} to {array.max()}"
        )
    return jnp.asarray(array.astype(np.uint32))


def initial_noise(seeds: ArrayLike | Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise with one stream per seed, so that batch and device count don't matter.

    Args:
      seeds: integers from 0 to 2^32 - 1, [B].
      shape: shape of one image, (*spatial, C).

    Returns:
      Noise [B, *spatial, C], float32; row i depends on seeds[i] alone.

    Raises:
      ValueError: seeds are something else.

    Example:
      >>> noise = samplers.initial_noise([7, 8], (4, 4, 3))
      >>> noise.shape, bool(jnp.all(noise[1:] == samplers.initial_noise([8], (4, 4, 3))))
      ((2, 4, 4, 3), True)
    """
    draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))
    return draw(_seeds(seeds))


def gaussian_start(
    noise: ArrayLike, schedule: Schedule, t: ArrayLike, mean: ArrayLike, spectrum: ArrayLike
) -> jax.Array:
    """A draw of Gaussian data at time t, m mu + v^1/2 noise per frequency, v = m^2 S + beta^2.

    Args:
      noise: standard normal [B, *spatial, C].
      schedule: the path.
      t: the time, scalar or [B].
      mean: mean image mu [*spatial, C].
      spectrum: variance S of each DCT coefficient, [*spatial] or [*spatial, C], >= 0.

    Raises:
      ValueError: shapes that do not fit, no path.

    Example:
      Variance 9 and 16 are 25.

      >>> one = np.ones((1, 1, 1, 1))
      >>> x = samplers.gaussian_start(one, schedules.hot(), 4.0, 0 * one[0], 9 * one[0])
      >>> float(x[0, 0, 0, 0])
      5.0
    """
    _check_schedule(schedule)
    given = _dct._array(noise, "noise")
    noise = _dct._wide(given)
    centre, variance = _oracle._moments(mean, spectrum, noise)
    m, beta = _dct._transfer_like(schedule.alpha(t), noise), _dct._level(schedule.beta(t), noise)
    state = m * centre + _root(m**2 * variance + beta**2) * _dct._dct(noise)
    return _dct._idct(state).astype(given.dtype)


# --- one step ------------------------------------------------------------------------------------


def _difference(
    x: jax.Array, prediction: Prediction, beta: ArrayLike, start: Level, end: Level, ahead=None
) -> jax.Array:
    """Change of x from `start` to `end` by eq. (1), by (2) with x0_bar - x0 = ahead.

    `prediction` was made at noise level beta.
    """
    m, m_end = (_dct._transfer_like(level[0], x) for level in (start, end))
    beta, beta_start, beta_end = (_dct._level(b, x) for b in (beta, start[1], end[1]))
    # Without noise (pure cold diffusion) there is none to remove: 0, not 0 / 0.
    shrink = jnp.where(beta > 0, (beta_end - beta_start) / jnp.where(beta > 0, beta, 1.0), 0.0)
    coefficients = (m_end - m) * _dct._dct(prediction.clean)
    if ahead is not None:
        coefficients += (m_end - beta_end / beta_start * m) * _dct._dct(ahead)
    return _dct._idct(coefficients) + shrink * (x - prediction.blurry)


def _heun(denoise: Denoiser, x: jax.Array, start: Level, end: Level) -> jax.Array:
    # There is no second call at the clean image: the step to it is Euler's.
    noisy = end[1] > 0
    wanted = jnp.stack([jnp.ones_like(noisy), noisy])
    levels = (
        jnp.stack([first, jnp.where(noisy, second, first)])
        for first, second in zip(start, end, strict=True)
    )

    def call(change, inputs):
        wanted, alpha, beta = inputs

        def anew() -> jax.Array:
            moved = x + change
            new = _difference(moved, _predict(denoise, moved, alpha, beta), beta, start, end)
            return jnp.where(_dct._level(wanted, x) > 0, new, change)

        change = jax.lax.cond(jnp.any(wanted), anew, lambda: change)
        return change, change

    # In a loop, so that one network is compiled, not two.
    _, (first, second) = jax.lax.scan(call, jnp.zeros_like(x), (wanted, *levels))
    return x + (first + second) / 2


def _weights(beta: jax.Array) -> jax.Array:
    """1 / (2 r) of eq. (2) for each step of the levels [n + 1, ...]."""
    # None for the first step, nor for one to beta = 0.
    log_beta = jnp.log(jnp.where(beta > 0, beta, 1.0))
    sizes = log_beta[:-1] - log_beta[1:]
    inner = jnp.where(beta[2:] > 0, sizes[1:] / (2 * sizes[:-1]), 0.0)
    return jnp.concatenate([jnp.zeros_like(beta[:1]), inner])


def _integrate(
    denoise: Denoiser,
    x: jax.Array,
    levels: Level,
    raised: Level | None,
    solver: str,
    noise: tuple[jax.Array, ArrayLike] | None = None,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The state at the last of the levels [n + 1] or [n + 1, B] from x at the first.

    Where `raised` has levels for the n steps, each begins by the forward transition to its own,
    with noise drawn by (keys [B], scale); the solver then leads from there to the next level.
    """
    _check_solver(solver)
    given, x = x, _dct._wide(x)
    levels = tuple(jnp.asarray(level).astype(x.dtype) for level in levels)
    begin, end = (tuple(level[part] for level in levels) for part in (np.s_[:-1], np.s_[1:]))
    start = begin if raised is None else tuple(jnp.asarray(a).astype(x.dtype) for a in raised)
    # From call to call: as far as the lower ends of steps that rise again, (2) would overshoot.
    weights = _weights(jnp.concatenate([start[1], end[1][-1:]]))

    def step(carry, inputs):
        x, previous = carry
        keys, weight, begin, start, end = inputs
        if raised is not None:
            keys = jax.random.wrap_key_data(keys, impl=jax.random.key_impl(noise[0]))
            x = transition(x, noise[1] * _normal(keys, x), begin, start)
        if solver == "heun":
            x = _heun(denoise, x, start, end)
            return (x, previous), x if return_trajectory else None
        prediction, ahead = _predict(denoise, x, *start), None
        if solver == "multistep":
            ahead = _dct._level(weight, x) * (prediction.clean - previous)
        x = x + _difference(x, prediction, start[1], start, end, ahead)
        return (x, prediction.clean), x if return_trajectory else None

    # As plain numbers: under debug_key_reuse a loop must not draw by a key from outside.
    keys = noise and jax.random.key_data(
        jax.vmap(lambda step: jax.vmap(lambda key: jax.random.fold_in(key, step))(noise[0]))(
            jnp.arange(weights.shape[0])
        )
    )
    steps = keys, weights, begin, start, end
    (end, _), states = jax.lax.scan(step, (x, x), steps)
    end = end.astype(given.dtype)
    if not return_trajectory:
        return end
    return end, jnp.concatenate([given[None], states.astype(given.dtype)])


# --- checks --------------------------------------------------------------------------------------


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(
            f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}; churn= makes sampling "
            "stochastic"
        )


def _checked_times(times: ArrayLike, schedule: Schedule, x: jax.Array) -> jax.Array:
    known = not isinstance(times, jax.core.Tracer)
    times = np.asarray(times) if known else times
    if times.ndim not in (1, 2) or times.shape[0] < 2 or times.shape[1:] not in ((), x.shape[:1]):
        raise ValueError(
            f"times must be two or more, [n + 1] or [n + 1, {x.shape[0]}], got {times.shape}"
        )
    if not known:
        return times
    top = schedule.t_max
    # t_max itself may have been rounded.
    inside = isinstance(top, jax.core.Tracer) or np.all(times[0] <= top * 1.00001)
    if not (inside and np.all(np.diff(times, axis=0) < 0) and np.all(times[-1] >= 0)):
        raise ValueError(f"times must fall from at most t_max = {top} to at least 0, got {times}")
    return jnp.asarray(times.astype(float))


def _checked_churn(churn: Churn | float) -> Churn:
    churn = Churn(*churn) if isinstance(churn, tuple) else Churn(churn)
    for name, value in churn._asdict().items():
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"churn must have {name} >= 0, got {value}")
    return churn


# --- sampling ------------------------------------------------------------------------------------


@overload
def solve(
    denoise: Denoiser, x: ArrayLike, schedule: Schedule, times: ArrayLike, *, solver: str = "heun",
    churn: Churn | float | None = None, key: jax.Array | None = None,
    return_trajectory: Literal[False] = False,
) -> jax.Array: ...  # fmt: skip


@overload
def solve(
    denoise: Denoiser, x: ArrayLike, schedule: Schedule, times: ArrayLike, *, solver: str = "heun",
    churn: Churn | float | None = None, key: jax.Array | None = None,
    return_trajectory: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def solve(
    denoise: Denoiser,
    x: ArrayLike,
    schedule: Schedule,
    times: ArrayLike,
    *,
    solver: str = "heun",
    churn: Churn | float | None = None,
    key: jax.Array | None = None,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Follows the probability flow from the state x at times[0] to times[-1].

    Args:
      denoise: (x, alpha, beta) -> Prediction.
      x: states [B, *spatial, C] at times[0].
      schedule: the path.
      times: falling, [n + 1] such as `schedules.time_grid`'s, or [n + 1, B] where each image has
        its own. 0 is the clean image; where the last is above 0 sampling ends there, and heun makes
        its second call there as well.
      solver: euler, heun or multistep.
      churn: makes sampling stochastic, as EDM does, for euler and heun; a number is S_churn.
      key: PRNG key for churn; an array of B keys gives every image a stream of its own.
      return_trajectory: also return the states at all times.

    Returns:
      States at times[-1], like x; with `return_trajectory` (those, states [n + 1, B, *spatial, C]).

    Raises:
      ValueError: an unknown solver, wrong shapes, a network that is not wrapped, times that do not
        fall or leave the path, churn without key or with multistep, multistep on a path whose beta
        does not fall. Numbers that are traced cannot be looked at.

    Example:
      Cold diffusion sharpens blurred images; the exact denoiser of one image finds it.

      >>> image, path = np.full((1, 4, 4, 1), 0.25), schedules.cold()
      >>> start = process.perturb(image, 0 * image, path.alpha(24.0), path.beta(24.0))
      >>> x = samplers.solve(oracle.mixture(image), start, path, [24.0, 4.0, 0.5, 0.0])
      >>> bool(jnp.all(abs(x - 0.25) < 1e-4))
      True
    """
    _check_schedule(schedule)
    x = _dct._array(x)
    with _eager():  # known numbers under jit, too: checked, not traced
        times = _checked_times(times, schedule, x)
        levels = jax.vmap(schedule.alpha)(times), jax.vmap(schedule.beta)(times)
        falls = solver != "multistep" or _falls(levels[1])
    if not falls:
        raise ValueError(
            "solver 'multistep' needs a noise level that falls at every step, got "
            f"{levels[1]}; use 'heun' or 'euler' on a path of constant beta"
        )
    if churn is None:
        return _integrate(denoise, x, levels, None, solver, return_trajectory=return_trajectory)
    if solver == "multistep":
        raise ValueError("churn works with the one-step solvers, euler and heun, not multistep")
    if key is None:
        raise ValueError("churn draws noise at each step: pass key=, one or one per image")
    churn = _checked_churn(churn)
    gamma = jnp.minimum(churn.s_churn / (times.shape[0] - 1), math.sqrt(2) - 1)
    begin = tuple(level[:-1] for level in levels)
    inside = (churn.s_min <= begin[1]) & (begin[1] <= churn.s_max) & (gamma > 0)
    higher = times[:-1] * (1 + gamma)
    # A step that is not raised keeps the grid's levels: computed again they might round lower.
    raised = tuple(
        jnp.where(inside, jax.vmap(level)(higher), at)
        for level, at in zip((schedule.alpha, schedule.beta), begin, strict=True)
    )
    noise = _image_keys(key, x.shape[0]), churn.s_noise
    return _integrate(denoise, x, levels, raised, solver, noise, return_trajectory)


def _falls(beta: jax.Array) -> bool:
    return isinstance(beta, jax.core.Tracer) or bool(np.all(np.diff(np.asarray(beta), axis=0) < 0))


@overload
def sample(
    denoise: Denoiser, noise: ArrayLike, schedule: Schedule, *, solver: str = "heun",
    num_steps: int = 18, rho: float = 7.0, churn: Churn | float | None = None,
    key: jax.Array | None = None, return_trajectory: Literal[False] = False,
) -> jax.Array: ...  # fmt: skip


@overload
def sample(
    denoise: Denoiser, noise: ArrayLike, schedule: Schedule, *, solver: str = "heun",
    num_steps: int = 18, rho: float = 7.0, churn: Churn | float | None = None,
    key: jax.Array | None = None, return_trajectory: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def sample(
    denoise: Denoiser,
    noise: ArrayLike,
    schedule: Schedule,
    *,
    solver: str = "heun",
    num_steps: int = 18,
    rho: float = 7.0,
    churn: Churn | float | None = None,
    key: jax.Array | None = None,
    return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Draws data by following the probability flow from noise to the clean image.

    Args:
      denoise: (x, alpha, beta) -> Prediction.
      noise: standard normal [B, *spatial, C], see `initial_noise`.
      schedule: the path, from t_max down.
      solver: as for `solve`, and likewise churn, key and return_trajectory.
      num_steps: n of `schedules.time_grid`; the denoiser is called n times, by heun 2 n - 1 times.
      rho: spacing of that grid.
      churn: EDM's stochasticity.
      key: for churn.
      return_trajectory: also return the states at all times of the grid.

    Returns:
      Data like the noise; with `return_trajectory` (data, states [n + 1, B, *spatial, C]).

    Raises:
      ValueError: what `solve` raises, and a path whose noise at t_max does not hide the data.

    Example:
      The exact denoiser of a single image leads back to it.

      >>> image = np.full((1, 4, 4, 1), 0.25)
      >>> noise = samplers.initial_noise([7, 8], (4, 4, 1))
      >>> x = samplers.sample(oracle.mixture(image), noise, schedules.constant_bnr(0.5))
      >>> x.shape, bool(jnp.all(abs(x - 0.25) < 1e-4))
      ((2, 4, 4, 1), True)
    """
    noise, times = _dct._array(noise, "noise"), time_grid(schedule, num_steps, rho)
    if schedule.needs_start:
        raise ValueError(
            "the noise at this path's t_max is below 1 and does not hide the data: take "
            "samplers.solve from blurred data there, process.perturb(x0, noise, "
            "schedule.alpha(t_max), schedule.beta(t_max))"
        )
    x = _dct._level(schedule.beta(schedule.t_max), noise) * noise
    options = {"solver": solver, "churn": churn, "key": key, "return_trajectory": return_trajectory}
    return solve(denoise, x, schedule, times, **options)
