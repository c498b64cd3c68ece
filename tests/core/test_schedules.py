"""Paths as values, their levels and training distributions, and EDM's time grid, typed anew."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.core.closed_forms import (
    edm_times,
    eigenvalues,
    gaussian_data,
    idct,
    natural_spectrum,
    rings,
    rough_spectrum,
)
from warm_diffusion import oracle, schedules
from warm_diffusion.samplers import solve
from warm_diffusion.schedules import from_functions

pytestmark = pytest.mark.usefixtures("x64")


def half(t):
    return 0.5 * t


def same(t):
    return t


PATHS = {
    "hot": schedules.hot,
    "constant_bnr": lambda: schedules.constant_bnr(0.5),
    "cold": schedules.cold,
    "blurring_diffusion": schedules.blurring_diffusion,
    "spectral": lambda: schedules.spectral(rough_spectrum()),
    "any_bnr": schedules.any_bnr,
    "from_functions": lambda: from_functions(half, same, t_min=0.002, t_max=80.0),
}


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request):
    return request.param()


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "ends"),
    [
        # The ranges: EDM's table 1 (sigma_min, sigma_max); inverse heat dissipation's blur.
        ("hot", lambda t: 0 * t, lambda t: t, (0.002, 80.0)),
        ("constant_bnr", lambda t: 0.5 * t, lambda t: t, (0.002, 80.0)),
        ("cold", lambda t: t, lambda t: 0.01 + 0 * t, (0.5, 24.0)),
        ("any_bnr", lambda t: 0.5 * t, lambda t: t, (0.002, 80.0)),
        (
            # arXiv 2209.05557, app. A: alpha^2 = cos^2, sigma^2 = sin^2 of an angle linear in t
            # between log-SNR 10 and -10, sigma_blur = 20 sin^2(pi t / 2); beta = sigma / alpha.
            "blurring_diffusion",
            lambda t: 20 * np.sin(np.pi * t / 2) ** 2,
            lambda t: np.tan((1 - t) * np.arctan(np.exp(-5)) + t * np.arctan(np.exp(5))),
            (0.001, 1.0),
        ),
    ],
)
def test_levels_follow_the_papers_definition_over_its_range(name, alpha, beta, ends):
    path = PATHS[name]()
    t = np.linspace(*ends, 7).reshape(1, 7)
    np.testing.assert_allclose(path.alpha(t), alpha(t), rtol=1e-13)
    np.testing.assert_allclose(path.beta(t), beta(t), rtol=1e-13)
    np.testing.assert_allclose(path.bnr(t), alpha(t) / beta(t), rtol=1e-13)
    assert (path.t_min, path.t_max) == ends


def test_levels_rise_from_the_clean_image_differentiably(path):
    t = np.concatenate([[0.0], np.geomspace(path.t_min, path.t_max, 50)])
    inner = np.geomspace(1.01 * path.t_min, 0.99 * path.t_max, 5)
    for level in (jax.jit(path.alpha), jax.jit(path.beta)):
        values = level(t)
        assert values[0] == 0
        assert np.all(np.diff(values) >= 0)
        # Central differences.
        step = 1e-6 * inner
        expected = (level(inner + step) - level(inner - step)) / (2 * step)
        slopes = jax.jit(jax.vmap(jax.grad(level)))(inner)
        np.testing.assert_allclose(slopes, expected, rtol=1e-8, atol=1e-10)


def test_equal_numbers_are_equal_paths(path):
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(path)))
    assert path == again
    assert hash(path) == hash(again)
    number, *_ = jax.tree.leaves(path)
    changed = jax.tree.map(lambda leaf: 2 * np.asarray(leaf) + 0.1, path)
    assert path != changed
    assert path != number


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (schedules.constant_bnr(0.5), schedules.constant_bnr(0.6)),
        (schedules.constant_bnr(0.5), schedules.any_bnr(0.5)),
        (schedules.hot(p_mean=-1.0), schedules.hot()),
        (schedules.spectral(natural_spectrum(5, 4)), schedules.spectral(natural_spectrum(6, 4))),
        (
            from_functions(half, same, t_min=0.1, t_max=9.0),
            from_functions(same, same, t_min=0.1, t_max=9.0),
        ),
    ],
)
def test_other_numbers_or_functions_are_other_paths(one, other):
    assert one != other
    assert schedules.hot() == schedules.constant_bnr(0.0)


def test_a_path_shows_its_numbers_by_the_names_that_they_are_given_by():
    shown = repr(schedules.constant_bnr(0.7, beta_max=9.0))
    assert "(bnr=0.7, beta_min=0.002, beta_max=9.0, p_mean=-1.2, p_std=1.2)" in shown


def test_whole_numbers_are_the_same_numbers_and_no_other_program():
    traces = []
    trace = jax.jit(lambda path: traces.append(path) or path.alpha(1.0))
    for bnr in (0, 0.5, 1.0, 1, -0.0):
        trace(schedules.constant_bnr(bnr, beta_max=80))
    assert len(traces) == 1
    assert hash(schedules.constant_bnr(0)) == hash(schedules.constant_bnr(-0.0))


def test_numbers_are_leaves_and_the_kind_is_not(path):
    traces = []

    @jax.jit
    def levels(path, t):
        traces.append(path)
        return path.alpha(t), path.beta(t), *path.sample_levels(jax.random.key(0), ())

    for scale in (1.0, 1.0001):
        scaled = jax.tree.map(lambda leaf: np.asarray(leaf) * scale, path)  # noqa: B023
        t = 0.9 * float(scaled.t_max)
        expected = scaled.alpha(t), scaled.beta(t), *scaled.sample_levels(jax.random.key(0), ())
        np.testing.assert_allclose(levels(scaled, t), expected, rtol=1e-5)
    assert len(traces) == 1


def test_paths_can_be_mapped_over():
    ratios = np.array([0.0, 0.5, 2.0])
    alphas = jax.vmap(lambda bnr: schedules.constant_bnr(bnr).alpha(4.0))(ratios)
    np.testing.assert_allclose(alphas, 4 * ratios, rtol=1e-14)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(schedules.constant_bnr, ratios))
    grids = jax.vmap(lambda path: schedules.time_grid(path, 5))(stacked)
    for grid in grids:
        np.testing.assert_allclose(grid, edm_times(0.002, 80.0, 5, 7.0), rtol=1e-10)


def test_blurring_diffusion_ends_at_its_published_levels_and_stays_there():
    # Log-SNR -10 is beta = e^5 = 148.4; blur 20 pixels on CIFAR-10.
    path = schedules.blurring_diffusion()
    # Past t = 1 the sine would fall and the tangent turn negative; churn asks for such times.
    for t in (1.0, 1.3):
        np.testing.assert_allclose(path.beta(t), math.exp(5), rtol=1e-11)
        np.testing.assert_allclose(path.alpha(t), 20.0, rtol=1e-14)
    # but at the end itself the noise still rises: d tan(a t) / dt = a / cos^2
    angle = np.arctan(np.exp(5)) - np.arctan(np.exp(-5))
    expected = angle * (1 + math.exp(5) ** 2)
    np.testing.assert_allclose(jax.grad(path.beta)(1.0), expected, rtol=1e-9)


DATA = gaussian_data(5, 4, 2)


@pytest.mark.parametrize(
    ("name", "rho"),
    [("cold", math.inf), ("blurring_diffusion", 1.0), ("spectral", 7.0), ("from_functions", 7.0)],
)
def test_sampling_gaussian_data_along_the_path_ends_in_the_exact_image(name, rho):
    # Method section 7: the flow from x(T) to t_min, then the posterior mean. Heun's error falls
    # by 4 as the steps double: at 128 steps it is below 0.01 of images of size 3.
    path, exact = PATHS[name](), oracle.gaussian(DATA.mean, DATA.spectrum)
    top, bottom = ((float(path.alpha(t)), float(path.beta(t))) for t in (path.t_max, path.t_min))
    mean, variance = DATA.marginal(*top)
    start = np.random.default_rng(0).standard_normal((3, 5, 4, 2))
    start = idct(mean + np.sqrt(variance) * start)
    state = DATA.flow(start, top, bottom)
    expected = sum(DATA.posterior_means(state, *bottom))
    run = jax.jit(lambda x: solve(exact, x, path, schedules.time_grid(path, 128, rho)))
    np.testing.assert_allclose(run(start), expected, atol=0.0125)


def levels(path, which=1):
    """20,000 levels in training, float64: the noise, or by 0 the blur."""
    drawn = path.sample_levels(jax.random.key(0), (20_000,))
    return np.asarray(drawn[which], np.float64)


def normal(*moments):
    return scipy.stats.norm(*moments).cdf


@pytest.mark.parametrize(
    ("path", "mean", "std"),
    [
        (schedules.hot(), -1.2, 1.2),
        (schedules.constant_bnr(0.5, p_mean=0.3, p_std=0.5), 0.3, 0.5),
        # Whatever beta(t) is; 9^2 and 0.04^2 are 4 deviations away.
        (from_functions(jnp.sqrt, lambda t: t**2, t_min=0.04, t_max=9.0), -1.2, 1.2),
    ],
)
def test_noise_levels_in_training_are_log_normal(path, mean, std):
    # EDM, table 1: ln sigma ~ N(P_mean, P_std^2).
    logs = np.log(levels(path))
    assert abs(logs.mean() - mean) < 5 * std / math.sqrt(logs.size)
    assert abs(logs.std() / std - 1) < 5 / math.sqrt(2 * logs.size)
    assert scipy.stats.kstest(logs, normal(mean, std)).pvalue > 1e-4


def test_cold_trains_log_uniformly_over_its_whole_range():
    path = schedules.cold(alpha_min=0.25, alpha_max=16.0)
    share = np.log(levels(path, 0) / 0.25) / np.log(16.0 / 0.25)
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    # Of n uniform numbers the ends are within 10 / n of the range's ends but with chance e^-10.
    assert -1e-6 <= share.min() < 10 / share.size
    assert 1 - 10 / share.size < share.max() <= 1 + 1e-6
    np.testing.assert_allclose(levels(path), np.full(20_000, 0.01), rtol=1e-6)


def test_blurring_diffusion_trains_uniformly_over_its_whole_range():
    # arXiv 2209.05557: t ~ U(0, 1); alpha = 20 sin^2(pi t / 2).
    path = schedules.blurring_diffusion(t_min=0.25)
    share = (np.arcsin(np.sqrt(levels(path, 0) / 20)) * 2 / np.pi - 0.25) / 0.75
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    assert -1e-3 <= share.min() < 1e-3
    assert 1 - 1e-3 < share.max() <= 1 + 1e-3


def test_levels_in_training_have_the_shape_that_was_asked_for_and_lie_on_the_path(path):
    alpha, beta = path.sample_levels(jax.random.key(0), (3, 2))
    assert alpha.shape == beta.shape == (3, 2)
    assert alpha.dtype == beta.dtype == np.float32
    other, _ = path.sample_levels(jax.random.key(1), (3, 2))
    if path != schedules.hot():
        assert np.any(alpha != other)
    if path.t_max == 80.0 and not isinstance(path, type(schedules.any_bnr())):
        np.testing.assert_allclose(alpha, path.alpha(beta), rtol=1e-5)


def test_any_bnr_trains_at_log_uniform_ratios_apart_from_the_noise_and_a_share_of_none():
    path = schedules.any_bnr(0.5, (0.2, 5.0), hot_share=0.3, p_mean=0.3, p_std=0.5)
    drawn = path.sample_levels(jax.random.key(0), (20_000,))
    alpha, beta = (np.asarray(level, np.float64) for level in drawn)
    assert scipy.stats.kstest(np.log(beta), normal(0.3, 0.5)).pvalue > 1e-4
    blurred = alpha > 0
    assert abs(np.mean(~blurred) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / alpha.size)
    uniform = np.log(alpha[blurred] / beta[blurred] / 0.2) / np.log(5.0 / 0.2)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert -1e-6 <= uniform.min() < 1e-3 < 1 - 1e-3 < uniform.max() <= 1 + 1e-6
    correlation = np.corrcoef(np.log(beta[blurred]), uniform)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(uniform.size)


T = np.geomspace(0.002, 80.0, 200)


def power_law(gamma, size, scale=0.3):
    """S = scale f^-gamma with lambda = f^2; DC, of which no blur takes anything: 1."""
    eigen = eigenvalues(*size)
    return np.divide(scale, eigen ** (gamma / 2), out=np.ones_like(eigen), where=eigen > 0)


@pytest.mark.parametrize(("size", "attenuation"), [((8, 8), 0.05), ((12, 20), 0.5)])
def test_a_spectrum_of_one_over_f_squared_gives_a_constant_ratio(size, attenuation):
    # exp(-lambda rho^2 S / 2) = 1 - attenuation with lambda S = 0.3 everywhere; 5 % is the promise.
    path = schedules.spectral(power_law(2.0, size), attenuation)
    expected = math.sqrt(-2 * math.log(1 - attenuation) / 0.3)
    np.testing.assert_allclose(path.bnr(T), np.full(T.size, expected), rtol=0.05)


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_another_power_law_gives_another_power_of_the_noise(gamma):
    # Method section 5: S ~ f^-gamma gives alpha ~ beta^(2 / gamma), between the noise levels at
    # which it takes over the highest and the lowest frequency.
    spectrum = power_law(gamma, (32, 32))
    low, high = np.sqrt(spectrum[-1, -1]), np.sqrt(spectrum[0, 1])
    t = np.geomspace(1.5 * low, high / 1.5, 20)
    slope = np.polyfit(np.log(t), np.log(schedules.spectral(spectrum).alpha(t)), 1)[0]
    assert abs(slope - 2 / gamma) < 0.05 * 2 / gamma


def test_outside_the_data_the_ratio_stays():
    # Less noise than the weakest frequency has, more than the strongest.
    path = schedules.spectral(power_law(3.0, (8, 8)))
    for ends in ([0.002, 0.003, 0.01], [20.0, 50.0, 80.0]):
        ratios = np.asarray(path.bnr(np.array(ends)))
        np.testing.assert_allclose(ratios, ratios[:1].repeat(3), rtol=1e-6)
    assert path.bnr(0.002) > 1.5 * path.bnr(80.0)


def worst_attenuation(path, spectrum):
    """Largest share of a ring that blur has taken when noise reaches that ring's mean power."""
    ring, eigen = rings(*spectrum.shape), eigenvalues(*spectrum.shape)
    worst = 0.0
    for k in range(1, ring.max() + 1):
        power = np.mean(spectrum[ring == k]) if np.any(ring == k) else 0.0
        if power > 0:
            exponent = path.alpha(math.sqrt(power)) ** 2 / 2 / np.mean(1 / eigen[ring == k])
            worst = max(worst, float(1 - np.exp(-exponent)))
    return worst


