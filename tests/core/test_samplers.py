"""Samplers: order of convergence per frequency, and against published algorithms typed anew.

The references are EDM's Algorithms 1 and 2 (arXiv 2206.00364), Cold Diffusion's Algorithm 2 (arXiv
2208.09392), DPM-Solver++(2M) (arXiv 2211.01095), and method section 3 for the path between.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import (
    blur,
    dct,
    difference_step,
    dpm_solver_2m,
    edm_sampler,
    edm_times,
    gaussian_data,
    idct,
    solve,
    transfer,
    within_standard_errors,
)
from warm_diffusion import oracle, samplers, schedules
from warm_diffusion.denoiser import Prediction
from warm_diffusion.samplers import SOLVERS, Churn, gaussian_start, initial_noise, sample
from warm_diffusion.samplers import solve as jax_solve

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (5, 4, 2)
DATA = gaussian_data(*SIZE)
EXACT = oracle.gaussian(DATA.mean, DATA.spectrum)
RANGE = {"beta_min": 0.05, "beta_max": 10.0}
WARM = schedules.constant_bnr(0.5, **RANGE)
HOT = schedules.hot(**RANGE)
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def toy(x, alpha, beta, gain=1.0):
    """A denoiser that is not linear and whose heads are not consistent; levels are scalars."""
    blurry = (jnp.tanh(gain * x) + 0.2 * jnp.roll(x, 1, 2)) / (1 + beta)
    return Prediction(blurry, 0.3 * jnp.cos(x + beta) * (alpha + 0.1) / (1 + alpha))


jitted_toy = jax.jit(toy)
noise_of = jax.jit(initial_noise, static_argnums=1)


def heads(x, alpha, beta):
    """The toy's heads as numpy arrays."""
    return [np.asarray(part) for part in jitted_toy(x, float(alpha), float(beta))]


def hot_toy(x, sigma):
    """EDM's denoiser: the toy's first head without blur."""
    return heads(x, 0.0, sigma)[0]


def normal(count=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SIZE))


def constant_noise(beta):
    """Cold diffusion: blur falls from 3 pixels to none, the noise stays (traced: not checked)."""
    return schedules.from_functions(
        lambda t: t, lambda t: beta, t_min=0.2, t_max=3.0,
        sample_time=lambda key, shape: jnp.ones(shape),
    )  # fmt: skip


@functools.cache
def compiled(solver, num_steps, schedule=WARM, denoise=toy, **options):
    """`sample` with everything but arrays fixed: (noise, key or keys) -> images."""

    def run(noise, key=None):
        return sample(
            denoise, noise, schedule, solver=solver, num_steps=num_steps, key=key, **options
        )

    return jax.jit(run)


# --- order of convergence ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "order", "shape"),
    [
        ("euler", 1, (5, 4, 2)), ("heun", 2, (5, 4, 2)), ("multistep", 2, (5, 4, 2)),
        ("heun", 2, (6, 1)), ("multistep", 2, (3, 2, 4, 1)),
    ],
)  # fmt: skip
def test_the_error_of_every_frequency_falls_with_the_order_of_the_solver(solver, order, shape):
    # Against the closed-form flow at t_min (the step to 0 is no step of the flow); slope of the
    # logarithms between 32 and 128 steps, each frequency by itself: DC feels no blur at all.
    data, ratios = gaussian_data(*shape), np.array([0.0, 0.5])
    exact = oracle.gaussian(data.mean, data.spectrum)
    noise = np.random.default_rng(0).standard_normal((6, *shape))

    @jax.jit
    @jax.vmap
    def ends(bnr):
        path, found = schedules.constant_bnr(bnr, beta_min=0.02), []
        for num_steps in (32, 128):
            options = {"solver": solver, "num_steps": num_steps + 1, "return_trajectory": True}
            found.append(sample(exact, noise, path, **options)[1][-2])
        return found

    coarse, fine = ends(ratios)
    for i, bnr in enumerate(ratios):
        expected = data.flow(80.0 * noise, (80.0 * bnr, 80.0), (0.02 * bnr, 0.02))
        errors = (np.mean(dct(end[i] - expected) ** 2, axis=0) for end in (coarse, fine))
        slopes = np.subtract(*map(np.log, errors)) / (2 * np.log(4))
        np.testing.assert_allclose(slopes, np.full(shape, order), atol=0.2)


