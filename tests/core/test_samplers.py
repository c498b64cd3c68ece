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
from warm_diffusion import oracle, schedules
from warm_diffusion.denoiser import Prediction
from warm_diffusion.samplers import (
    SOLVERS,
    Churn,
    _seeds,
    gaussian_start,
    initial_noise,
    sample,
)
from warm_diffusion.samplers import (
    solve as jax_solve,
)

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


@functools.cache
def errors_per_frequency(solver, num_steps, shape):
    """RMS error at t_min of each DCT coefficient, [2, *shape] for BNR 0 and 0.5."""
    data = gaussian_data(*shape)
    exact = oracle.gaussian(data.mean, data.spectrum)
    noise = np.random.default_rng(0).standard_normal((6, *shape))

    def ends(path):
        states = sample(
            exact, noise, path, solver=solver, num_steps=num_steps + 1, return_trajectory=True
        )[1]
        return states[0], states[-2]

    ratios = np.array([0.0, 0.5])
    paths = jax.vmap(lambda bnr: schedules.constant_bnr(bnr, beta_min=0.02))(ratios)
    errors = []
    for bnr, first, last in zip(ratios, *jax.jit(jax.vmap(ends))(paths), strict=True):
        expected = data.flow(first, (80.0 * bnr, 80.0), (0.02 * bnr, 0.02))
        errors.append(np.sqrt(np.mean(dct(last - expected) ** 2, axis=0)))
    return np.stack(errors)