@pytest.mark.parametrize("attenuation", [0.01, 0.3])
def test_blur_takes_no_more_than_the_attenuation_of_what_is_still_visible(attenuation):
    # And in some ring as much: up to the rounding of the corners.
    spectrum = rough_spectrum()
    worst = worst_attenuation(schedules.spectral(spectrum, attenuation), spectrum)
    assert 0.85 * attenuation < worst < 1.25 * attenuation


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (schedules.hot(), False),
        (schedules.spectral(natural_spectrum(5, 4)), False),
        (schedules.blurring_diffusion(), False),
        (schedules.cold(), True),
        (schedules.hot(beta_max=1.0), False),
        (schedules.hot(beta_max=0.99), True),
    ],
)
def test_a_start_is_needed_where_the_noise_stays_below_the_images(path, expected):
    seen = []
    jax.jit(lambda x: seen.append(path.needs_start) or x)(1.0)
    assert [path.needs_start, *seen] == [expected, expected]


def test_the_times_of_a_path_may_be_in_any_unit():
    seconds = from_functions(half, same, t_min=0.1, t_max=10.0)
    microseconds = from_functions(lambda t: half(t / 1e6), lambda t: t / 1e6, t_min=1e5, t_max=1e7)
    np.testing.assert_allclose(microseconds.alpha(3e6), seconds.alpha(3.0), rtol=1e-6)
    for ends in ((0.0, 1.0), (2.0, 1.0), (1.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="expected 0 < t_min < t_max"):
            from_functions(half, same, t_min=ends[0], t_max=ends[1])


def test_levels_beyond_the_path_are_trained_at_its_ends():
    # P(ln beta < ln 0.2) of the normal distribution, within 5 standard errors; likewise above.
    path = from_functions(lambda t: 0.0, lambda t: t, t_min=0.2, t_max=1.0, p_mean=-1.0, p_std=0.8)
    t = levels(path)
    below, above = normal(-1.0, 0.8)([math.log(0.2), 0.0])
    for end, share in ((0.2, below), (1.0, 1 - above)):
        found = np.mean(np.isclose(t, end, rtol=1e-5))
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / t.size)