# --- published algorithms, typed anew ------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 6])
@each_solver
def test_solvers_follow_their_formulas_on_the_blur_noise_path(solver, num_steps):
    beta = edm_times(0.05, 10.0, num_steps, 7.0)
    expected = solve(solver, heads, 10.0 * normal(), list(zip(0.5 * beta, beta, strict=True)))
    np.testing.assert_allclose(compiled(solver, num_steps)(normal()), expected, atol=1e-11)


def test_without_blur_the_default_is_edms_deterministic_sampler_with_eighteen_steps():
    images = jax.jit(lambda noise: sample(toy, noise, HOT))(normal())
    expected = edm_sampler(hot_toy, 10.0 * normal(), edm_times(0.05, 10.0, 18, 7.0))
    np.testing.assert_allclose(images, expected, atol=1e-11)


def test_without_blur_multistep_is_dpm_solver_pp_2m():
    def denoise(x, alpha, beta):  # there: the clean image, without a second head
        return Prediction(toy(x, alpha, beta).blurry, jnp.zeros_like(x))

    expected = dpm_solver_2m(hot_toy, 10.0 * normal(), edm_times(0.05, 10.0, 6, 7.0))
    images = compiled("multistep", 6, HOT, denoise)(normal())
    np.testing.assert_allclose(images, expected, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_at_constant_noise_euler_is_cold_diffusions_improved_sampler(beta):
    # Bansal et al., Algorithm 2: x <- x - B(a_s) x0_hat + B(a_next) x0_hat. Not so the last step,
    # to (0, 0), in which the noise leaves as well.
    x = normal(seed=1)
    alpha = edm_times(0.2, 3.0, 5, 7.0)[:-1]
    run = jax.jit(lambda x, beta: jax_solve(toy, x, constant_noise(beta), alpha, solver="euler"))
    images = run(x, beta)
    for a, a_next in itertools.pairwise(alpha):
        clean = sum(heads(x, a, beta))
        x = x - blur(clean, a) + blur(clean, a_next)
    np.testing.assert_allclose(images, x, atol=1e-12)


# --- calls, trajectories, seeds ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "calls"),
    [("heun", lambda n: 2 * n - 1), ("euler", lambda n: n), ("multistep", lambda n: n)],
)
def test_the_denoiser_is_called_as_often_as_promised_and_traced_as_often_at_any_number(
    solver, calls
):
    counted, traced, counts = [], [], []

    def denoise(x, alpha, beta):
        traced.append(1)
        jax.debug.callback(lambda: counted.append(1))
        return toy(x, alpha, beta)

    for num_steps in (2, 5):
        counted.clear(), traced.clear()
        compiled(solver, num_steps, denoise=denoise)(normal())
        jax.effects_barrier()
        assert len(counted) == calls(num_steps)
        counts.append(len(traced))
    assert counts[0] == counts[1]


@each_solver
def test_the_trajectory_runs_from_the_start_to_the_images(solver):
    images, states = compiled(solver, 4, return_trajectory=True)(normal())
    assert states.shape == (5, 3, *SIZE)
    np.testing.assert_allclose(states[0], 10.0 * normal(), rtol=1e-13)
    np.testing.assert_array_equal(states[-1], images)
    # The last step, from t_min, returns D + (I - B)(D + R), also where heads are not consistent.
    blurry, residual = heads(np.asarray(states[-2]), 0.5 * 0.05, 0.05)
    clean = blurry + residual
    np.testing.assert_allclose(images, blurry + clean - blur(clean, 0.5 * 0.05), atol=1e-12)


