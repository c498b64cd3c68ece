"""Likelihood by the probability flow, against closed-form densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.core.closed_forms import blur, dct, eigenvalues, gaussian_data
from warm_diffusion import oracle, schedules
from warm_diffusion.evaluation import likelihood

KEY = jax.random.key(0)


def path(bnr, beta_min=0.002, beta_max=80.0):
    return schedules.constant_bnr(bnr, beta_min=beta_min, beta_max=beta_max)


def gaussian_log_density(data, y, schedule):
    """ln N(y; mean, S + beta^2 / m^2) per DCT coefficient: B^-1 of the marginal at t_min."""
    alpha, beta = float(schedule.alpha(schedule.t_min)), float(schedule.beta(schedule.t_min))
    mean, variance = data.marginal(alpha, beta)
    m2 = np.exp(-eigenvalues(*y.shape[1:3])[:, :, None] * alpha**2)
    mean, variance = mean / np.sqrt(m2), variance / m2
    terms = (dct(y) - mean) ** 2 / variance + np.log(2 * np.pi * variance)
    return -terms.sum(axis=(1, 2, 3)) / 2


def sampler_log_density(data, y, schedule):
    """The density that sampling from N(0, beta_max^2 I) gives: the exact flow is linear.

    Per coefficient x_T = m_T mean + (x - m mean) sqrt(v_T / v) with x = m y, in N(0, beta_max^2).
    """
    low, high = (
        (float(schedule.alpha(t)), float(schedule.beta(t)))
        for t in (schedule.t_min, schedule.t_max)
    )
    mean, variance = data.marginal(*low)
    mean_end, variance_end = data.marginal(*high)
    stretch = np.sqrt(variance_end / variance)
    log_m = -eigenvalues(*y.shape[1:3])[:, :, None] * low[0] ** 2 / 2
    end = mean_end + (np.exp(log_m) * dct(y) - mean) * stretch
    terms = -(end**2) / high[1] ** 2 / 2 - np.log(high[1] * np.sqrt(2 * np.pi))
    return (terms + np.log(stretch) + log_m).sum(axis=(1, 2, 3))


def density(denoise, images, schedule, **options):
    """One compiled program, where calls one after the other would be compiled one by one."""
    options = {"key": KEY, "trace": "exact"} | options
    run = jax.jit(lambda x: likelihood.log_density(denoise, x, schedule, **options))
    return run(jnp.asarray(images, jnp.float32))


def exact_denoiser(data):
    return oracle.gaussian(jnp.asarray(data.mean, jnp.float32), jnp.float32(data.spectrum))


@pytest.mark.parametrize("bnr", [0.0, 2.0])
def test_the_density_is_that_of_what_the_sampler_draws(bnr):
    data, schedule = gaussian_data(3, 4, 2), path(bnr)
    y = data.draw(np.random.default_rng(1), 5).astype(np.float32)
    found = density(exact_denoiser(data), y, schedule)
    assert bool(found.converged)
    expected = sampler_log_density(data, y, schedule)
    np.testing.assert_allclose(np.asarray(found.values) / 24, expected / 24, atol=1e-4)


def test_the_estimated_density_is_unbiased():
    """Its mean over 64 probes, within five of its own standard errors."""
    data, schedule = gaussian_data(3, 4, 2), path(2.0)
    y = data.draw(np.random.default_rng(1), 5).astype(np.float32)
    found = density(exact_denoiser(data), np.repeat(y, 64, axis=0), schedule, trace="hutchinson")
    values = np.asarray(found.values, np.float64).reshape(5, 64) / 24
    error = values.std(axis=1, ddof=1) / 8
    assert 1e-4 < error.max() < 0.05
    expected = sampler_log_density(data, y, schedule) / 24
    np.testing.assert_array_less(np.abs(values.mean(1) - expected), 5 * error + 1e-4)


def test_a_coarse_lower_end_is_accounted_for():
    """BNR 2 at t_min: blur of 1 pixel and noise of 0.5; eq. (2) and the noise."""
    data, schedule = gaussian_data(4, 4, 1), path(2.0, 0.5)
    y = data.draw(np.random.default_rng(1), 4).astype(np.float32)
    found = density(exact_denoiser(data), y, schedule)
    expected = gaussian_log_density(data, y, schedule)
    np.testing.assert_allclose(np.asarray(found.values) / 16, expected / 16, atol=1e-3)


def test_the_density_of_a_mixture_is_exact():
    """Not Gaussian: the mean of N(B x_i, beta^2 I) at t_min, and B^-1 of it."""
    schedule = path(0.5, 0.3)
    alpha, beta = 0.15, 0.3
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 3, 4, 1))
    y = images[[0, 1, 2, 0, 1]] + 0.3 * rng.standard_normal((5, 3, 4, 1))
    y[4] = (images[0] + images[1]) / 2
    squares = np.sum((blur(y, alpha)[:, None] - blur(images, alpha)[None]) ** 2, axis=(2, 3, 4))
    logs = -squares / (2 * beta**2) - 12 * np.log(beta * np.sqrt(2 * np.pi)) - np.log(3)
    expected = scipy.special.logsumexp(logs, axis=1) - eigenvalues(3, 4).sum() * alpha**2 / 2
    found = density(oracle.mixture(jnp.asarray(images, jnp.float32)), y, schedule)
    np.testing.assert_allclose(np.asarray(found.values) / 12, expected / 12, atol=1e-3)


def test_an_image_has_the_same_density_in_any_company():
    data, schedule = gaussian_data(4, 4, 1), path(0.5)
    y = jnp.asarray(data.draw(np.random.default_rng(1), 3), jnp.float32).at[2].multiply(5)
    keys = jax.random.split(KEY, 3)
    run = jax.jit(
        lambda y, keys: likelihood.log_density(exact_denoiser(data), y, schedule, key=keys).values
    )
    together, alone = run(y, keys), run(y[:1], keys[:1])
    # not the same steps: equal up to the solver's tolerance
    np.testing.assert_allclose(alone[0] / 16, together[0] / 16, atol=5e-4)


@pytest.mark.long
def test_easy_images_beside_a_hard_one_do_not_loosen_its_steps():
    """Between two modes the flow is stiff; averaged over the batch, its error would not show."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 3, 4, 1))
    hard = 0.52 * images[0] + 0.48 * images[1] + 0.02 * rng.standard_normal((3, 4, 1))
    y = jnp.asarray(np.concatenate([hard[None], np.repeat(images[:1], 60, axis=0)]), jnp.float32)
    denoise = oracle.mixture(jnp.asarray(images, jnp.float32))
    alone, together = (
        likelihood.log_density(denoise, batch, path(0.5, 0.05), key=KEY, trace="exact").values[0]
        for batch in (y[:1], y)
    )
    np.testing.assert_allclose(together / 12, alone / 12, atol=5e-3)