def test_at_the_clean_image_levels_and_their_derivatives_are_finite():
    # d sqrt(t) / dt and 1 / t are not, at 0.
    path = from_functions(jnp.sqrt, lambda t: jnp.exp(-1 / t), t_min=0.05, t_max=9.0)
    for level in (path.alpha, path.beta):
        assert level(0.0) == jax.grad(level)(0.0) == jax.jacfwd(level)(0.0) == 0
    np.testing.assert_allclose(jax.grad(path.alpha)(4.0), 1 / 4, rtol=1e-14)


def test_a_bare_number_is_a_constant_level():
    t = np.array([[0.0, 1.0], [2.0, 3.0]])
    path = from_functions(lambda t: 0.3, lambda t: t, t_min=0.1, t_max=9.0)
    np.testing.assert_array_equal(path.alpha(t), [[0.0, 0.3], [0.3, 0.3]])


def test_noise_that_stays_is_trained_at_given_times():
    path = from_functions(
        same, lambda t: jnp.minimum(t, 1.0), t_min=0.1, t_max=9.0,
        sample_time=lambda key, shape: jnp.full(shape, 3.0),
    )  # fmt: skip
    np.testing.assert_array_equal(path.sample_levels(jax.random.key(0), (2,)), [[3, 3], [1, 1]])