@pytest.mark.parametrize("shape", [(6, 1), (5, 4, 2), (3, 2, 4, 1)], ids=["1", "2", "3"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_the_error_of_every_frequency_falls_with_the_order_of_the_solver(solver, order, shape):
    # Against the closed-form flow at t_min (the step to 0 is no step of the flow); slope of the
    # logarithms between 32 and 128 steps, each frequency by itself: DC feels no blur at all.
    coarse, fine = (errors_per_frequency(solver, n, shape) for n in (32, 128))
    slopes = np.log(coarse / fine) / np.log(4)
    np.testing.assert_allclose(slopes, np.full(slopes.shape, order), atol=0.2)


# --- published algorithms, typed anew ------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 6])
@each_solver
def test_solvers_follow_their_formulas_on_the_blur_noise_path(solver, num_steps):
    beta = edm_times(0.05, 10.0, num_steps, 7.0)
    expected = solve(solver, heads, 10.0 * normal(), list(zip(0.5 * beta, beta, strict=True)))
    np.testing.assert_allclose(compiled(solver, num_steps)(normal()), expected, atol=1e-11)


def test_without_blur_heun_is_edms_deterministic_sampler():
    expected = edm_sampler(hot_toy, 10.0 * normal(), edm_times(0.05, 10.0, 6, 7.0))
    np.testing.assert_allclose(compiled("heun", 6, HOT)(normal()), expected, atol=1e-11)


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


# --- calls, ends, trajectories -------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(
    ("solver", "calls"),
    [("heun", lambda n: 2 * n - 1), ("euler", lambda n: n), ("multistep", lambda n: n)],
)
def test_the_denoiser_is_called_as_often_as_promised(solver, calls, num_steps):
    counted = []

    def denoise(x, alpha, beta):
        jax.debug.callback(lambda: counted.append(1))
        return toy(x, alpha, beta)

    compiled(solver, num_steps, denoise=denoise)(normal())
    jax.effects_barrier()
    assert len(counted) == calls(num_steps)


@each_solver
def test_the_trajectory_runs_from_the_start_to_the_images(solver):
    images, states = compiled(solver, 4, return_trajectory=True)(normal())
    assert states.shape == (5, 3, *SIZE)
    np.testing.assert_allclose(states[0], 10.0 * normal(), rtol=1e-13)
    np.testing.assert_array_equal(states[-1], images)
    np.testing.assert_allclose(images, compiled(solver, 4)(normal()), atol=1e-12)


@each_solver
def test_the_last_step_returns_the_denoiser_and_the_missing_detail(solver):
    # From any state at t_min: D + (I - B)(D + R), also where the heads are not consistent.
    _, states = compiled(solver, 4, return_trajectory=True)(normal())
    blurry, residual = heads(np.asarray(states[-2]), 0.5 * 0.05, 0.05)
    clean = blurry + residual
    expected = blurry + clean - blur(clean, 0.5 * 0.05)
    np.testing.assert_allclose(states[-1], expected, atol=1e-12)


def test_defaults_are_edms_heun_with_eighteen_steps():
    images = jax.jit(lambda noise: sample(toy, noise, HOT))(normal())
    expected = edm_sampler(hot_toy, 10.0 * normal(), edm_times(0.05, 10.0, 18, 7.0))
    np.testing.assert_allclose(images, expected, atol=1e-11)


# --- seeds, batches, compilation -----------------------------------------------------------------


def test_initial_noise_is_standard_normal():
    noise = np.asarray(noise_of(np.arange(3000), SIZE))
    within_standard_errors(noise, np.zeros(SIZE), np.ones(SIZE))


@each_solver
def test_images_of_a_seed_do_not_depend_on_the_batch(solver):
    seeds = np.arange(8)
    whole = np.asarray(compiled(solver, 4)(noise_of(seeds, SIZE)))
    for size in (1, 3):
        part = compiled(solver, 4)(noise_of(seeds[5 : 5 + size], SIZE))
        np.testing.assert_allclose(part, whole[5 : 5 + size], atol=1e-12)


@each_solver
def test_jit_changes_nothing(solver):
    plain = sample(toy, normal(), WARM, solver=solver, num_steps=4)
    np.testing.assert_allclose(compiled(solver, 4)(normal()), plain, atol=1e-12)


@each_solver
def test_more_steps_do_not_trace_the_denoiser_more_often(solver):
    traces = []

    def denoise(x, alpha, beta):
        traces.append(1)
        return toy(x, alpha, beta)

    counts = []
    for num_steps in (3, 30):
        traces.clear()
        compiled(solver, num_steps, denoise=denoise).lower(normal())
        counts.append(len(traces))
    assert counts[0] == counts[1]


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


@each_solver
def test_float32_stays_float32(solver):
    with jax.enable_x64(False):
        images = compiled(solver, 2)(jnp.asarray(normal(), jnp.float32))
    assert images.dtype == jnp.float32


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


@each_solver
def test_sample_is_solve_along_the_time_grid(solver):
    grid = schedules.time_grid(WARM, 4)
    run = jax.jit(lambda x, grid: jax_solve(toy, x, WARM, grid, solver=solver))
    expected = compiled(solver, 4)(normal())
    np.testing.assert_allclose(run(10.0 * normal(), grid), expected, atol=1e-11)


@pytest.mark.parametrize("t", [4.0, np.array([0.5, 4.0, 9.0])])
def test_a_draw_of_gaussian_data_has_its_marginal(t):
    # An affine function of the noise, per frequency: mean and standard deviation of the marginal.
    mean, variance = DATA.marginal(0.5 * t, t)
    x = gaussian_start(normal(), WARM, t, DATA.mean, DATA.spectrum)
    np.testing.assert_allclose(dct(x), mean + np.sqrt(variance) * dct(normal()), atol=1e-12)


@each_solver
def test_from_a_gaussian_start_fine_times_draw_gaussian_data(solver):
    # Exact flow all the way: the images are mu + S^1/2 noise in the DCT basis, whatever the start.
    times = np.geomspace(3.0, 1e-4, 400)
    start = gaussian_start(normal(), WARM, times[0], DATA.mean, DATA.spectrum)
    images = jax_solve(EXACT, start, WARM, times, solver=solver)
    expected = idct(dct(DATA.mean[None]) + np.sqrt(DATA.spectrum) * dct(normal()))
    np.testing.assert_allclose(images, expected, atol=0.05 if solver == "euler" else 2e-3)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([3.0], r"times must be two or more, \[n \+ 1\] or \[n \+ 1, 3\], got \(1,\)"),
        ([[3.0, 1.0], [2.0, 0.0]], r"got \(2, 2\)"),
        ([3.0, 1.0, 1.0], "times must fall from at most t_max = 10.0 to at least 0"),
        ([3.0, -1.0], "times must fall"),
        ([11.0, 1.0], "times must fall"),
        ([3.0, np.nan, 1.0], "times must fall"),
    ],
)
def test_times_that_do_not_work_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        jax_solve(toy, normal(), WARM, times)


# --- compilation ---------------------------------------------------------------------------------


