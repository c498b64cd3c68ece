"""Samplers of the blur-noise probability flow: euler, heun, multistep, and EDM's churn.

One step from (alpha, beta) to (alpha', beta') in difference form, exact when both heads are
constant over the step (the integral of process.py's eq. (5)):

    (1)  x' = x + [B(alpha') - B(alpha)] (D + R) + (beta' - beta) (x - D) / beta

euler      (1). At BNR 0 it is EDM's and DDIM's step, at constant beta Cold Diffusion's
           Algorithm 2 (Bansal et al. 2022, arXiv 2208.09392). n calls of the denoiser.
heun       averages the increments of (1) at both ends (EDM, Algorithm 1); 2 n - 1 calls.
multistep  DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) carried over to the blur-noise path
           (ours). With h = ln(beta / beta'), r = h_prev / h, x0_bar - x0 = (x0 - x0_prev) / (2 r):
    (2)  x' = (1) + [B(alpha') - (beta' / beta) B(alpha)] (x0_bar - x0),   x0 = D + R; n calls.
churn      before each step raises the level by the exact forward transition (EDM, Algorithm 2).

A step to the clean image (0, 0) is (1) for all solvers: D + (I - B)(D + R). A grid may also end
above 0. Sampling starts from noise alone, or, told the data's mean and spectrum (`prior`), from a
draw of Gaussian data (Wang and Vastola 2024, arXiv 2412.09726, for noise alone): where noise is
well above the data's largest standard deviation the denoiser sees no difference, so the grid may
start there, and the calls above are saved.
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
from warm_diffusion.denoiser import Denoiser, Prediction, check_prediction
from warm_diffusion.process import image_keys, transition
from warm_diffusion.schedules import Schedule, time_grid

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


def initial_noise(seeds: ArrayLike | Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise with one stream per seed, so that batch and device count don't matter.

    Args:
      seeds: integers [B].
      shape: shape of one image, (H, W, C).

    Returns:
      Noise [B, H, W, C]; row i depends on seeds[i] alone.

    Raises:
      ValueError: seeds are not a list of integers.

    Example:
      >>> noise = samplers.initial_noise([7, 8], (4, 4, 3))
      >>> noise.shape, bool(jnp.all(noise[1:] == samplers.initial_noise([8], (4, 4, 3))))
      ((2, 4, 4, 3), True)
    """
    seeds = jnp.asarray(seeds)
    if seeds.ndim != 1 or not jnp.issubdtype(seeds.dtype, jnp.integer):
        raise ValueError(f"seeds must be integers [B], got {seeds.dtype} {seeds.shape}")
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


class _Level(NamedTuple):
    t: jax.Array
    alpha: jax.Array
    beta: jax.Array


def _blur_change(clean: jax.Array, start: _Level, end: _Level) -> jax.Array:
    change = _dct.transfer_like(end.alpha, clean) - _dct.transfer_like(start.alpha, clean)
    return _dct.idct(change * _dct.dct(clean))


def _increment(
    x: jax.Array, prediction: Prediction, beta: jax.Array, start: _Level, end: _Level
) -> jax.Array:
    """Change of x from `start` to `end` by eq. (1), `prediction` made at noise level beta."""
    # Without noise (pure cold diffusion) there is none to remove: 0, not 0 / 0.
    shrink = jnp.where(beta > 0, (end.beta - start.beta) / jnp.where(beta > 0, beta, 1.0), 0.0)
    return _blur_change(prediction.clean, start, end) + shrink * (x - prediction.blurry)


def _euler_step(denoise: Denoiser, x: jax.Array, start: _Level, end: _Level) -> jax.Array:
    prediction = denoise(x, start.alpha, start.beta)
    return x + _increment(x, prediction, start.beta, start, end)


def _heun_step(denoise: Denoiser, x: jax.Array, start: _Level, end: _Level) -> jax.Array:
    prediction = denoise(x, start.alpha, start.beta)
    first = _increment(x, prediction, start.beta, start, end)

    def second() -> jax.Array:
        prediction = denoise(x + first, end.alpha, end.beta)
        return _increment(x + first, prediction, end.beta, start, end)

    # There is no second call at the clean image: the step to it is Euler's.
    return x + (first + jax.lax.cond(end.beta > 0, second, lambda: first)) / 2


