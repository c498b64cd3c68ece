"""Restoring images whose posterior is known, and estimating the levels of theirs."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
from PIL import Image

from tests.core.closed_forms import (
    blur,
    dct,
    eigenvalues,
    gaussian_data,
    solve,
    transfer,
    within_standard_errors,
)
from warm_diffusion import oracle, restoration
from warm_diffusion.denoiser import Prediction
from warm_diffusion.samplers import SOLVERS

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
DATA = gaussian_data(*SIZE)
EXACT = oracle.gaussian(DATA.mean, DATA.spectrum)
ALPHA = np.array([0.0, 0.6, 1.5, 1.0])  # without blur; with little noise; and between
BETA = np.array([0.3, 0.1, 0.4, 0.005])
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def observed(seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((len(BETA), *SIZE))
    return blur(DATA.draw(rng, len(BETA)), ALPHA) + BETA[:, None, None, None] * noise


IMAGES = observed()


@functools.cache
def restorer(denoise=EXACT, **options):
    """`restore` with everything but arrays fixed."""
    return jax.jit(
        lambda y, alpha, beta, key=None: restoration.restore(
            denoise, y, alpha, beta, key=key, **options
        )
    )


def to_clean():
    """The flow's end from each image's own levels, method section 7."""
    return DATA.flow(IMAGES, (ALPHA, BETA), (np.zeros(4), np.zeros(4)))


@pytest.mark.parametrize("solver", ["euler", "multistep"])
def test_on_gaussian_data_the_flow_ends_where_the_closed_form_says(solver):
    # The last step, from 2 % of the levels, is no step of the flow: its error, far below the
    # noise, stays. What is above it falls with the order of the solver.
    coarse, fine = (
        np.sqrt(
            np.mean((restorer(solver=solver, num_steps=n)(IMAGES, ALPHA, BETA) - to_clean()) ** 2)
        )
        for n in (8, 32)
    )
    assert fine < (0.02 if solver == "euler" else 0.004)
    assert coarse < (0.08 if solver == "euler" else 0.03)


@each_solver
def test_solvers_follow_their_formulas_from_the_images_own_levels(solver):
    # Independent numpy steps of method section 3, one image at a time.
    def heads(x, alpha, beta):
        return [np.asarray(part) for part in toy(jnp.asarray(x), alpha, beta)]

    found = restorer(toy, solver=solver, num_steps=5)(IMAGES, ALPHA, BETA)
    root = 0.02 ** (1 / 7)
    tau = np.append((1 + np.arange(5) / 4 * (root - 1)) ** 7, 0.0)
    for image, alpha, beta, end in zip(IMAGES, ALPHA, BETA, found, strict=True):
        levels = list(zip(alpha * tau, beta * tau, strict=True))
        np.testing.assert_allclose(end, solve(solver, heads, image[None], levels)[0], atol=1e-10)


def toy(x, alpha, beta):
    """A denoiser that is not linear and whose heads are not consistent."""
    alpha, beta = (jnp.reshape(jnp.asarray(level), (-1, 1, 1, 1)) for level in (alpha, beta))
    blurry = (jnp.tanh(x) + 0.2 * jnp.roll(x, 1, 2)) / (1 + beta)
    return Prediction(blurry, 0.3 * jnp.cos(x + beta) * (alpha + 0.1) / (1 + alpha))


def test_one_call_is_the_posterior_mean():
    blurry, residual = DATA.posterior_means(IMAGES, ALPHA, BETA)
    one = restorer(num_steps=1)(IMAGES, ALPHA, BETA)
    np.testing.assert_allclose(one, blurry + residual, atol=1e-6)


@each_solver
def test_samples_have_the_posteriors_mean_and_variance(solver):
    # 400 chains from one image; the variance misses what the finite steps miss, so many steps.
    alpha, beta = 0.6, 0.3
    y = np.repeat(IMAGES[1:2], 400, axis=0)
    run = restorer(solver=solver, num_steps=64, stochastic=1.0)
    ends = dct(run(y, alpha, beta, jax.random.key(0)))
    blurry, residual = DATA.posterior_means(IMAGES[1:2], alpha, beta)
    expected = DATA.posterior_variance(alpha, beta)
    within_standard_errors(ends, mean=dct(blurry + residual)[0])
    np.testing.assert_allclose(np.var(ends, axis=0).mean() / expected.mean(), 1.0, atol=0.12)


def test_few_multistep_samples_have_the_posteriors_variance():
    # 9 steps; with euler's they have about half of it, extrapolated too far three times as much.
    y = np.repeat(IMAGES[:1], 400, axis=0)
    ends = dct(restorer(stochastic=1.0)(y, 0.0, 0.3, jax.random.key(0)))
    expected = DATA.posterior_variance(0.0, 0.3)
    np.testing.assert_allclose(np.var(ends, axis=0).mean() / expected.mean(), 1.0, atol=0.12)


def test_little_randomness_is_between_the_flow_and_samples():
    y = np.repeat(IMAGES[2:3], 64, axis=0)
    none, some, full = (
        np.std(restorer(stochastic=share)(y, 1.5, 0.4, jax.random.key(0)), axis=0).mean()
        for share in (0.0, 0.2, 1.0)
    )
    assert none < 1e-9
    assert 0.01 < some < full


def test_a_few_images_are_found_again():
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (4, *SIZE))
    beta = np.array([0.1, 0.05, 0.1, 0.005])
    y = blur(images, ALPHA) + beta[:, None, None, None] * rng.standard_normal(images.shape)
    found = restorer(oracle.mixture(images))(y, ALPHA, beta)
    np.testing.assert_allclose(found, images, atol=1e-3)


def test_each_image_is_restored_by_itself_in_any_batch():
    keys = jax.random.split(jax.random.key(0), 4)
    run = restorer(stochastic=0.7)
    together = run(IMAGES, ALPHA, BETA, keys)
    alone = run(IMAGES[2:3], ALPHA[2:3], BETA[2:3], keys[2:3])
    np.testing.assert_allclose(together[2:3], alone, atol=1e-9)


def test_restoring_can_be_mapped_and_differentiated():
    run = restorer(num_steps=3)
    stacked = jax.vmap(run)(IMAGES[:, None], ALPHA, BETA)[:, 0]
    np.testing.assert_allclose(stacked, run(IMAGES, ALPHA, BETA), atol=1e-9)
    total = jax.jit(lambda y, alpha, beta: jnp.sum(run(y, alpha, beta) ** 2))
    slope = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(IMAGES, ALPHA, BETA)
    given, rng = (IMAGES, ALPHA, BETA), np.random.default_rng(5)
    for i, argument in enumerate(given):
        direction = 1e-3 * argument * rng.standard_normal(argument.shape)
        up, down = (
            total(*given[:i], argument + move, *given[i + 1 :]) for move in (direction, -direction)
        )
        np.testing.assert_allclose(np.vdot(slope[i], direction), (up - down) / 2, rtol=2e-3)


def test_wiener_is_the_gaussian_posterior_mean():
    blurry, residual = DATA.posterior_means(IMAGES, ALPHA, BETA)
    found = restoration.wiener(IMAGES, DATA.spectrum, ALPHA, BETA, DATA.mean)
    np.testing.assert_allclose(found, blurry + residual, atol=1e-9)


def test_wiener_without_a_mean_keeps_each_images_colour():
    spectrum = DATA.spectrum[:, :, 0]
    found = restoration.wiener(IMAGES, spectrum, ALPHA, BETA)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), IMAGES.mean(axis=(1, 2)), atol=1e-9)
    shifted = restoration.wiener(IMAGES + 0.5, spectrum, ALPHA, BETA)
    np.testing.assert_allclose(shifted, found + 0.5, atol=1e-9)


# --- levels of an image: against scipy's minimiser, Monte Carlo and the theory of estimation ------

LARGE = (16, 12, 2)
PHOTOS = gaussian_data(*LARGE)
SPECTRUM = PHOTOS.spectrum[:, :, 0]
COUNT = 128


def states(alpha, beta, count=COUNT, contrast=1.0, seed=0):
    """Forward states of Gaussian data whose channels have one spectrum."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, count, *LARGE))
    spectrum = contrast * np.repeat(SPECTRUM[:, :, None], LARGE[2], axis=2)
    data = type(PHOTOS)(PHOTOS.mean, spectrum)
    return blur(data.draw(rng, count), alpha) + beta * noise[1]


