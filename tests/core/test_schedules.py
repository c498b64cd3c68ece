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
from warm_diffusion import oracle, schedules, spectra
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
    "constant_bnr with levels": lambda: schedules.constant_bnr(3.0, beta_min=0.1, beta_max=5.0),
    "cold": schedules.cold,
    "blurring_diffusion": schedules.blurring_diffusion,
    "spectral": lambda: schedules.spectral(natural_spectrum(5, 4)),
    "spectral of rough data": lambda: schedules.spectral(rough_spectrum()),
    "any_bnr": schedules.any_bnr,
    "from_functions": lambda: from_functions(half, same, t_min=0.002, t_max=80.0),
}


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request):
    return request.param()


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        ("hot", lambda t: 0 * t, lambda t: t),
        ("constant_bnr", lambda t: 0.5 * t, lambda t: t),
        ("cold", lambda t: t, lambda t: 0.01 + 0 * t),
        ("any_bnr", lambda t: 0.5 * t, lambda t: t),
        (
            # arXiv 2209.05557, app. A: alpha^2 = cos^2, sigma^2 = sin^2 of an angle linear in t
            # between log-SNR 10 and -10, sigma_blur = 20 sin^2(pi t / 2); beta = sigma / alpha.
            "blurring_diffusion",
            lambda t: 20 * np.sin(np.pi * t / 2) ** 2,
            lambda t: np.tan((1 - t) * np.arctan(np.exp(-5)) + t * np.arctan(np.exp(5))),
        ),
    ],
)
def test_levels_follow_the_papers_definition(name, alpha, beta):
    path = PATHS[name]()
    t = np.linspace(path.t_min, path.t_max, 7).reshape(1, 7)
    np.testing.assert_allclose(path.alpha(t), alpha(t), rtol=1e-13)
    np.testing.assert_allclose(path.beta(t), beta(t), rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "t_min", "t_max"),
    [
        ("hot", 0.002, 80.0),
        ("constant_bnr", 0.002, 80.0),
        ("spectral", 0.002, 80.0),
        ("any_bnr", 0.002, 80.0),
        ("cold", 0.5, 24.0),
        ("blurring_diffusion", 0.001, 1.0),
    ],
)
def test_default_ranges_are_the_published_ones(name, t_min, t_max):
    # EDM's table 1 (sigma_min, sigma_max); inverse heat dissipation's CIFAR-10 blur.
    path = PATHS[name]()
    assert (path.t_min, path.t_max) == (t_min, t_max)


def test_time_zero_is_the_clean_image(path):
    assert path.alpha(0.0) == 0
    assert path.beta(0.0) == 0


def test_levels_never_fall(path):
    t = np.concatenate([[0.0], np.geomspace(path.t_min, path.t_max, 50)])
    assert np.all(np.diff(path.alpha(t)) >= 0)
    assert np.all(np.diff(path.beta(t)) >= 0)


def test_levels_are_differentiable(path):
    # Central differences.
    for t in np.geomspace(1.01 * path.t_min, 0.99 * path.t_max, 5):
        step = 1e-6 * t
        for level in (path.alpha, path.beta):
            expected = (level(t + step) - level(t - step)) / (2 * step)
            np.testing.assert_allclose(jax.grad(level)(t), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hot", [0.0, 0.0]), ("constant_bnr", [0.5, 0.5]), ("cold", [100.0, 1000.0])],
)
def test_bnr_is_blur_over_noise(name, expected):
    # alpha / beta at t = 1 and 10; cold: t / 0.01.
    ratios = PATHS[name]().bnr(np.array([1.0, 10.0]))
    np.testing.assert_allclose(ratios, expected, rtol=1e-14)


# --- values --------------------------------------------------------------------------------------


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


def test_hot_is_the_ratio_zero():
    assert schedules.hot() == schedules.constant_bnr(0.0)


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


def test_blurring_diffusion_ends_at_its_published_levels():
    # Log-SNR -10 is beta = e^5 = 148.4; blur 20 pixels on CIFAR-10.
    path = schedules.blurring_diffusion()
    np.testing.assert_allclose(path.beta(1.0), math.exp(5), rtol=1e-11)
    np.testing.assert_allclose(path.alpha(1.0), 20.0, rtol=1e-14)