def _churned(
    x: jax.Array,
    start: _Level,
    step: jax.Array,
    keys: jax.Array,
    schedule: Schedule,
    churn: Churn,
    num_steps: int,
) -> tuple[jax.Array, _Level]:
    gamma = min(churn.s_churn / num_steps, math.sqrt(2) - 1)
    inside = (churn.s_min <= start.beta) & (start.beta <= churn.s_max)
    t = start.t * (1 + jnp.where(inside, gamma, 0.0))
    raised = _Level(t, schedule.alpha(t), schedule.beta(t))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    return transition(x, churn.s_noise * noise, start[1:], raised[1:]), raised


def _steps(levels: _Level) -> tuple[_Level, _Level]:
    """Start and end level of each step."""
    return jax.tree.map(lambda a: a[:-1], levels), jax.tree.map(lambda a: a[1:], levels)


def _one_step_solve(
    denoise: Denoiser,
    x: jax.Array,
    levels: _Level,
    schedule: Schedule,
    solver: str,
    churn: Churn | None,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    num_steps = levels.t.size - 1
    take_step = _heun_step if solver == "heun" else _euler_step

    def body(x, inputs):
        step, start, end = inputs
        if churn is not None:
            x, start = _churned(x, start, step, keys, schedule, churn, num_steps)
        x = take_step(denoise, x, start, end)
        return x, x

    return jax.lax.scan(body, x, (jnp.arange(num_steps), *_steps(levels)))


def _multistep_solve(
    denoise: Denoiser, x: jax.Array, levels: _Level
) -> tuple[jax.Array, jax.Array]:
    beta = levels.beta
    if not isinstance(beta, jax.core.Tracer) and not np.all(np.diff(np.asarray(beta)) < 0):
        raise ValueError(
            "solver 'multistep' needs a noise level that falls at every step, got "
            f"{beta}; use 'heun' or 'euler' on a path of constant beta"
        )
    # Weight 1 / (2 r) of the step before: none for the first step, nor for one to beta = 0.
    log_beta = jnp.log(jnp.where(beta > 0, beta, 1.0))
    step_sizes = log_beta[:-1] - log_beta[1:]
    inner = jnp.where(beta[2:] > 0, step_sizes[1:] / (2 * step_sizes[:-1]), 0.0)
    weights = jnp.concatenate([jnp.zeros((1,), beta.dtype), inner])

    def body(carry, inputs):
        x, previous = carry
        weight, start, end = inputs
        prediction = denoise(x, start.alpha, start.beta)
        remaining = end.beta / start.beta * _dct.transfer_like(start.alpha, x)
        correction = (_dct.transfer_like(end.alpha, x) - remaining) * _dct.dct(
            weight * (prediction.clean - previous)
        )
        x = x + _increment(x, prediction, start.beta, start, end) + _dct.idct(correction)
        return (x, prediction.clean), x

    (x, _), states = jax.lax.scan(body, (x, jnp.zeros_like(x)), (weights, *_steps(levels)))
    return x, states


def _checked_grid(grid: ArrayLike, schedule: Schedule) -> jax.Array:
    times = jnp.asarray(grid, dtype=float)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"grid must be two times or more, [n + 1], got shape {times.shape}")
    if isinstance(times, jax.core.Tracer):
        return times
    known = np.asarray(times)
    # t_max itself may have been rounded.
    if not (np.all(np.diff(known) < 0) and known[-1] >= 0 and known[0] <= schedule.t_max * 1.00001):
        raise ValueError(
            f"grid must fall from at most t_max = {schedule.t_max:g} to at least 0, got {known}"
        )
    return times


def _first_state(
    noise: jax.Array,
    start: jax.Array | None,
    schedule: Schedule,
    levels: _Level,
    prior: tuple[ArrayLike, ArrayLike] | None,
) -> jax.Array:
    """The state at the grid's first level."""
    first = levels.alpha[0], levels.beta[0]
    if start is None:
        visible = prior is None and not isinstance(first[1], jax.core.Tracer) and first[1] < 1
        if schedule.needs_start or visible:
            raise ValueError(
                "the noise where this sampling starts is below 1 and does not hide the images: "
                "pass start=, blurred images there: process.perturb(x0, noise, schedule.alpha(t), "
                "schedule.beta(t)), t the first time"
            )
        return first[1] * noise if prior is None else _oracle.gaussian_state(noise, *prior, *first)
    if prior is None:
        return start
    t_max = jnp.asarray(schedule.t_max, noise.dtype)
    last = schedule.alpha(t_max), schedule.beta(t_max)
    return _oracle.gaussian_flow(start, *prior, last, first)