def test_a_sweep_over_ratios_compiles_once():
    compilations = []

    @jax.jit
    def run(noise, path):
        compilations.append(path)
        return sample(toy, noise, path, num_steps=3)

    for bnr in np.linspace(0.0, 2.0, 8):
        path = schedules.constant_bnr(float(bnr), **RANGE)
        np.testing.assert_allclose(
            run(normal(), path), compiled("heun", 3, path)(normal()), atol=1e-10
        )
    assert len(compilations) == 1
    assert run._cache_size() == 1


# --- churn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "churn"), [("euler", 0.0), ("heun", 0.0), ("heun", Churn(40.0, s_min=20.0))]
)
def test_no_churn_is_the_deterministic_sampler(solver, churn):
    images = compiled(solver, 4, churn=churn)(normal(), jax.random.key(0))
    np.testing.assert_allclose(images, compiled(solver, 4)(normal()), atol=1e-12)


@pytest.mark.parametrize(
    ("churn", "low", "high"), [(1.5, 0.0, np.inf), (40.0, 0.0, np.inf), (1.5, 0.2, 4.0)]
)
def test_without_blur_churn_raises_the_level_as_edm_does(churn, low, high):
    # Algorithm 2 with S_noise = 0: all but the noise itself, which is random.
    run = compiled("heun", 6, HOT, churn=Churn(churn, low, high, s_noise=0.0))
    times = edm_times(0.05, 10.0, 6, 7.0)
    expected = edm_sampler(hot_toy, 10.0 * normal(), times, churn, low, high)
    np.testing.assert_allclose(run(normal(), jax.random.key(0)), expected, atol=1e-11)


def churned_moments(num_steps, churn):
    """Mean and variance of euler's images of Gaussian data with churn: affine, per frequency."""
    t = edm_times(0.05, 10.0, num_steps, 7.0)
    gamma = min(churn / num_steps, np.sqrt(2) - 1)
    mean, variance = np.zeros(SIZE), np.full(SIZE, 10.0**2)
    for start, end in itertools.pairwise(t):
        raised = (1 + gamma) * start
        r = transfer(0.5 * raised, *SIZE[:-1]) / transfer(0.5 * start, *SIZE[:-1])
        mean, variance = r * mean, r**2 * variance + raised**2 - r**2 * start**2
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
    run = compiled("euler", 8, WARM, EXACT, churn=6.0)
    images = run(normal(3000), jax.random.key(0))
    within_standard_errors(dct(images), *churned_moments(8, 6.0))


def test_churn_keeps_the_marginals_of_the_data():
    # Heun with 40 steps; 5 standard errors of 3,000 images (13 % of the variance).
    run = compiled("heun", 40, WARM, EXACT, churn=40.0)
    images = run(normal(3000), jax.random.key(0))
    within_standard_errors(dct(images), dct(DATA.mean[None])[0], DATA.spectrum)