def test_blurring_diffusion_stays_at_its_end():
    # Past t = 1 the sine would fall and the tangent turn negative; churn asks for such times.
    path = schedules.blurring_diffusion()
    for level in (path.alpha, path.beta):
        np.testing.assert_allclose(level(1.3), level(1.0), rtol=1e-14)
    # but at the end itself the noise still rises: d tan(a t) / dt = a / cos^2
    angle = np.arctan(np.exp(5)) - np.arctan(np.exp(-5))
    expected = angle * (1 + math.exp(5) ** 2)
    np.testing.assert_allclose(jax.grad(path.beta)(1.0), expected, rtol=1e-9)


# --- sampling ------------------------------------------------------------------------------------

DATA = gaussian_data(5, 4, 2)


@pytest.mark.parametrize(
    ("name", "rho"),
    [(name, {"cold": math.inf, "blurring_diffusion": 1.0}.get(name, 7.0)) for name in PATHS],
)
def test_sampling_gaussian_data_along_the_path_ends_in_the_exact_image(name, rho):
    # Method section 7: the flow from x(T) to t_min, then the posterior mean. Heun's error falls
    # by 4 as the steps double: at 64 and 128 steps it is below 0.04 and 0.01 of images of size 3.
    path, exact = PATHS[name](), oracle.gaussian(DATA.mean, DATA.spectrum)
    top, bottom = ((float(path.alpha(t)), float(path.beta(t))) for t in (path.t_max, path.t_min))
    mean, variance = DATA.marginal(*top)
    start = np.random.default_rng(0).standard_normal((3, 5, 4, 2))
    start = idct(mean + np.sqrt(variance) * start)
    state = DATA.flow(start, top, bottom)
    expected = sum(DATA.posterior_means(state, *bottom))
    for num_steps, tolerance in ((64, 0.05), (128, 0.0125)):
        run = jax.jit(
            lambda x, n=num_steps: solve(exact, x, path, schedules.time_grid(path, n, rho))
        )
        np.testing.assert_allclose(run(start), expected, atol=tolerance)


# --- training distribution -----------------------------------------------------------------------


def levels(path, which=1):
    """20,000 levels in training, float64: the noise, or by 0 the blur."""
    drawn = path.sample_levels(jax.random.key(0), (20_000,))
    return np.asarray(drawn[which], np.float64)


@pytest.mark.parametrize(
    ("options", "mean", "std"), [({}, -1.2, 1.2), ({"p_mean": 0.3, "p_std": 0.5}, 0.3, 0.5)]
)
def test_noise_levels_in_training_are_log_normal(options, mean, std):
    # EDM, table 1: ln sigma ~ N(P_mean, P_std^2).
    path = schedules.constant_bnr(0.5, **options)
    logs = np.log(levels(path))
    assert abs(logs.mean() - mean) < 5 * std / math.sqrt(logs.size)
    assert abs(logs.std() / std - 1) < 5 / math.sqrt(2 * logs.size)
    assert scipy.stats.kstest(logs, scipy.stats.norm(mean, std).cdf).pvalue > 1e-4


def test_hot_trains_at_edms_levels():
    logs = np.log(levels(schedules.hot()))
    assert scipy.stats.kstest(logs, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


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


# --- any_bnr -------------------------------------------------------------------------------------


def test_any_bnr_trains_at_log_uniform_ratios_and_a_share_of_none():
    path = schedules.any_bnr(0.5, (0.2, 5.0), hot_share=0.3)
    alpha, beta = path.sample_levels(jax.random.key(0), (20_000,))
    ratios = np.asarray(alpha, np.float64) / np.asarray(beta, np.float64)
    share = np.mean(ratios == 0)
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / ratios.size)
    uniform = np.log(ratios[ratios > 0] / 0.2) / np.log(5.0 / 0.2)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert -1e-6 <= uniform.min() < 1e-3 < 1 - 1e-3 < uniform.max() <= 1 + 1e-6


def test_any_bnr_draws_noise_levels_as_ever_and_apart_from_the_ratio():
    path = schedules.any_bnr(hot_share=0.0, p_mean=0.3, p_std=0.5)
    alpha, beta = path.sample_levels(jax.random.key(0), (20_000,))
    assert scipy.stats.kstest(np.log(beta), scipy.stats.norm(0.3, 0.5).cdf).pvalue > 1e-4
    correlation = np.corrcoef(np.log(beta), np.log(alpha / beta))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(20_000)