estimate = jax.jit(lambda x: restoration.estimate_levels(x, SPECTRUM, PHOTOS.mean))
estimate_with_contrast = jax.jit(
    lambda x: restoration.estimate_levels(x, SPECTRUM, PHOTOS.mean, contrast=True)
)
estimate_without_mean = jax.jit(lambda x, spectrum: restoration.estimate_levels(x, spectrum))
errors = jax.jit(lambda x, a, b: restoration.level_errors(x, SPECTRUM, a, b, PHOTOS.mean))


def whittle(theta, image, contrast=1.0):
    """Method section 10 for one image, the mean image blurred as well."""
    alpha, beta = theta
    m = transfer(alpha, *LARGE[:2])
    power = np.mean((dct(image[None]) - m * dct(PHOTOS.mean[None]))[0] ** 2, axis=-1)
    v = m[:, :, 0] ** 2 * contrast * SPECTRUM + beta**2
    return np.sum(np.log(v) + power / v)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.1), (2.0, 0.02)])
def test_levels_minimise_the_whittle_likelihood(alpha, beta):
    images = states(alpha, beta)
    found = np.stack(estimate(images), axis=1)
    for image, theta in zip(images[:2], found[:2], strict=True):
        best = scipy.optimize.minimize(
            whittle, (alpha, beta), (image,), "Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-11}
        )
        np.testing.assert_allclose(theta, np.abs(best.x), rtol=1e-4)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.1), (2.0, 0.02)])