def test_initial_noise_is_standard_normal_of_each_seed_alone():
    noise = np.asarray(noise_of(np.arange(3000), SIZE))
    within_standard_errors(noise, np.zeros(SIZE), np.ones(SIZE))
    for seeds in ([2**31, 2**32 - 1], np.array([7], np.uint8)):
        for seed, found in zip(seeds, initial_noise(seeds, SIZE), strict=True):
            alone = jax.random.normal(jax.random.key(np.uint32(seed)), SIZE, np.float32)
            np.testing.assert_array_equal(found, alone)


@each_solver
def test_samples_are_differentiable_with_respect_to_the_denoiser(solver):
    # Central differences in the toy's gain.
    @jax.jit
    @jax.value_and_grad
    def total(gain):
        denoise = functools.partial(toy, gain=gain)
        return jnp.sum(sample(denoise, normal(), WARM, solver=solver, num_steps=4) ** 2)

    expected = (total(1.0 + 1e-5)[0] - total(1.0 - 1e-5)[0]) / 2e-5
    np.testing.assert_allclose(total(1.0)[1], expected, rtol=1e-6)


# --- solve, gaussian_start -----------------------------------------------------------------------


@each_solver
def test_times_that_end_above_zero_end_there(solver):
    # By the formulas of method section 3, whose solver takes the last step like the others there.
    times = np.array([8.0, 2.5, 1.0, 0.3])
    run = jax.jit(lambda x: jax_solve(toy, x, WARM, times, solver=solver))
    expected = solve(solver, heads, 8.0 * normal(), list(zip(0.5 * times, times, strict=True)))
    np.testing.assert_allclose(run(8.0 * normal()), expected, atol=1e-11)


def toy_of_each(x, alpha, beta):
    """The toy for levels [B]."""
    return toy(x, *(jnp.reshape(level, (-1, 1, 1, 1)) for level in (alpha, beta)))