# --- spectral ------------------------------------------------------------------------------------

T = np.geomspace(0.002, 80.0, 200)


def power_law(gamma, size, scale=0.3):
    """S = scale f^-gamma with lambda = f^2; DC, of which no blur takes anything: 1."""
    eigen = eigenvalues(*size)
    return np.divide(scale, eigen ** (gamma / 2), out=np.ones_like(eigen), where=eigen > 0)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (12, 20)])
@pytest.mark.parametrize("attenuation", [0.01, 0.05, 0.5])
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


@pytest.mark.parametrize("attenuation", [0.01, 0.05, 0.3])
def test_blur_takes_no_more_than_the_attenuation_of_what_is_still_visible(attenuation):
    # And in some ring as much: up to the rounding of the corners.
    spectrum = rough_spectrum()
    worst = worst_attenuation(schedules.spectral(spectrum, attenuation), spectrum)
    assert 0.85 * attenuation < worst < 1.25 * attenuation


def digits_spectrum():
    from sklearn.datasets import load_digits

    return np.asarray(spectra.power_spectrum(load_digits().images[..., None] / 8 - 1))


def test_the_digits_have_a_spectral_path_near_their_recommended_ratio():
    # recommend_bnr is the ratio for the worst ring: the path goes from about there upwards.
    spectrum = digits_spectrum()
    path, ratio = schedules.spectral(spectrum), spectra.recommend_bnr(spectrum)
    assert np.all(np.diff(path.alpha(T)) > 0)
    assert ratio < path.bnr(T).min() < path.bnr(T).max() < 2 * ratio


def test_a_path_may_be_chosen_by_the_data_inside_a_jitted_function():
    spectrum = rough_spectrum()
    chosen = jax.jit(
        lambda t: (schedules.spectral(spectrum).alpha(t), spectra.recommend_bnr(spectrum) * t)
    )(0.7)
    expected = schedules.spectral(spectrum).alpha(0.7), spectra.recommend_bnr(spectrum) * 0.7
    np.testing.assert_allclose(chosen, expected, rtol=1e-12)


def test_one_frequency_alone_decides_everywhere():
    spectrum = np.zeros((6, 6))
    spectrum[0, 2] = 0.7
    path = schedules.spectral(spectrum)
    np.testing.assert_allclose(path.bnr(T), np.full(T.size, path.bnr(1.0)), rtol=1e-12)


# --- needs_start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (schedules.hot, False),
        (lambda: schedules.constant_bnr(0.5), False),
        (lambda: schedules.spectral(natural_spectrum(5, 4)), False),
        (schedules.any_bnr, False),
        (schedules.blurring_diffusion, False),
        (schedules.cold, True),
        (lambda: schedules.hot(beta_max=1.0), False),
        (lambda: schedules.hot(beta_max=0.99), True),
    ],
)
def test_a_start_is_needed_where_the_noise_stays_below_the_images(path, expected):
    assert path().needs_start is expected


def test_a_start_is_known_to_be_needed_inside_a_jitted_function():
    path, seen = schedules.cold(), []
    jax.jit(lambda x: seen.append(path.needs_start) or x)(1.0)
    assert seen == [True]


# --- from_functions ------------------------------------------------------------------------------

LINEAR = from_functions(half, same, t_min=0.002, t_max=80.0)
SQUARE = from_functions(jnp.sqrt, lambda t: t**2, t_min=0.04, t_max=9.0)