def test_churn_noise_is_proportional_to_s_noise():
    # On Gaussian data every step is affine in the noise.
    @jax.jit
    def run(s_noise):
        churn, key = Churn(2.0, s_noise=s_noise), jax.random.key(0)
        return sample(EXACT, normal(), WARM, solver="euler", num_steps=4, churn=churn, key=key)

    none, one, two = (run(s_noise) for s_noise in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(two - none, 2 * (one - none), atol=1e-11)


def test_churn_is_random():
    run = compiled("heun", 4, churn=20.0)
    first, second = (run(normal(), jax.random.key(seed)) for seed in (0, 1))
    assert np.all(np.abs(first - second) > 0)


def test_churn_draws_anew_for_every_image():
    same = np.repeat(normal(1), 3, axis=0)
    first, second, third = compiled("heun", 4, churn=20.0)(same, jax.random.key(0))
    assert np.all((first != second) & (second != third) & (third != first))


def test_keys_per_image_make_churn_independent_of_the_batch():
    keys, run = jax.random.split(jax.random.key(0), 3), compiled("heun", 4, churn=20.0)
    whole, part = run(normal(), keys), run(normal()[2:], keys[2:])
    np.testing.assert_allclose(part, whole[2:], atol=1e-12)


def test_one_key_gives_an_image_the_same_noise_in_any_batch():
    run = compiled("heun", 4, churn=20.0)
    whole, part = (run(normal()[:n], jax.random.key(0)) for n in (3, 2))
    np.testing.assert_allclose(part, whole[:2], atol=1e-12)


def test_old_style_keys_are_keys():
    run = compiled("heun", 4, churn=20.0)
    old, new = (run(normal(), make(0)) for make in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("path", [
    schedules.hot, lambda: schedules.constant_bnr(2.0), schedules.any_bnr, schedules.cold,
    schedules.blurring_diffusion, lambda: schedules.spectral(DATA.spectrum[..., 0]),
], ids=["hot", "constant_bnr", "any_bnr", "cold", "blurring_diffusion", "spectral"])  # fmt: skip
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_churn_is_finite_on_every_path_in_float32(path, solver):
    # Levels that rise by less than rounding once fell by an ulp, which made noise of variance < 0.
    path = path()
    image = jnp.full((1, *SIZE), 0.25, jnp.float32)
    with jax.enable_x64(False):
        denoise, noise = oracle.mixture(image), jnp.asarray(normal(), jnp.float32)

        @jax.jit
        def run(noise, churn):
            times = schedules.time_grid(path, 32)
            x = gaussian_start(noise, path, path.t_max, image[0], jnp.zeros(SIZE[:-1], jnp.float32))
            return jax_solve(
                denoise, x, path, times, solver=solver, churn=churn, key=jax.random.key(0)
            )

        for churn in (Churn(0.0), Churn(40.0, 0.05, 50.0), Churn(100.0)):
            found = run(noise, jax.tree.map(jnp.float32, churn))
            np.testing.assert_allclose(found, np.full(found.shape, 0.25), atol=1e-3)


# --- mistakes ------------------------------------------------------------------------------------

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "one of euler, heun, multistep, got 'rk4'"),
        ({"noise": np.zeros((5, 4))}, r"noise must be \[B, \*spatial, C\], got \(5, 4\)"),
        ({"noise": (3, *SIZE)}, "noise must be one array .* a tuple"),
        ({"churn": 1.0}, "pass key="),
        ({"churn": 1.0, "key": 0}, "key must be a JAX PRNG key, .* got 0"),
        ({"churn": -1.0, "key": KEY}, "s_churn >= 0, got -1"),
        ({"churn": np.nan, "key": KEY}, "s_churn >= 0, got nan"),
        ({"churn": 1.0, "solver": "multistep", "key": KEY}, "not multistep"),
        ({"churn": 1.0, "key": jax.random.split(KEY, 2)}, r"one key or 3, got \(2,"),
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"schedule": schedules.constant_bnr}, "got constant_bnr: call it"),
        ({"schedule": 0.5}, r"a path, such as schedules.constant_bnr\(0.5\), got 0.5"),
        ({"schedule": schedules.cold()}, "does not hide the data: take samplers.solve"),
        ({"schedule": schedules.hot(beta_max=0.5)}, "does not hide the data"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(toy, **{"noise": normal(), "schedule": WARM} | options)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_multistep_refuses_a_path_of_constant_noise(transform):
    path = schedules.cold()
    run = transform(lambda x: jax_solve(toy, x, path, [9.0, 1.0], solver="multistep"))
    with pytest.raises(ValueError, match="noise level that falls at every step"):
        run(normal())


@pytest.mark.parametrize("seeds", [[2**31, 2**32 - 1], np.array([7]), np.array([7], np.uint8)])
def test_a_seed_is_the_same_in_every_type(seeds):
    for seed, noise in zip(seeds, initial_noise(seeds, SIZE), strict=True):
        alone = jax.random.normal(jax.random.key(np.uint32(seed)), SIZE, np.float32)
        np.testing.assert_array_equal(noise, alone)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (np.zeros(3), r"integers \[B\], got float64 \(3,\)"),
        (np.zeros((2, 2), int), r"got int64 \(2, 2\)"),
        (7, r"got int64 \(\)"),
        ([-1], "between 0 and 2\\^32 - 1, got -1 to -1"),
        (np.array([2**32 + 7]), "got 4294967303"),
        ([2**64], "got 18446744073709551616"),
        (["a"], "integers"),
    ],
)
def test_seeds_that_are_none_are_refused(seeds, message):
    for door in (_seeds, lambda seeds: initial_noise(seeds, SIZE)):
        with pytest.raises(ValueError, match=message):
            door(seeds)
