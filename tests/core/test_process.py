"""The forward process against its moments, its SDE and the closed forms of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import (
    blur,
    dct,
    eigenvalues,
    gaussian_data,
    idct,
    like,
    transfer,
    within_standard_errors,
)
from warm_diffusion import process, schedules
from warm_diffusion.denoiser import Prediction

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
DATA = gaussian_data(*SIZE)

# Compiled once per shape: the suite stays fast.
perturb, transition, score, velocity = map(
    jax.jit, (process.perturb, process.transition, process.score, process.velocity)
)
drift_and_diffusion = jax.jit(process.drift_and_diffusion, static_argnums=(2, 3))

# A path on which neither level is linear in t, nor their ratio constant.
CURVED = schedules.from_functions(
    lambda t: 3 * jnp.sin(t / 2) ** 2, lambda t: t**1.5 + 0.3 * t, t_min=0.1, t_max=2.0
)
PATHS = {"constant_bnr": schedules.constant_bnr(0.5), "curved": CURVED}
LEVELS = [((0.2, 0.1), (0.9, 0.3)), ((0.0, 0.0), (0.7, 0.4)), ((0.5, 0.2), (0.5, 0.6)),
          ((0.3, 0.4), (1.1, 0.4))]  # fmt: skip


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request):
    return request.param


def normal(count, shape=SIZE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape))


def test_perturb_blurs_and_adds_noise_by_one_level_per_image():
    x0, noise = DATA.draw(np.random.default_rng(1), 3), normal(3)
    alpha, beta = np.array([0.0, 0.5, 2.0]), np.array([0.1, 0.0, 3.0])
    expected = blur(x0, alpha) + like(beta, x0) * noise
    np.testing.assert_allclose(perturb(x0, noise, alpha, beta), expected, atol=1e-13)


def factors(start, end, shape=SIZE):
    """Mean factor and standard deviation of `transition` per frequency, read off unit inputs."""
    ones, zeros = idct(np.ones((1, *shape))), np.zeros((1, *shape))
    mean = dct(transition(ones, zeros, start, end))
    deviation = dct(transition(zeros, ones, start, end))
    return mean, deviation


@pytest.mark.parametrize("shape", [(7, 2), SIZE, (4, 3, 5, 2)], ids=["1", "2", "3"])
def test_transition_follows_its_closed_form(shape):
    # Eq. (3): r = m(alpha_t) / m(alpha_s), variance beta_t^2 - r^2 beta_s^2.
    for start, end in LEVELS:
        mean, deviation = factors(start, end, shape)
        r = transfer(end[0], *shape[:-1]) / transfer(start[0], *shape[:-1])
        r = np.broadcast_to(r, mean.shape)
        np.testing.assert_allclose(mean, r, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(deviation**2, end[1] ** 2 - r**2 * start[1] ** 2, atol=1e-13)


def test_a_perturbed_state_moved_on_has_the_marginal_of_its_end_level():
    rng = np.random.default_rng(2)
    x0 = DATA.draw(rng, 4000)
    x = perturb(x0, rng.standard_normal(x0.shape), *LEVELS[0][0])
    x = dct(transition(x, rng.standard_normal(x0.shape), *LEVELS[0]))
    within_standard_errors(x, *DATA.marginal(*LEVELS[0][1]))


@pytest.mark.parametrize("fall", [0.0, 1e-7, 5e-6])
def test_transition_to_the_same_level_up_to_rounding_changes_nothing(fall):
    # A fall that a path may have by rounding (1e-5) is none; beyond it the result is NaN.
    x, end = normal(2), (0.7 * (1 - fall), 0.3 * (1 - fall))
    moved = transition(x, normal(2, seed=1), (0.7, 0.3), end)
    np.testing.assert_allclose(moved, x, atol=1e-13)
    assert np.any(np.isnan(transition(x, x, (0.7, 0.3), (0.7, 0.29))))


def test_gradients_by_levels_are_finite_where_a_variance_is_zero():
    # At constant beta the mean of an image keeps its variance: a square root of 0.
    x, noise = normal(1), normal(1, seed=1)

    @jax.jit
    @jax.value_and_grad
    def total(alpha):
        return jnp.sum(process.transition(x, noise, (0.5, 0.3), (alpha, 0.3)) ** 2)

    expected = (total(0.9 + 1e-6)[0] - total(0.9 - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(total(0.9)[1], expected, rtol=1e-6)
    assert np.isfinite(total(0.5)[1])


def test_transition_between_close_levels_keeps_float32_accuracy():
    # beta_t^2 - r^2 beta_s^2 taken literally loses two digits or more here, 1e-5 apart.
    start, end = ((1.0, 2.0), (1.00002, 2.00004))
    (a, b), (a_end, b_end) = (tuple(float(np.float32(n)) for n in pair) for pair in (start, end))
    ones = np.asarray(idct(np.ones((1, *SIZE))), np.float32)
    noisy = transition(np.zeros_like(ones), ones, (a, b), (a_end, b_end))
    r = np.broadcast_to(transfer(a_end, 6, 5) / transfer(a, 6, 5), noisy.shape)
    np.testing.assert_allclose(dct(noisy), np.sqrt(b_end**2 - r**2 * b**2), rtol=1e-4)


@pytest.mark.parametrize("t", [0.4, np.array([0.7, 1.8])])
def test_drift_and_diffusion_move_mean_and_variance_of_the_marginal(path, t):
    # d m / dt = F m and d beta^2 / dt = 2 F beta^2 + G^2, by autodiff of m and beta^2.
    eigen = eigenvalues(6, 5)[:, :, None]
    drift, diffusion = drift_and_diffusion(path, t, 6, 5)
    assert drift.shape == diffusion.shape == (*np.shape(t), 6, 5, 1)

    def along(t):
        return jax.jvp(
            lambda t: (jnp.exp(-eigen * path.alpha(t) ** 2 / 2), path.beta(t) ** 2), (t,), (1.0,)
        )

    for index in np.ndindex(np.shape(t)):
        (m, variance), (m_rate, variance_rate) = along(float(np.asarray(t)[index]))
        np.testing.assert_allclose(drift[index] * m, m_rate, atol=1e-12)
        total = 2 * drift[index] * variance + diffusion[index] ** 2
        np.testing.assert_allclose(total, np.full((6, 5, 1), variance_rate), rtol=1e-11)


def log_density(x, alpha, beta):
    """Log-density of N(m mu, m^2 S + beta^2) per frequency, up to a constant."""
    mean, variance = DATA.marginal(alpha, beta)
    return -np.sum((dct(x) - mean) ** 2 / variance) / 2


def test_score_is_the_gradient_of_the_log_density():
    # Central differences of a quadratic, exact up to rounding.
    x, alpha, beta = normal(2), np.array([0.5, 1.5]), np.array([0.3, 2.0])
    found = np.asarray(score(x, DATA.posterior_means(x, alpha, beta)[0], beta))
    for index in [(0, 0, 0, 0), (0, 3, 2, 1), (1, 5, 4, 0)]:
        step = np.zeros_like(x)
        step[index] = 1e-3
        slope = (log_density(x + step, alpha, beta) - log_density(x - step, alpha, beta)) / 2e-3
        np.testing.assert_allclose(found[index], slope, rtol=1e-7)


def test_velocity_is_the_derivative_of_the_closed_form_flow(path):
    # Central differences of the flow from the state at t.
    x, t = normal(2), np.array([0.3, 1.9])

    def levels(t):
        return np.asarray(path.alpha(t)), np.asarray(path.beta(t))

    ends = [DATA.flow(x, levels(t), levels(t + step)) for step in (1e-5, -1e-5)]
    prediction = Prediction(*DATA.posterior_means(x, *levels(t)))
    found = velocity(x, prediction, path, t)
    np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)
