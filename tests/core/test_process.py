"""The forward process against its moments, its SDE and the closed forms of Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from tests.core.closed_forms import (
    blur,
    dct,
    eigenvalues,
    gaussian_data,
    idct,
    transfer,
    within_standard_errors,
)
from warm_diffusion import process, schedules
from warm_diffusion.denoiser import Prediction

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
DATA = gaussian_data(*SIZE)

# Compiled once per shape: the suite stays fast.
perturb, transition, score = (
    jax.jit(function) for function in (process.perturb, process.transition, process.score)
)
velocity = jax.jit(process.velocity, static_argnums=2)
drift_and_diffusion = jax.jit(process.drift_and_diffusion, static_argnums=(0, 2, 3))

# A path on which neither level is linear in t, nor their ratio constant.
CURVED = schedules.Schedule(
    alpha=lambda t: 3 * jnp.sin(t / 2) ** 2,
    beta=lambda t: t**1.5 + 0.3 * t,
    t_min=0.1,
    t_max=2.0,
    sample_time=lambda key, shape: jnp.ones(shape),
)
PATHS = {"hot": schedules.hot(), "constant_bnr": schedules.constant_bnr(0.5), "curved": CURVED}
LEVELS = [((0.2, 0.1), (0.9, 0.3)), ((0.0, 0.0), (0.7, 0.4)), ((0.5, 0.2), (0.5, 0.6)),
          ((0.3, 0.4), (1.1, 0.4))]  # fmt: skip


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request):
    return request.param


def normal(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SIZE))


# --- perturb -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (2.0, 0.05), (0.0, 1.0)])
def test_perturbed_coefficients_have_mean_m_x0_and_variance_beta_squared(alpha, beta):
    # Eq. (1), per DCT frequency, over 4,000 draws of the noise.
    x0 = np.broadcast_to(DATA.mean, (4000, *SIZE))
    x = dct(perturb(x0, normal(4000), alpha, beta))
    within_standard_errors(x, transfer(alpha, 6, 5) * dct(DATA.mean), np.full(SIZE, beta**2))


def test_without_blur_perturb_adds_plain_noise():
    # BNR 0: EDM's x0 + sigma n.
    x0, noise = DATA.draw(np.random.default_rng(1), 3), normal(3)
    np.testing.assert_allclose(perturb(x0, noise, 0.0, 0.7), x0 + 0.7 * noise, atol=1e-13)


def test_perturb_takes_one_level_per_image():
    x0, noise = DATA.draw(np.random.default_rng(1), 3), normal(3)
    alpha, beta = np.array([0.0, 0.5, 2.0]), np.array([0.1, 0.0, 3.0])
    expected = blur(x0, alpha) + beta[:, None, None, None] * noise
    np.testing.assert_allclose(perturb(x0, noise, alpha, beta), expected, atol=1e-13)


# --- transition ----------------------------------------------------------------------------------


def factors(start, end):
    """Mean factor and standard deviation of `transition` per frequency, read off unit inputs."""
    ones, zeros = idct(np.ones((1, *SIZE))), np.zeros((1, *SIZE))
    mean = dct(transition(ones, zeros, start, end))
    deviation = dct(transition(zeros, ones, start, end))
    return mean, deviation


@pytest.mark.parametrize(("start", "end"), LEVELS)
def test_transition_follows_its_closed_form(start, end):
    # Eq. (3): r = m(alpha_t) / m(alpha_s), variance beta_t^2 - r^2 beta_s^2.
    mean, deviation = factors(start, end)
    r = np.broadcast_to(transfer(end[0], 6, 5) / transfer(start[0], 6, 5), mean.shape)
    np.testing.assert_allclose(mean, r, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(deviation**2, end[1] ** 2 - r**2 * start[1] ** 2, atol=1e-13)


def test_two_transitions_are_one():
    # Chapman-Kolmogorov: the factors multiply, the variances r^2 v1 + v2 add up.
    low, middle, high = (0.2, 0.1), (0.6, 0.5), (0.9, 0.7)
    (first_mean, first), (second_mean, second) = factors(low, middle), factors(middle, high)
    mean, deviation = factors(low, high)
    np.testing.assert_allclose(first_mean * second_mean, mean, atol=1e-13)
    np.testing.assert_allclose(second_mean**2 * first**2 + second**2, deviation**2, atol=1e-13)


@pytest.mark.parametrize(("start", "end"), LEVELS[:2])
def test_a_perturbed_state_moved_on_has_the_marginal_of_its_end_level(start, end):
    rng = np.random.default_rng(2)
    x0 = DATA.draw(rng, 4000)
    x = perturb(x0, rng.standard_normal(x0.shape), *start)
    x = dct(transition(x, rng.standard_normal(x0.shape), start, end))
    within_standard_errors(x, *DATA.marginal(*end))


def test_transition_to_the_same_level_changes_nothing():
    x = normal(2)
    moved = transition(x, normal(2, seed=1), (0.7, 0.3), (0.7, 0.3))
    np.testing.assert_allclose(moved, x, atol=1e-13)


def test_transition_takes_one_level_per_image():
    x, noise = normal(2), normal(2, seed=1)
    start = np.array([0.1, 0.4]), np.array([0.2, 0.5])
    end = np.array([0.3, 1.0]), np.array([0.4, 0.9])
    together = transition(x, noise, start, end)
    for i in range(2):
        levels = ((start[0][i], start[1][i]), (end[0][i], end[1][i]))
        alone = transition(x[i : i + 1], noise[i : i + 1], *levels)
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-13)


def test_transition_between_close_levels_keeps_float32_accuracy():
    # beta_t^2 - r^2 beta_s^2 taken literally loses two digits or more here, 1e-5 apart.
    with jax.enable_x64(False):
        start, end = tuple(
            tuple(jnp.float32(level) for level in pair) for pair in ((1.0, 2.0), (1.00001, 2.00002))
        )
        ones = jnp.asarray(idct(np.ones((1, *SIZE))), jnp.float32)
        noisy = transition(jnp.zeros_like(ones), ones, start, end)
    (a, b), (a_end, b_end) = ((float(p), float(q)) for p, q in (start, end))
    r = np.broadcast_to(transfer(a_end, 6, 5) / transfer(a, 6, 5), noisy.shape)
    np.testing.assert_allclose(dct(noisy), np.sqrt(b_end**2 - r**2 * b**2), rtol=1e-4)


# --- drift and diffusion -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_drift_moves_the_mean_of_the_marginal(path, share):
    # d m(alpha(t)) / dt = F m, by autodiff of the formula for m.
    t = path.t_min + share * (min(path.t_max, 2.0) - path.t_min)
    eigen = eigenvalues(6, 5)[:, :, None]
    m, rate = jax.jvp(lambda t: jnp.exp(-eigen * path.alpha(t) ** 2 / 2), (t,), (1.0,))
    drift, _ = drift_and_diffusion(path, t, 6, 5)
    np.testing.assert_allclose(drift * m, rate, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_drift_and_diffusion_move_the_variance_of_the_marginal(path, share):
    # d beta^2 / dt = 2 F beta^2 + G^2, by autodiff of beta^2.
    t = path.t_min + share * (min(path.t_max, 2.0) - path.t_min)
    variance, rate = jax.jvp(lambda t: path.beta(t) ** 2, (t,), (1.0,))
    drift, diffusion = drift_and_diffusion(path, t, 6, 5)
    total = 2 * drift * variance + diffusion**2
    np.testing.assert_allclose(total, np.full((6, 5, 1), rate), rtol=1e-11)


def test_drift_and_diffusion_have_the_shape_of_t_and_the_image():
    t = np.array([0.5, 1.0])
    drift, diffusion = drift_and_diffusion(CURVED, t, 6, 5)
    assert drift.shape == diffusion.shape == (2, 6, 5, 1)
    for i in range(2):
        alone = drift_and_diffusion(CURVED, t[i], 6, 5)
        np.testing.assert_allclose(drift[i], alone[0], rtol=1e-13)
        np.testing.assert_allclose(diffusion[i], alone[1], rtol=1e-13)


# --- score and velocity --------------------------------------------------------------------------


def log_density(x, alpha, beta):
    """Of one state x of Gaussian data, in pixels, up to a constant: N(m mu, m^2 S + beta^2)."""
    rows, columns = (scipy.fft.dct(np.eye(size), norm="ortho", axis=0) for size in SIZE[:2])
    mean, variance = DATA.marginal(alpha, beta)
    deviation = jnp.einsum("ih,hwc,jw->ijc", rows, x, columns) - mean
    return -jnp.sum(deviation**2 / variance) / 2


def test_score_is_the_gradient_of_the_log_density():
    x, alpha, beta = normal(2), np.array([0.5, 1.5]), np.array([0.3, 2.0])
    blurry, _ = DATA.posterior_means(x, alpha, beta)
    expected = [jax.grad(log_density)(x[i], alpha[i], beta[i]) for i in range(2)]
    np.testing.assert_allclose(score(x, blurry, beta), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("times", [0.4, 1.5, np.array([0.3, 1.9])])
def test_velocity_is_the_derivative_of_the_closed_form_flow(path, times):
    # Autodiff in t of m mu + (x_T - m_T mu) sqrt(v / v_T), per frequency.
    start, centre, eigen = dct(normal(2)), dct(DATA.mean), eigenvalues(6, 5)[:, :, None]

    def moments(t):
        m = jnp.exp(-eigen * path.alpha(t) ** 2 / 2)
        return m * centre, m**2 * DATA.spectrum + path.beta(t) ** 2

    def flow(start, t):
        (mean, variance), (mean_end, variance_end) = moments(t), moments(2.0)
        return mean + (start - mean_end) * jnp.sqrt(variance / variance_end)

    steps = np.broadcast_to(times, 2).astype(float)
    along = jax.jit(jax.vmap(lambda x, t: jax.jvp(lambda t: flow(x, t), (t,), (1.0,))))
    states, rates = along(start, steps)
    x = idct(states)
    prediction = Prediction(*DATA.posterior_means(x, path.alpha(steps), path.beta(steps)))
    result = velocity(x, prediction, path, times)
    np.testing.assert_allclose(result, idct(rates), rtol=1e-9, atol=1e-11)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda x, other: process.perturb(x, other, 0.5, 0.5),
        lambda x, other: process.transition(x, other, (0.1, 0.1), (0.2, 0.2)),
        lambda x, other: process.score(x, other, 0.5),
    ],
    ids=["perturb", "transition", "score"],
)
def test_images_of_different_shapes_are_refused(call):
    with pytest.raises(ValueError, match=r"same shape, got \(2, 6, 5, 2\) and \(1, 6, 5, 2\)"):
        call(normal(2), normal(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, bad: process.perturb(x, x, bad, 0.5),
        lambda x, bad: process.perturb(x, x, 0.5, bad),
        lambda x, bad: process.transition(x, x, (bad, 0.1), (9.0, 9.0)),
        lambda x, bad: process.transition(x, x, (0.1, 0.1), (9.0, bad)),
        lambda x, bad: process.score(x, x, bad),
        lambda x, bad: process.velocity(x, Prediction(x, x), CURVED, bad),
    ],
    ids=["perturb alpha", "perturb beta", "transition start", "transition end", "score", "time"],
)
def test_a_level_that_is_not_one_per_image_is_refused(call):
    with pytest.raises(ValueError, match=r"a scalar or shape \(2,\), got \(3,\)"):
        call(normal(2), np.ones(3))
