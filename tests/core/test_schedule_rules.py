"""What makes a path: the rules that a Schedule checks, paths of a user's functions, and by name."""

import dataclasses
import math
import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.core.closed_forms import natural_spectrum
from warm_diffusion import process, schedules
from warm_diffusion.denoiser import Prediction
from warm_diffusion.schedules import Schedule, from_functions

pytestmark = pytest.mark.usefixtures("x64")

GOOD = schedules.constant_bnr(0.5)
SPECTRUM = natural_spectrum(5, 4)


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"t_min": 0.0}, "0 < t_min < t_max < infinity, got t_min=0.0"),
        ({"t_min": -1.0}, "got t_min=-1.0"),
        ({"t_min": 80.0}, "got t_min=80.0, t_max=80.0"),
        ({"t_min": math.nan}, "got t_min=nan"),
        ({"t_max": math.inf}, "t_max=inf"),
        ({"alpha": lambda t: t + 0.1}, r"alpha\(0\) must be 0, the clean image, got 0.1"),
        ({"beta": lambda t: t + 0.1}, r"beta\(0\) must be 0, the clean image, got 0.1"),
        ({"beta": lambda t: np.exp(-1 / t) / t}, r"beta\(0\) must be 0.* got nan"),
        ({"alpha": lambda t: -t}, r"alpha must be finite and >= 0.* got -0.002 at t = 0.002"),
        ({"alpha": lambda t: np.where(t > 70, np.nan, t)}, "alpha must be finite .* got nan"),
        ({"beta": lambda t: np.where(t > 70, np.inf, t)}, "beta must be finite .* got inf"),
        ({"beta": lambda t: 0 * t}, "beta must be finite and > 0.* got 0 at t = 0.002"),
        ({"alpha": lambda t: t * (80 - t)}, "alpha must never fall as t rises, got"),
        ({"beta": lambda t: np.where(t > 5, 5 - t / 80, t)}, "beta must never fall .* then"),
        ({"alpha": lambda t: 0.5}, r"alpha\(t\) must have the shape of t, got \(\) for \(66,\)"),
        ({"sample_time": lambda key, shape: jnp.ones(())}, "8 finite times > 0, got 1.0"),
        ({"sample_time": lambda key, shape: jnp.zeros(shape)}, r"times > 0, got \[0. 0."),
        ({"sample_time": lambda key, shape: jnp.full(shape, jnp.nan)}, r"got \[nan nan"),
        ({"sample_time": lambda key, shape: jnp.full(shape, jnp.inf)}, r"got \[inf inf"),
    ],
)
def test_a_path_that_breaks_a_rule_is_refused(broken, message):
    parts = {field.name: getattr(GOOD, field.name) for field in dataclasses.fields(GOOD)}
    with pytest.raises(ValueError, match=message):
        Schedule(**parts | broken)


@pytest.mark.parametrize(("fall", "allowed"), [(1e-6, True), (1e-4, False)])
def test_a_fall_no_larger_than_rounding_is_no_fall(fall, allowed):
    def alpha(t):
        return np.where(t > 7, 7 * (1 - fall), np.where(t > 0, 7.0, 0.0))

    if allowed:
        dataclasses.replace(GOOD, alpha=alpha)
    else:
        with pytest.raises(ValueError, match="never fall"):
            dataclasses.replace(GOOD, alpha=alpha)


def test_levels_that_stay_are_a_path():
    # Neither strictly rising: no blur at all; noise that stops at 1.
    dataclasses.replace(GOOD, alpha=lambda t: 0 * t, beta=lambda t: np.minimum(t, 1.0))


def test_rules_cannot_see_traced_values_and_let_them_pass():
    # A ratio below zero breaks a rule; as do levels and ends that only the compiled program knows.
    @jax.jit
    def levels(bnr, t_max):
        path = schedules.constant_bnr(bnr)
        other = dataclasses.replace(path, beta=lambda t: bnr * t, t_max=t_max)
        return path.alpha(4.0), other.beta(4.0)

    np.testing.assert_allclose(levels(-0.5, -3.0), [-2.0, -2.0], rtol=1e-14)


def test_rules_hold_inside_a_jitted_function_too():
    with pytest.raises(ValueError, match="alpha must be finite and >= 0"):
        jax.jit(lambda t: dataclasses.replace(GOOD, alpha=lambda t: -t).alpha(t))(1.0)


def test_help_states_the_rules():
    text = pydoc.render_doc(Schedule)
    for rule in ("0 < t_min < t_max", "alpha(0) = beta(0) = 0", "never fall", "sample_time(key"):
        assert rule in text


# --- needs_start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (schedules.hot, False),
        (lambda: schedules.constant_bnr(0.5), False),
        (lambda: schedules.spectral(SPECTRUM), False),
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

LINEAR = from_functions(lambda t: 0.5 * t, lambda t: t, t_min=0.002, t_max=80.0)
SQUARE = from_functions(lambda t: jnp.sqrt(t), lambda t: t**2, t_min=0.04, t_max=9.0)


def test_two_lines_make_the_path_of_a_constant_ratio():
    t = np.append(0.0, np.geomspace(0.002, 80.0, 30))
    np.testing.assert_allclose(LINEAR.alpha(t), GOOD.alpha(t), rtol=1e-14)
    np.testing.assert_allclose(LINEAR.beta(t), GOOD.beta(t), rtol=1e-14)
    assert (LINEAR.t_min, LINEAR.t_max) == (GOOD.t_min, GOOD.t_max)


