"""The levels of an image against scipy's minimiser, Monte Carlo and the theory of estimation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tests.core.closed_forms import blur, dct, eigenvalues, gaussian_data, transfer
from warm_diffusion import restoration

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (16, 12, 2)
DATA = gaussian_data(*SIZE)
SPECTRUM = DATA.spectrum[:, :, 0]
COUNT = 128


def states(alpha, beta, count=COUNT, contrast=1.0, seed=0):
    """Forward states of Gaussian data whose channels have one spectrum."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, count, *SIZE))
    spectrum = contrast * np.repeat(SPECTRUM[:, :, None], SIZE[2], axis=2)
    data = type(DATA)(DATA.mean, spectrum)
    return blur(data.draw(rng, count), alpha) + beta * noise[1]


estimate = jax.jit(lambda x: restoration.estimate_levels(x, SPECTRUM, DATA.mean))
estimate_with_contrast = jax.jit(
    lambda x: restoration.estimate_levels(x, SPECTRUM, DATA.mean, contrast=True)
)
estimate_without_mean = jax.jit(lambda x, spectrum: restoration.estimate_levels(x, spectrum))
errors = jax.jit(lambda x, a, b: restoration.level_errors(x, SPECTRUM, a, b, DATA.mean))


def whittle(theta, image):
    """Method section 10 for one image, the mean image blurred as well."""
    alpha, beta = theta
    m = transfer(alpha, *SIZE[:2])
    power = np.mean((dct(image[None]) - m * dct(DATA.mean[None]))[0] ** 2, axis=-1)
    v = m[:, :, 0] ** 2 * SPECTRUM + beta**2
    return np.sum(np.log(v) + power / v)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.1), (1.5, 0.3), (2.0, 0.02)])
def test_levels_minimise_the_whittle_likelihood(alpha, beta):
    images = states(alpha, beta)
    found = np.stack(estimate(images), axis=1)
    for image, theta in zip(images[:4], found[:4], strict=True):
        best = scipy.optimize.minimize(
            whittle, (alpha, beta), (image,), "Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-11}
        )
        np.testing.assert_allclose(theta, np.abs(best.x), rtol=1e-4)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.1), (1.5, 0.3), (2.0, 0.02)])
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
    mean = DATA.mean[..., :1]
    error = jax.jit(lambda x, mean: restoration.level_errors(x, SPECTRUM, 1.0, 0.2, mean))
    np.testing.assert_allclose(
        error(images.repeat(3, 3), mean.repeat(3, 2)), error(images, mean), rtol=1e-9
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (1.0, 0.0), (0.0, 0.0)])
def test_levels_may_be_zero(alpha, beta):
    images = states(alpha, beta, count=16)
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
        lambda x, **level: restoration.estimate_levels(x, SPECTRUM, DATA.mean, **level)
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
    f = jax.jit(lambda x: restoration.estimate_levels(x, SPECTRUM, DATA.mean)[0][0])
    slope = np.vdot(jax.jit(jax.grad(f))(image), direction)
    step = 1e-4
    difference = (f(image + step * direction) - f(image - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def test_images_are_estimated_one_by_one():
    images = states(1.0, 0.2)[:4]
    together = np.stack(estimate(states(1.0, 0.2)))[:, :4]
    alone = jax.jit(
        jax.vmap(lambda x: jnp.stack(restoration.estimate_levels(x[None], SPECTRUM, DATA.mean)))
    )
    np.testing.assert_allclose(together, np.asarray(alone(images))[:, :, 0].T, rtol=1e-6)


def test_without_a_mean_the_brightness_says_nothing():
    images = states(1.0, 0.2, count=2)
    one, other = (estimate_without_mean(x, SPECTRUM) for x in (images, images + 0.7))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_spectrum_of_another_size_serves_by_frequency():
    # lambda S = 2 at every size: the spectrum carried over is the images' own.
    small = 2 / np.maximum(eigenvalues(8, 8), 0.01)
    rng = np.random.default_rng(0)
    own = 2 / np.maximum(eigenvalues(*SIZE[:2]), 0.01)
    data = type(DATA)(np.zeros(SIZE), np.repeat(own[:, :, None], 2, axis=2))
    images = blur(data.draw(rng, 2), 1.0) + 0.1 * rng.standard_normal((2, *SIZE))
    one, other = (estimate_without_mean(images, spectrum) for spectrum in (small, own))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "spectrum", "mean", "options", "message"),
    [
        ((16, 12), (16, 12), None, {}, r"images must be \[B, \*spatial, C\], got \(16, 12\)"),
        ((2, *SIZE), (16, 12, 2), None, {}, r"a spectrum of 2 axes, got \(16, 12, 2\)"),
        ((2, *SIZE), (16, 12), (16, 12, 3), {}, r"mean image must be \(16, 12, 2\).*leave it out"),
        ((2, *SIZE), (16, 12), None, {"alpha": np.ones(3)}, r"must be a scalar or shape \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused(images, spectrum, mean, options, message):
    mean = None if mean is None else np.zeros(mean)
    with pytest.raises(ValueError, match=message):
        restoration.estimate_levels(np.zeros(images), np.ones(spectrum), mean, **options)