@pytest.mark.parametrize("path", [LINEAR, SQUARE], ids=["t", "t^2"])
def test_any_rising_noise_is_trained_at_edms_levels(path):
    # ln beta ~ N(-1.2, 1.2^2) whatever beta(t) is; 9^2 and 0.04^2 are 4 deviations away.
    logs = np.log(levels(path))
    assert scipy.stats.kstest(logs, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


def test_levels_beyond_the_path_are_trained_at_its_ends():
    # P(ln beta < ln 0.2) of the normal distribution, within 5 standard errors; likewise above.
    path = from_functions(lambda t: 0.0, lambda t: t, t_min=0.2, t_max=1.0, p_mean=-1.0, p_std=0.8)
    t = levels(path)
    normal = scipy.stats.norm(-1.0, 0.8)
    for end, share in ((0.2, normal.cdf(math.log(0.2))), (1.0, normal.sf(0.0))):
        found = np.mean(np.isclose(t, end, rtol=1e-5))
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / t.size)


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd], ids=["grad", "jvp"])
def test_at_the_clean_image_levels_and_their_derivatives_are_finite(derivative):
    # d sqrt(t) / dt and 1 / t are not, at 0.
    path = from_functions(jnp.sqrt, lambda t: jnp.exp(-1 / t), t_min=0.05, t_max=9.0)
    for level in (path.alpha, path.beta):
        assert level(0.0) == 0
        assert derivative(level)(0.0) == 0
    np.testing.assert_allclose(derivative(path.alpha)(4.0), 1 / 4, rtol=1e-14)


def test_a_bare_number_is_a_constant_level():
    t = np.array([[0.0, 1.0], [2.0, 3.0]])
    path = from_functions(lambda t: 0.3, lambda t: t, t_min=0.1, t_max=9.0)
    np.testing.assert_array_equal(path.alpha(t), [[0.0, 0.3], [0.3, 0.3]])


def test_noise_that_stays_needs_times_to_train_at():
    def beta(t):
        return jnp.minimum(t, 1.0)

    with pytest.raises(ValueError, match=r"beta must be > 0 and rise .* pass sample_time="):
        from_functions(lambda t: t, beta, t_min=0.1, t_max=9.0)
    path = from_functions(
        lambda t: t, beta, t_min=0.1, t_max=9.0, sample_time=lambda key, shape: jnp.ones(shape)
    )
    np.testing.assert_array_equal(path.sample_levels(jax.random.key(0), (2,))[1], [1.0, 1.0])


def test_functions_may_be_of_a_traced_number():
    @jax.jit
    def level(power):
        path = from_functions(lambda t: t, lambda t: t**power, t_min=0.04, t_max=9.0)
        return path.sample_levels(jax.random.key(0), (1000,))[1]

    known = from_functions(lambda t: t, lambda t: t**2, t_min=0.04, t_max=9.0)
    expected = known.sample_levels(jax.random.key(0), (1000,))[1]
    np.testing.assert_allclose(level(2.0), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 0.0}, "got t_min=0.0"),
        ({"t_max": jnp.inf}, "t_max < infinity"),
        ({"alpha": 0.3}, "alpha must be a function of t, got 0.3: lambda t: 0.3"),
        ({"alpha": lambda t: 9 - t}, "alpha must never fall as t rises, got"),
        ({"alpha": lambda t: -t}, "alpha must be finite and >= 0"),
        ({"alpha": lambda t: jnp.where(t > 5, jnp.nan, t)}, "alpha must be finite"),
        ({"beta": lambda t: 0 * t}, "beta must be finite and > 0"),
        ({"beta": lambda t: 2 - t / 8}, "beta must never fall .* then"),
        ({"beta": lambda t: jnp.minimum(t, 1.0)}, "beta must be > 0 and rise .* sample_time="),
        ({"sample_time": lambda key, shape: jnp.ones(())}, "8 finite times > 0, got 1.0"),
        ({"sample_time": lambda key, shape: jnp.zeros(shape)}, r"times > 0, got \[0. 0."),
        ({"sample_time": lambda key, shape: jnp.full(shape, jnp.nan)}, r"got \[nan nan"),
    ],
)
def test_functions_that_make_no_path_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_functions(**{"alpha": jnp.sqrt, "beta": jnp.sqrt, "t_min": 0.1, "t_max": 8} | options)


@pytest.mark.parametrize(("fall", "allowed"), [(1e-6, True), (1e-4, False)])
def test_a_fall_no_larger_than_rounding_is_no_fall(fall, allowed):
    def alpha(t):
        return jnp.where(t > 7, 7 * (1 - fall), 7.0)

    if allowed:
        from_functions(alpha, same, t_min=0.1, t_max=9.0)
    else:
        with pytest.raises(ValueError, match="never fall"):
            from_functions(alpha, same, t_min=0.1, t_max=9.0)


def test_rules_hold_inside_a_jitted_function_too():
    with pytest.raises(ValueError, match="alpha must be finite and >= 0"):
        jax.jit(lambda t: from_functions(lambda t: -t, same, t_min=0.1, t_max=9.0).alpha(t))(1.0)