@each_solver
def test_every_image_may_have_its_own_times(solver):
    # One of them ends above zero; a sampler of each alone is the reference.
    times = np.array([[8.0, 3.0, 0.5], [2.5, 1.0, 0.4], [1.0, 0.3, 0.1], [0.3, 0.0, 0.0]])
    x = 8.0 * normal()
    run = jax.jit(lambda x, times: jax_solve(toy_of_each, x, WARM, times, solver=solver))
    together = run(x, times)
    for i in range(3):
        alone = run(x[i : i + 1], times[:, i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-11)


def test_from_raised_levels_multistep_extrapolates_by_the_levels_of_its_calls():
    # Method section 3. Without its noise the transition up only blurs; h and its predecessor are
    # the distances in ln beta between the calls, which are made at the raised levels.
    ends, raised = np.array([8.0, 2.0, 0.5, 0.1]), np.array([8.0, 3.0, 0.6])
    levels, higher = ((0.5 * beta, beta) for beta in (ends, raised))
    keys = jax.random.split(jax.random.key(0), 3)
    x = 8.0 * normal()
    found = samplers._integrate(toy, x, levels, higher, "multistep", (keys, 0.0))
    calls, previous = np.append(raised, ends[-1]), None
    for i, beta in enumerate(raised):
        x = idct(transfer(0.5 * beta, 5, 4) / transfer(0.5 * ends[i], 5, 4) * dct(x))
        start, end = ((0.5 * level, level) for level in (beta, ends[i + 1]))
        blurry, residual = heads(x, *start)
        clean, x = blurry + residual, difference_step(x, blurry, residual, start, end)
        if previous is not None:
            r = np.log(calls[i - 1] / beta) / np.log(beta / calls[i + 1])
            ahead = (clean - previous) / (2 * r)
            x = x + blur(ahead, end[0]) - end[1] / start[1] * blur(ahead, start[0])
        previous = clean
    np.testing.assert_allclose(found, x, atol=1e-11)


@pytest.mark.parametrize("t", [4.0, np.array([0.5, 4.0, 9.0])])
def test_a_draw_of_gaussian_data_has_its_marginal(t):
    # An affine function of the noise, per frequency: mean and standard deviation of the marginal.
    mean, variance = DATA.marginal(0.5 * t, t)
    x = gaussian_start(normal(), WARM, t, DATA.mean, DATA.spectrum)
    np.testing.assert_allclose(dct(x), mean + np.sqrt(variance) * dct(normal()), atol=1e-12)


def test_from_a_gaussian_start_fine_times_draw_gaussian_data():
    # Exact flow all the way: the images are mu + S^1/2 noise in the DCT basis, whatever the start.
    times = np.geomspace(3.0, 1e-4, 400)
    start = gaussian_start(normal(), WARM, times[0], DATA.mean, DATA.spectrum)
    images = jax.jit(lambda x: jax_solve(EXACT, x, WARM, times, solver="multistep"))(start)
    expected = idct(dct(DATA.mean[None]) + np.sqrt(DATA.spectrum) * dct(normal()))
    np.testing.assert_allclose(images, expected, atol=2e-3)


def test_a_sweep_over_ratios_compiles_once():
    compilations = []

    @jax.jit
    def run(noise, path):
        compilations.append(path)
        return sample(toy, noise, path, num_steps=6, solver="multistep")

    first, second = (run(normal(), schedules.constant_bnr(bnr, **RANGE)) for bnr in (0.5, 2.0))
    np.testing.assert_allclose(first, compiled("multistep", 6)(normal()), atol=1e-10)
    assert np.all(first != second)
    assert len(compilations) == run._cache_size() == 1


# --- churn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "churn"), [("euler", 0.0), ("heun", 0.0), ("heun", Churn(40.0, s_min=20.0))]
)
def test_no_churn_is_the_deterministic_sampler(solver, churn):
    images = compiled(solver, 4, churn=churn)(normal(), jax.random.key(0))
    np.testing.assert_allclose(images, compiled(solver, 4)(normal()), atol=1e-12)


@pytest.mark.parametrize(("churn", "low", "high"), [(40.0, 0.0, np.inf), (1.5, 0.2, 4.0)])
def test_without_blur_churn_raises_the_level_as_edm_does(churn, low, high):
    # Algorithm 2 with S_noise = 0: all but the noise itself, which is random.
    run = compiled("heun", 6, HOT, churn=Churn(churn, low, high, s_noise=0.0))
    times = edm_times(0.05, 10.0, 6, 7.0)
    expected = edm_sampler(hot_toy, 10.0 * normal(), times, churn, low, high)
    np.testing.assert_allclose(run(normal(), jax.random.key(0)), expected, atol=1e-11)


def churned_moments(num_steps, churn, s_noise):
    """Mean and variance of euler's images of Gaussian data with churn: affine, per frequency."""
    t = edm_times(0.05, 10.0, num_steps, 7.0)
    gamma = min(churn / num_steps, np.sqrt(2) - 1)
    mean, variance = np.zeros(SIZE), np.full(SIZE, 10.0**2)
    for start, end in itertools.pairwise(t):
        raised = (1 + gamma) * start
        r = transfer(0.5 * raised, *SIZE[:-1]) / transfer(0.5 * start, *SIZE[:-1])
        drawn = s_noise**2 * (raised**2 - r**2 * start**2)
        mean, variance = r * mean, r**2 * variance + drawn
        levels = (0.5 * raised, raised), (0.5 * end, end)

        def step(coefficients, levels=levels):
            x = idct(coefficients[None])
            return dct(difference_step(x, *DATA.posterior_means(x, *levels[0]), *levels))[0]

        offset = step(np.zeros(SIZE))
        slope = step(np.ones(SIZE)) - offset
        mean, variance = slope * mean + offset, slope**2 * variance
    return mean, variance


