"""Closed-form denoisers against linear-Gaussian conditioning and brute-force posteriors."""

import jax
import numpy as np
import pytest

from tests.core.closed_forms import blur, dct, gaussian_data, natural_spectrum
from warm_diffusion import oracle

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (3, 4, 2)
DATA = gaussian_data(*SIZE)
LEVELS = [(0.0, 0.5), (0.7, 0.2), (2.0, 3.0), (0.5, 1e-3)]


def normal(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SIZE))


def condition(mean, spectrum, x, alpha, beta):
    """E[x0 | x] of one state by dense matrices: x = B x0 + beta eps, x0 ~ N(mean, C)."""
    unit = np.eye(24).reshape(24, *SIZE)
    basis = dct(unit).reshape(24, 24).T  # columns: transforms of the unit images
    covariance = basis.T @ np.diag(np.broadcast_to(spectrum, SIZE).ravel()) @ basis
    blurring = blur(unit, alpha).reshape(24, 24).T
    gain = covariance @ blurring.T
    gain = gain @ np.linalg.inv(blurring @ covariance @ blurring.T + beta**2 * np.eye(24))
    return (mean.ravel() + gain @ (x.ravel() - blurring @ mean.ravel())).reshape(SIZE)


@pytest.mark.parametrize("spectrum", [DATA.spectrum, natural_spectrum(3, 4)], ids=["HWC", "HW"])
@pytest.mark.parametrize(("alpha", "beta"), LEVELS)
def test_gaussian_equals_dense_conditioning(alpha, beta, spectrum):
    x = normal(2)
    per_channel = spectrum if spectrum.ndim == 3 else spectrum[:, :, None]
    clean = np.stack([condition(DATA.mean, per_channel, each, alpha, beta) for each in x])
    prediction = jax.jit(oracle.gaussian(DATA.mean, spectrum))(x, alpha, beta)
    np.testing.assert_allclose(prediction.blurry, blur(clean, alpha), atol=1e-9)
    np.testing.assert_allclose(prediction.residual, clean - blur(clean, alpha), atol=1e-9)


def brute_force(images, x, alpha, beta):
    """E[x0 | x] of one state for x0 uniform over `images`: every weight by its Gaussian."""
    likelihood = [np.exp(-np.sum((x - blur(each, alpha)) ** 2) / (2 * beta**2)) for each in images]
    weights = np.array(likelihood) / np.sum(likelihood)
    return sum(w * each for w, each in zip(weights, images, strict=True))


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.5), (0.7, 1.0), (2.0, 3.0)])
def test_mixture_equals_the_brute_force_posterior(alpha, beta):
    images, x = normal(5, seed=1), normal(2)
    clean = np.stack([brute_force(images, each, alpha, beta) for each in x])
    prediction = jax.jit(oracle.mixture(images))(x, alpha, beta)
    np.testing.assert_allclose(prediction.blurry, blur(clean, alpha), atol=1e-12)
    np.testing.assert_allclose(prediction.residual, clean - blur(clean, alpha), atol=1e-12)


def test_a_mixture_of_one_image_is_that_image():
    image = normal(1, seed=1)
    prediction = jax.jit(oracle.mixture(image))(normal(2), 0.7, 0.1)
    expected = np.concatenate([image, image])
    np.testing.assert_allclose(prediction.clean, expected, atol=1e-13)
    np.testing.assert_allclose(prediction.blurry, blur(expected, 0.7), atol=1e-13)


def test_mixture_at_little_noise_is_the_nearest_image():
    # Far from every image all Gaussians are 0 in floating point: the weights must not be 0 / 0.
    images = normal(5, seed=1)
    x = blur(images[3:4], 0.5) + 0.1
    prediction = jax.jit(oracle.mixture(images))(x, 0.5, 1e-4)
    np.testing.assert_allclose(prediction.clean, images[3:4], atol=1e-12)


@pytest.mark.parametrize(
    "denoise",
    [oracle.gaussian, lambda *_: oracle.mixture(normal(5, seed=1))],
    ids=["gaussian", "mixture"],
)
def test_levels_may_differ_between_images(denoise):
    denoise = jax.jit(denoise(DATA.mean, DATA.spectrum))
    x, alpha, beta = normal(2), np.array([0.3, 1.5]), np.array([2.0, 0.9])
    together = denoise(x, alpha, beta)
    for i in range(2):
        alone = denoise(x[i : i + 1], alpha[i], beta[i])
        np.testing.assert_allclose(together.blurry[i : i + 1], alone.blurry, atol=1e-13)
        np.testing.assert_allclose(together.residual[i : i + 1], alone.residual, atol=1e-13)


def test_data_without_variance_are_their_mean():
    prediction = oracle.gaussian(DATA.mean, np.zeros((3, 4)))(normal(1), 0.7, 0.2)
    np.testing.assert_allclose(prediction.clean[0], DATA.mean, atol=1e-13)


@pytest.mark.parametrize(
    ("mean", "spectrum"), [((3, 4), (3, 4)), ((3, 4, 2), (4, 3)), ((3, 4, 2), (3, 4, 1))]
)
def test_gaussian_refuses_shapes_that_do_not_fit(mean, spectrum):
    message = rf"got \({', '.join(map(str, mean))}\) and \({', '.join(map(str, spectrum))}\)"
    with pytest.raises(ValueError, match=message):
        oracle.gaussian(np.zeros(mean), np.ones(spectrum))


def test_mixture_refuses_a_single_image():
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, C\], got \(3, 4, 2\)"):
        oracle.mixture(np.zeros(SIZE))