# --- time grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 18])
def test_time_grid_is_edms(path, num_steps, rho):
    expected = edm_times(path.t_min, path.t_max, num_steps, rho)
    grid = schedules.time_grid(path, num_steps, rho)
    np.testing.assert_allclose(grid, expected, rtol=1e-12)


@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
def test_time_grid_runs_from_t_max_through_t_min_to_zero(path, rho):
    grid = schedules.time_grid(path, 9, rho)
    assert grid.shape == (10,)
    np.testing.assert_allclose(grid[0], path.t_max, rtol=1e-13)
    np.testing.assert_allclose(grid[-2], path.t_min, rtol=1e-11)  # 80 - (80 - 0.002)
    assert grid[-1] == 0


@pytest.mark.parametrize("rho", [1.0, 7.0, math.inf])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 256])
def test_time_grid_falls_at_every_step(path, num_steps, rho):
    assert np.all(np.diff(schedules.time_grid(path, num_steps, rho)) < 0)


def test_default_spacing_is_edms_rho_of_seven():
    path = schedules.hot()
    np.testing.assert_allclose(
        schedules.time_grid(path, 18), edm_times(0.002, 80.0, 18, 7.0), rtol=1e-12
    )


def test_infinite_rho_is_geometric(path):
    grid = np.asarray(schedules.time_grid(path, 8, math.inf))[:-1]
    expected = (path.t_min / path.t_max) ** (1 / 7)
    np.testing.assert_allclose(grid[1:] / grid[:-1], expected, rtol=1e-12)


def test_one_step_goes_from_t_max_to_the_clean_image(path):
    np.testing.assert_allclose(schedules.time_grid(path, 1), [path.t_max, 0.0], rtol=1e-13)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bnr", [-0.1, math.nan])
def test_a_ratio_below_zero_is_refused(bnr):
    with pytest.raises(ValueError, match=f"bnr must be >= 0, got {bnr}"):
        schedules.constant_bnr(bnr)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: schedules.hot(beta_min=0.0),
            "0 < beta_min < beta_max < infinity, got beta_min=0.0",
        ),
        (lambda: schedules.hot(beta_min=2.0, beta_max=1.0), "got beta_min=2.0, beta_max=1.0"),
        (
            lambda: schedules.cold(alpha_min=-1.0),
            "alpha_min < alpha_max < infinity, got alpha_min=-1",
        ),
        (lambda: schedules.cold(alpha_min=3.0, alpha_max=3.0), "alpha_min=3.0, alpha_max=3.0"),
        (lambda: schedules.cold(beta=0.0), "beta must be > 0.*got 0.0"),
        (lambda: schedules.blurring_diffusion(sigma_blur_max=-1.0), "sigma_blur_max .* got -1.0"),
        (lambda: schedules.blurring_diffusion(log_snr_max=0.0), "log_snr_max must be > 0, got 0.0"),
        (lambda: schedules.blurring_diffusion(t_min=1.0), "got t_min=1.0, t_max=1.0"),
        (lambda: schedules.spectral(np.ones((4, 4)), beta_min=90.0), "got beta_min=90.0"),
        (lambda: schedules.spectral(np.ones((4, 4)), 1.0), "between 0 and 1, got 1.0"),
        (lambda: schedules.spectral(1.0), r"spectrum \[\*spatial\] >= 0, got shape \(\)"),
        (lambda: schedules.spectral(np.eye(1, 16).reshape(4, 4)), "no detail to blur"),
        (lambda: schedules.any_bnr(bnr_range=(0.0, 1.0)), r"got bnr_range\[0\]=0.0"),
        (lambda: schedules.any_bnr(hot_share=1.5), "hot_share .* got 1.5"),
    ],
)
def test_levels_out_of_order_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_grid_without_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be an integer >= 1, got {num_steps}"):
        schedules.time_grid(schedules.hot(), num_steps)


@pytest.mark.parametrize("rho", [0.5, 0.0, -7.0, math.nan])
def test_a_rho_below_one_is_refused(rho):
    with pytest.raises(ValueError, match=f"rho must be at least 1, got {rho}"):
        schedules.time_grid(schedules.hot(), 4, rho)