def test_levels_are_unbiased_within_their_standard_errors(alpha, beta):
    # The squares, in which the likelihood is regular: 128 deviations in units of their errors have
    # mean 0 and deviation 1; the mean's own error is 1 / 128^1/2, the deviation's 1 / 256^1/2, and
    # 1 / K of bias in second order is allowed for.
    images = states(alpha, beta)
    found = estimate(images)
    for level, value, error in zip((alpha, beta), found, errors(images, *found), strict=True):
        z = (np.square(value) - level**2) / (np.square(value + error) - np.square(value))
        assert abs(np.mean(z)) < 4 / np.sqrt(COUNT) + 0.1
        assert 0.75 < np.std(z) < 1.35


def test_errors_of_channels_that_go_together_are_those_of_one():
    # The scatter over frequencies tells: three equal channels know no more than one.
    images = states(1.0, 0.2)[..., :1]
    mean = PHOTOS.mean[..., :1]
    error = jax.jit(lambda x, mean: restoration.level_errors(x, SPECTRUM, 1.0, 0.2, mean))
    np.testing.assert_allclose(
        error(images.repeat(3, 3), mean.repeat(3, 2)), error(images, mean), rtol=1e-9
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (1.0, 0.0), (0.0, 0.0)])
def test_levels_may_be_zero(alpha, beta):
    images = states(alpha, beta)
    found = estimate(images)
    for level, value, error in zip((alpha, beta), found, errors(images, *found), strict=True):
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(error))
        assert np.all(np.abs(np.square(value) - level**2) < 5 * (error + value) ** 2)
    if alpha == 0:
        assert np.min(found[0]) == 0  # held by its bound in about half of the images


def test_the_contrast_of_an_image_does_not_pass_for_blur():
    images = states(1.0, 0.05, contrast=0.2)
    plain, with_contrast = (np.mean(f(images)[0]) for f in (estimate, estimate_with_contrast))
    assert abs(with_contrast - 1.0) < 0.03
    assert plain > 1.05