def test_two_lines_have_the_velocity_of_a_constant_ratio():
    x, blurry, residual = np.random.default_rng(0).standard_normal((3, 2, 6, 5, 1))
    one, other = (
        process.velocity(x, Prediction(blurry, residual), path, np.array([0.3, 7.0]))
        for path in (LINEAR, GOOD)
    )
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("path", [LINEAR, SQUARE], ids=["t", "t^2"])
def test_any_rising_noise_is_trained_at_edms_levels(path):
    # ln beta ~ N(-1.2, 1.2^2) whatever beta(t) is; 9^2 and 0.04^2 are 4 deviations away.
    logs = np.log(path.beta(path.sample_time(jax.random.key(0), (20_000,))))
    assert scipy.stats.kstest(logs, scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


def test_levels_beyond_the_path_are_trained_at_its_ends():
    # P(ln beta < ln 0.2) of the normal distribution, within 5 standard errors; likewise above.
    path = from_functions(lambda t: 0.0, lambda t: t, t_min=0.2, t_max=1.0, p_mean=-1.0, p_std=0.8)
    t = path.sample_time(jax.random.key(0), (20_000,))
    normal = scipy.stats.norm(-1.0, 0.8)
    for end, share in ((0.2, normal.cdf(math.log(0.2))), (1.0, normal.sf(0.0))):
        found = np.mean(np.isclose(t, end, rtol=1e-12))
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
    np.testing.assert_array_equal(path.sample_time(jax.random.key(0), (2,)), [1.0, 1.0])


def test_functions_may_be_of_a_traced_number():
    @jax.jit
    def level(power):
        path = from_functions(lambda t: t, lambda t: t**power, t_min=0.04, t_max=9.0)
        return jnp.log(path.beta(path.sample_time(jax.random.key(0), (1000,))))

    known = from_functions(lambda t: t, lambda t: t**2, t_min=0.04, t_max=9.0)
    expected = np.log(known.beta(known.sample_time(jax.random.key(0), (1000,))))
    np.testing.assert_allclose(level(2.0), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 0.0}, "got t_min=0.0"),
        ({"alpha": lambda t: 9 - t}, "alpha must never fall"),
        ({"beta": lambda t: 1 - t}, "beta must be > 0 and rise"),
    ],
)
def test_functions_that_make_no_path_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_functions(**{"alpha": jnp.sqrt, "beta": jnp.sqrt, "t_min": 0.1, "t_max": 8} | options)


# --- by_name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("hot", {"beta_max": 40.0}, lambda: schedules.hot(beta_max=40.0)),
        ("constant_bnr", {"bnr": 3.0}, lambda: schedules.constant_bnr(3.0)),
        (
            "any_bnr",
            {"bnr": 2, "bnr_range": [0.5, 4], "hot_share": 0.2, "p_mean": -1},
            lambda: schedules.any_bnr(2.0, (0.5, 4.0), 0.2, p_mean=-1.0),
        ),
        ("spectral", {"attenuation": 0.1}, lambda: schedules.spectral(SPECTRUM, 0.1)),
        (
            "blurring_diffusion",
            {"sigma_blur_max": 5, "t_min": 0.01},
            lambda: schedules.blurring_diffusion(sigma_blur_max=5.0, t_min=0.01),
        ),
        ("cold", {"beta": 0.02}, lambda: schedules.cold(beta=0.02)),
    ],
)
def test_a_name_and_its_numbers_are_the_path_of_that_function(name, numbers, expected):
    path, expected = schedules.by_name(name, SPECTRUM, **numbers), expected()
    t = np.geomspace(expected.t_min, expected.t_max, 9)
    assert (path.t_min, path.t_max) == (expected.t_min, expected.t_max)
    for level in ("alpha", "beta"):
        np.testing.assert_array_equal(getattr(path, level)(t), getattr(expected, level)(t))
    for one, other in zip(
        *(p.sample_levels(jax.random.key(0), (50,)) for p in (path, expected)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


LEVELS = "beta_max, beta_min"


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("warm", {}, "one of hot, constant_bnr, any_bnr, spectral, blurring_diffusion, cold, got"),
        ("hot", {"bnr_max": 1.0}, f"hot takes {LEVELS}, p_mean, p_std: .*'bnr_max'"),
        ("hot", {"bnr": 1.0}, f"hot takes {LEVELS}, p_mean, p_std: .*'bnr'"),
        ("constant_bnr", {}, f"constant_bnr takes {LEVELS}, bnr, p_mean, p_std: .*missing.*'bnr'"),
        ("cold", {"beta_max": 1.0}, "cold takes alpha_max, alpha_min, beta: .*'beta_max'"),
        ("spectral", {}, r"expected a finite spectrum \[H, W\]"),
        ("hot", {"beta_max": -1.0}, "got beta_min=0.002, beta_max=-1.0"),
    ],
)
def test_a_name_or_a_number_that_is_not_known_is_refused(name, numbers, message):
    with pytest.raises(ValueError, match=message):
        schedules.by_name(name, **numbers)