def test_functions_may_be_of_a_traced_number():
    @jax.jit
    def level(power):
        path = from_functions(lambda t: t, lambda t: t**power, t_min=0.04, t_max=9.0)
        return path.sample_levels(jax.random.key(0), (1000,))[1]

    known = from_functions(lambda t: t, lambda t: t**2, t_min=0.04, t_max=9.0)
    expected = known.sample_levels(jax.random.key(0), (1000,))[1]
    np.testing.assert_allclose(level(2.0), expected, rtol=1e-4)


def test_time_grid_is_edms_and_runs_from_t_max_through_t_min_to_zero(path):
    for num_steps, rho in ((1, 7.0), (2, 1.0), (18, 7.0), (256, 3.0)):
        grid = schedules.time_grid(path, num_steps, rho)
        expected = edm_times(path.t_min, path.t_max, num_steps, rho)
        np.testing.assert_allclose(grid, expected, rtol=1e-11)
        assert np.all(np.diff(grid) < 0)
    np.testing.assert_array_equal(
        schedules.time_grid(path, 18), schedules.time_grid(path, 18, rho=7.0)
    )


def test_infinite_rho_is_geometric(path):
    grid = np.asarray(schedules.time_grid(path, 8, math.inf))
    expected = [*np.geomspace(path.t_max, path.t_min, 8), 0.0]
    np.testing.assert_allclose(grid, expected, rtol=1e-12)