def test_one_level_is_estimated_at_a_known_other():
    images = states(1.0, 0.2, count=3)
    known = np.array([0.8, 1.0, 1.3])
    estimate = jax.jit(
        lambda x, **level: restoration.estimate_levels(x, SPECTRUM, PHOTOS.mean, **level)
    )
    alpha, beta = estimate(images, alpha=known)
    np.testing.assert_allclose(alpha, known, rtol=1e-12)
    for image, a, b in zip(images, known, beta, strict=True):
        best = scipy.optimize.minimize_scalar(
            lambda beta, a=a, image=image: whittle((a, beta), image),
            bounds=(0.05, 0.5), method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        np.testing.assert_allclose(b, best.x, rtol=1e-5)
    _, beta = estimate(images, beta=0.2 * known)
    np.testing.assert_allclose(beta, 0.2 * known, rtol=1e-12)


def test_the_gradient_is_that_of_the_minimum():
    # Central differences of the estimate itself, through all its iterations.
    image = states(1.0, 0.2, count=1)
    direction = np.random.default_rng(1).standard_normal(image.shape)
    f = jax.jit(lambda x: restoration.estimate_levels(x, SPECTRUM, PHOTOS.mean)[0][0])
    slope = np.vdot(jax.jit(jax.grad(f))(image), direction)
    step = 1e-4
    difference = (f(image + step * direction) - f(image - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def test_images_are_estimated_one_by_one():
    images = states(1.0, 0.2)
    mapped = jax.jit(jax.vmap(lambda x: estimate(x[None])))
    np.testing.assert_allclose(
        np.squeeze(mapped(images[:4]), -1), np.stack(estimate(images))[:, :4], rtol=1e-6
    )


def test_without_a_mean_the_brightness_says_nothing():
    images = states(1.0, 0.2, count=2)
    one, other = (estimate_without_mean(x, SPECTRUM) for x in (images, images + 0.7))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_spectrum_of_another_size_serves_by_frequency():
    # lambda S = 2 at every size: the spectrum carried over is the images' own.
    small, own = (2 / np.maximum(eigenvalues(*size), 0.01) for size in ((8, 8), LARGE[:2]))
    images = states(1.0, 0.2, count=2)
    one, other = (estimate_without_mean(images, spectrum) for spectrum in (small, own))
    np.testing.assert_allclose(one, other, rtol=1e-6)


# --- what texture passes for, and whether the model fits ------------------------------------------


def test_errors_contain_what_the_texture_of_an_image_does_to_its_levels():
    # The power of each third of an octave times exp(0.2 N(0, 1)): deviations of the squares in
    # units of their errors have deviation 1, where those of the coefficients' scatter alone are
    # far too small.
    rng, tau, count = np.random.default_rng(0), 0.2, 64
    radius = np.sqrt((np.arange(16)[:, None] / 16) ** 2 + (np.arange(12) / 12) ** 2)
    thirds = np.floor(3 * np.log2(2**0.5 / np.maximum(radius, 1e-3))).astype(int)
    images = []
    for seed in range(count):
        texture = np.exp(tau * rng.standard_normal(thirds.max() + 1))[thirds]
        noise = rng.standard_normal((1, *LARGE[:2], 40))  # many channels: the scatter is small
        spectrum = np.repeat((SPECTRUM * texture)[..., None], 40, axis=2)
        data = type(PHOTOS)(np.zeros((*LARGE[:2], 40)), spectrum)
        images.append(blur(data.draw(np.random.default_rng(seed), 1), 1.0) + 0.05 * noise)
    images = np.concatenate(images)
    alpha, beta = jax.jit(lambda x: restoration.estimate_levels(x, SPECTRUM))(images)
    errors = jax.jit(
        lambda x, a, b, texture: restoration.level_errors(x, SPECTRUM, a, b, texture=texture)
    )
    deviations = []
    for texture in (tau, 0.0):
        error, _ = errors(images, alpha, beta, texture)
        deviations.append(np.std((alpha**2 - 1) / ((alpha + error) ** 2 - alpha**2)))
    assert 0.7 < deviations[0] < 1.4
    assert deviations[1] > 2


def test_the_fit_of_noise_is_its_power_over_what_was_expected():
    noise = np.random.default_rng(0).standard_normal((1, 32, 32, 3))
    frequency, departure, z = restoration.goodness_of_fit(noise, np.zeros((32, 32)), 0.0, 1.0)
    radius = np.hypot(*np.ogrid[:32, :32]) / 32
    highest = radius > 2**0.5 / 2 ** (1 / 3)
    power = np.mean(dct(noise)[0][highest] ** 2)
    np.testing.assert_allclose(departure[0, 0], np.log(power), rtol=1e-6)
    scatter = 2 / (3 * highest.sum()) + 0.05**2
    np.testing.assert_allclose(z[0, 0], np.log(power) / np.sqrt(scatter), rtol=1e-6)
    assert np.max(np.abs(z)) < 3
    assert np.all(np.diff(frequency) < 0)


def test_the_fit_with_a_contrast_is_the_fit_to_the_spectrum_of_that_contrast():
    images, levels = states(1.0, 0.05, count=1, contrast=0.2), (1.0, 0.05)
    best = scipy.optimize.minimize_scalar(
        lambda log: whittle(levels, images[0], np.exp(log)) + log**2,  # ln c ~ N(0, 1)
        bounds=(-6, 6), method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    fit = jax.jit(restoration.goodness_of_fit, static_argnames="contrast")
    fitted = fit(images, SPECTRUM, *levels, PHOTOS.mean, contrast=True)
    own = fit(images, np.exp(best.x) * SPECTRUM, *levels, PHOTOS.mean)
    np.testing.assert_allclose(fitted[1], own[1], atol=1e-5)
    assert np.max(np.abs(own[2])) < 3


def test_other_blur_than_a_gaussian_one_does_not_fit():
    # White data under a disc of radius 3: with a Gaussian of the same width the rings are missing.
    rng = np.random.default_rng(0)
    i, j = np.mgrid[-3:4, -3:4]
    disc = (np.hypot(i, j) <= 3).astype(float)
    x = rng.standard_normal((64, 64, 3))
    kernel = disc[..., None] / disc.sum()
    spectrum = np.ones((64, 64))
    largest = []
    for y in (scipy.ndimage.convolve(x, kernel, mode="reflect"), blur(x[None], 1.5)[0]):
        y = y[None] + 0.01 * rng.standard_normal((1, *x.shape))
        levels = jax.jit(lambda y: restoration.estimate_levels(y, spectrum))(y)
        largest.append(np.max(np.abs(restoration.goodness_of_fit(y, spectrum, *levels)[2])))
    assert largest[0] > 5
    assert largest[1] < 3


def test_quiet_parts_tell_the_noise_and_clipped_ones_do_not():
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((1, 128, 128, 3))
    np.testing.assert_allclose(restoration.quiet_noise(noise), 0.1, rtol=0.03)
    white = np.arange(128)[:, None, None] < 40
    clipped = np.where(white, 1.0, noise)
    np.testing.assert_allclose(restoration.quiet_noise(clipped), 0.1, rtol=0.05)
    textured = noise + 0.5 * rng.standard_normal(noise.shape) * ~white
    np.testing.assert_allclose(restoration.quiet_noise(textured), 0.1, rtol=0.05)


def test_noise_is_no_more_than_the_most_that_it_can_be():
    images = states(1.0, 0.2)
    estimate_to = jax.jit(
        lambda x, most: restoration.estimate_levels(x, SPECTRUM, PHOTOS.mean, beta_max=most)
    )
    np.testing.assert_allclose(estimate_to(images, 5.0), estimate(images), rtol=1e-5)
    alpha, beta = estimate_to(images, 0.15)
    np.testing.assert_allclose(beta, 0.15, rtol=1e-9)
    best = scipy.optimize.minimize_scalar(
        lambda a: whittle((a, 0.15), images[0]), bounds=(0.2, 3), method="bounded"
    )
    np.testing.assert_allclose(alpha[0], best.x, rtol=1e-4)


def test_a_jpeg_shows_its_blocks():
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.standard_normal((128, 160)), 3)
    pixels = np.clip(128 + 400 * smooth, 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=30)
    images = np.stack([pixels, np.asarray(Image.open(content))])[..., None] / 127.5 - 1
    before, after = restoration.block_edges(images)
    assert before < 5 < after
