"""Paths, their training distributions and time grids, against EDM's formulas typed anew."""

import math

import jax
import numpy as np
import pytest
import scipy.stats

from tests.core.closed_forms import (
    edm_times,
    gaussian_data,
    idct,
    natural_spectrum,
    rough_spectrum,
)
from warm_diffusion import oracle, schedules
from warm_diffusion.samplers import sample

pytestmark = pytest.mark.usefixtures("x64")


PATHS = {
    "hot": schedules.hot,
    "constant_bnr": lambda: schedules.constant_bnr(0.5),
    "constant_bnr with levels": lambda: schedules.constant_bnr(3.0, beta_min=0.1, beta_max=5.0),
    "cold": schedules.cold,
    "blurring_diffusion": schedules.blurring_diffusion,
    "spectral": lambda: schedules.spectral(natural_spectrum(5, 4)),
    "spectral of rough data": lambda: schedules.spectral(rough_spectrum()),
    "any_bnr": schedules.any_bnr,
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
        ("cold", 0.5, 20.0),
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


def test_the_ratio_may_be_traced():
    ratio = jax.jit(lambda bnr: schedules.constant_bnr(bnr).alpha(4.0))(0.5)
    np.testing.assert_allclose(ratio, 2.0, rtol=1e-14)


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
        run = jax.jit(lambda x, n=num_steps: sample(exact, x, path, num_steps=n, rho=rho, start=x))
        np.testing.assert_allclose(run(start), expected, atol=tolerance)


# --- training distribution -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mean", "std"), [({}, -1.2, 1.2), ({"p_mean": 0.3, "p_std": 0.5}, 0.3, 0.5)]
)
def test_noise_levels_in_training_are_log_normal(options, mean, std):
    # EDM, table 1: ln sigma ~ N(P_mean, P_std^2).
    path = schedules.constant_bnr(0.5, **options)
    logs = np.log(path.sample_time(jax.random.key(0), (20_000,)))
    assert abs(logs.mean() - mean) < 5 * std / math.sqrt(logs.size)
    assert abs(logs.std() / std - 1) < 5 / math.sqrt(2 * logs.size)
    assert scipy.stats.kstest(logs, scipy.stats.norm(mean, std).cdf).pvalue > 1e-4


def test_hot_trains_at_edms_levels():
    logs = np.log(schedules.hot().sample_time(jax.random.key(1), (20_000,)))
    assert scipy.stats.kstest(logs, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


def test_cold_trains_log_uniformly_over_its_whole_range():
    path = schedules.cold(alpha_min=0.25, alpha_max=16.0)
    share = np.log(path.sample_time(jax.random.key(0), (20_000,)) / 0.25) / np.log(16.0 / 0.25)
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    # Of n uniform numbers the ends are within 10 / n of the range's ends but with chance e^-10.
    assert 0 <= share.min() < 10 / share.size
    assert 1 - 10 / share.size < share.max() <= 1


def test_blurring_diffusion_trains_uniformly_over_its_whole_range():
    # arXiv 2209.05557: t ~ U(0, 1).
    path = schedules.blurring_diffusion(t_min=0.25)
    share = (path.sample_time(jax.random.key(0), (20_000,)) - 0.25) / 0.75
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    assert 0 <= share.min() < 10 / share.size
    assert 1 - 10 / share.size < share.max() <= 1


def test_sampled_times_have_the_shape_that_was_asked_for(path):
    assert path.sample_time(jax.random.key(0), (3, 2)).shape == (3, 2)


def test_sampled_times_differ_between_keys(path):
    first, second = (path.sample_time(jax.random.key(i), (4,)) for i in (0, 1))
    assert np.all(first != second)


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
        (lambda: schedules.spectral(np.ones(4)), r"spectrum \[H, W\] >= 0, got shape \(4,\)"),
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
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        schedules.time_grid(schedules.hot(), num_steps)


@pytest.mark.parametrize("rho", [0.5, 0.0, -7.0, math.nan])
def test_a_rho_below_one_is_refused(rho):
    with pytest.raises(ValueError, match=f"rho must be at least 1, got {rho}"):
        schedules.time_grid(schedules.hot(), 4, rho)