@overload
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
    return_trajectory: Literal[False] = False,
    start: ArrayLike | None = None,
    grid: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array: ...


@overload
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
    return_trajectory: Literal[True],
    start: ArrayLike | None = None,
    grid: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[jax.Array, jax.Array]: ...


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
    start: ArrayLike | None = None,
    grid: ArrayLike | None = None,
    prior: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Draws images by following the probability flow from noise to the clean image.

    Args:
      denoise: (x, alpha, beta) -> Prediction.
      noise: standard normal [B, H, W, C], see `initial_noise`.
      schedule: the path, from t_max down.
      solver: euler, heun or multistep.
      num_steps: n of the default grid; the denoiser is called n times, by heun 2 n - 1 times.
      rho: spacing of the default grid, `schedules.time_grid`.
      churn: makes sampling stochastic, as EDM does, for euler and heun (there is no solver
        "stochastic"); a bare number is S_churn.
      key: PRNG key for churn; an array of B keys gives every image a stream of its own.
      return_trajectory: also return the states at all times of the grid.
      start: state at grid[0], with `prior` at t_max; default beta * noise, right where noise drowns
        the data there. Needed where it does not: on a path that `needs_start`, and without `prior`
        on a grid that starts below beta = 1.
      grid: falling times [n + 1] instead, such as `schedules.spectral_grid`'s. Where the last is
        above 0 sampling ends there, and heun makes its second call there as well.
      prior: mean image [H, W, C] and spectrum [H, W] of the data: the state at grid[0] is that of
        Gaussian data, drawn, or reached from `start` by their flow, without a call of the denoiser.

    Returns:
      Images [B, H, W, C]; with `return_trajectory` (images, states [n + 1, B, H, W, C]).

    Raises:
      ValueError: an unknown solver, wrong shapes, a network that is not wrapped, no start where one
        is needed, churn without key or with multistep, multistep on a path whose beta does not
        fall, a grid that does not fall or leaves the path.

    Example:
      The exact denoiser of a single image leads back to it.

      >>> image = np.full((1, 4, 4, 1), 0.25)
      >>> noise = samplers.initial_noise([7, 8], (4, 4, 1))
      >>> x = samplers.sample(oracle.mixture(image), noise, schedules.constant_bnr(0.5))
      >>> x.shape, bool(jnp.all(abs(x - 0.25) < 1e-4))
      ((2, 4, 4, 1), True)
    """
    if solver not in SOLVERS:
        raise ValueError(
            f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}; churn= makes sampling "
            "stochastic"
        )
    noise = _dct.as_images(noise, "noise")
    if start is not None:
        start = _dct.as_images(start, "start")
        if start.shape != noise.shape:
            raise ValueError(
                f"start and noise must have one shape, got {start.shape}, {noise.shape}"
            )
    if churn is not None and solver == "multistep":
        raise ValueError(
            "churn works with the one-step solvers, euler and heun, not with multistep"
        )
    with jax.ensure_compile_time_eval():  # known numbers under jit, too: checked, not traced
        t = time_grid(schedule, num_steps, rho) if grid is None else _checked_grid(grid, schedule)
        t = t.astype(noise.dtype)
        levels = _Level(t, schedule.alpha(t), schedule.beta(t))
    x = _first_state(noise, start, schedule, levels, prior)

    def checked(x: jax.Array, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        return check_prediction(denoise(x, alpha, beta))

    if solver == "multistep":
        end, states = _multistep_solve(checked, x, levels)
    else:
        keys = None
        if churn is not None:
            churn = Churn(*churn) if isinstance(churn, tuple) else Churn(churn)
            if key is None:
                raise ValueError("churn draws noise at each step: pass key=, one or one per image")
            keys = image_keys(key, noise.shape[0])
        end, states = _one_step_solve(checked, x, levels, schedule, solver, churn, keys)
    return (end, jnp.concatenate([x[None], states])) if return_trajectory else end