def test_bits_per_dimension_of_gaussian_pixels_are_the_closed_form():
    """White Gaussian, variance s2, at alpha = 0: -E ln N = (ln(2 pi s2) + E (y - mean)^2 / s2) / 2,

    E over the cell of side w = 2 / 255: (pixel - mean)^2 + w^2 / 12; bits: less ln w, over ln 2.
    """
    s2, w, schedule = 0.3**2, 2 / 255, schedules.hot()
    # all brighter than the mean, so that a cell that is not centred shows: 0.01 to 0.03 bits
    images = np.random.default_rng(0).integers(150, 200, (4, 8, 8, 1), np.uint8)
    denoise = oracle.gaussian(jnp.zeros((8, 8, 1)), jnp.full((8, 8), s2 - 0.002**2))
    found = jax.jit(
        lambda x: likelihood.bits_per_dim(denoise, x, schedule, key=KEY, trace="exact")
    )(images)
    squares = ((images / 127.5 - 1) ** 2 + w**2 / 12).mean(axis=(1, 2, 3))
    expected = ((np.log(2 * np.pi * s2) + squares / s2) / 2 - np.log(w)) / np.log(2)
    # the noise of one dequantization: mean of 64 values 2 (pixel - mean) (u - 1/2) w / (2 s2 ln 2)
    noise = np.sqrt(squares) * w / np.sqrt(12) / s2 / np.log(2) / 8
    np.testing.assert_array_less(np.abs(found.values - expected), 5 * noise + 1e-3)
    assert 5 * noise.max() + 1e-3 < 0.012


def test_a_solver_that_runs_out_of_steps_says_so():
    data = gaussian_data(4, 4, 1)
    found = density(exact_denoiser(data), jnp.zeros((1, 4, 4, 1)), path(0.5), max_steps=4)
    assert not bool(found.converged)


def test_a_path_that_ends_in_blur_has_no_likelihood():
    with pytest.raises(ValueError, match=r"the path ends at noise 0\.01, in blurred images"):
        likelihood.log_density(None, jnp.zeros((1, 4, 4, 1)), schedules.cold(), key=KEY)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (jnp.zeros((4, 4, 1)), {}, "must be floats"),
        (jnp.zeros((1, 4, 4, 1), jnp.uint8), {}, "must be floats"),
        (jnp.zeros((1, 4, 4, 1)), {"trace": "guess"}, "trace must be one of exact, hutchinson"),
    ],
)
def test_wrong_arguments_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        likelihood.log_density(None, images, path(0.5), key=KEY, **options)


def test_bits_are_of_uint8_images():
    with pytest.raises(ValueError, match="expected uint8 images"):
        likelihood.bits_per_dim(None, jnp.zeros((1, 4, 4, 1)), path(0.5), key=KEY)