def test_churned_states_have_the_moments_of_exact_transitions():
    # Monte Carlo against the recursion above, discretisation included: 5 standard errors.
    run = compiled("euler", 8, WARM, EXACT, churn=Churn(6.0, s_noise=1.5))
    images = run(normal(3000), jax.random.key(0))
    within_standard_errors(dct(images), *churned_moments(8, 6.0, 1.5))


def test_churn_keeps_the_marginals_of_the_data():
    # Heun with 40 steps; 5 standard errors of 3,000 images (13 % of the variance).
    images = compiled("heun", 40, WARM, EXACT, churn=40.0)(normal(3000), jax.random.key(0))
    within_standard_errors(dct(images), dct(DATA.mean[None])[0], DATA.spectrum)


def test_churn_draws_fresh_noise_for_every_image_and_key_in_any_batch():
    run, keys = compiled("heun", 4, churn=20.0), jax.random.split(jax.random.key(0), 3)
    same = np.repeat(normal(1), 3, axis=0)
    one_key, other_key, own_keys = (run(same, key) for key in (keys[0], keys[1], keys))
    assert np.all((one_key[0] != one_key[1]) & (one_key[1] != one_key[2]))
    assert np.all(one_key != other_key)
    np.testing.assert_allclose(run(same[:2], keys[0]), one_key[:2], atol=1e-12)
    np.testing.assert_allclose(run(same[1:], keys[1:]), own_keys[1:], atol=1e-12)


def sinking():
    """A path whose levels are a little lower each time that they are computed.

    So they may be, by rounding, from one compiled program to another.
    """
    calls = itertools.count()

    def level(t):
        return t * (1 - 1e-8 * next(calls))

    return schedules.from_functions(lambda t: level(t) / 2, level, t_min=0.05, t_max=10.0)


def test_levels_that_rise_by_less_than_rounding_are_not_raised():
    # A fall would be noise of variance < 0, NaN. Without churn nothing is computed again; churn of
    # 1e-9 raises by less than the rounding.
    def run(churn):
        times, path = schedules.time_grid(WARM, 6), sinking()
        options = {} if churn is None else {"churn": churn, "key": jax.random.key(0)}
        return jax.jit(lambda x: jax_solve(toy, x, path, times, solver="euler", **options))(x)

    x = 10.0 * normal()
    np.testing.assert_allclose(run(Churn(0.0)), run(None), atol=1e-12)
    np.testing.assert_allclose(run(Churn(1e-9)), run(None), atol=1e-5)
    assert np.all(np.isfinite(run(Churn(40.0, 0.2, 4.0))))


def turning():
    """Blurring diffusion's path as a user writes it: past its end, sine and tangent turn back."""
    return schedules.from_functions(
        lambda t: 10 * jnp.sin(jnp.pi * t / 2) ** 2, lambda t: jnp.tan(1.5 * t),
        t_min=1e-3, t_max=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("path", [schedules.cold, schedules.blurring_diffusion, turning])
def test_churn_is_finite_where_a_level_stays_in_float32(path):
    # Cold diffusion's noise stays; the other levels stay past the end of the path.
    path, image = path(), jnp.full((1, *SIZE), 0.25, jnp.float32)
    with jax.enable_x64(False):
        x = gaussian_start(
            jnp.asarray(normal(), jnp.float32), path, path.t_max, image[0], np.zeros(SIZE[:2])
        )
        run = jax.jit(
            lambda x: jax_solve(
                oracle.mixture(image), x, path, schedules.time_grid(path, 32),
                churn=100.0, key=jax.random.key(0),
            )
        )  # fmt: skip
        np.testing.assert_allclose(run(x), np.full(x.shape, 0.25), atol=1e-3)
