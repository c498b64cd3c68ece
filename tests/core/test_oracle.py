"""The closed-form denoisers against independent formulas, quadrature and simulation."""

import jax
import numpy as np
import pytest

from tests.core.closed_forms import blur, gaussian_data
from warm_diffusion import oracle

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("shape", [(7, 2), (6, 5, 2), (4, 3, 5, 2)], ids=["1", "2", "3"])
def test_the_gaussian_denoiser_is_the_posterior_mean(shape):
    data = gaussian_data(*shape)
    x = 2 * np.random.default_rng(0).standard_normal((3, *shape))
    alpha, beta = np.array([0.0, 0.5, 2.0]), np.array([0.1, 1.0, 3.0])
    denoise = jax.jit(oracle.gaussian(data.mean, data.spectrum))
    for part, expected in zip(
        denoise(x, alpha, beta), data.posterior_means(x, alpha, beta), strict=True
    ):
        np.testing.assert_allclose(part, expected, atol=1e-12)


def test_one_spectrum_may_serve_all_channels():
    data = gaussian_data(6, 5, 2)
    one = data.spectrum[..., 0]
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 2))
    both = oracle.gaussian(data.mean, np.repeat(one[..., None], 2, axis=-1))(x, 0.5, 0.3)
    np.testing.assert_allclose(oracle.gaussian(data.mean, one)(x, 0.5, 0.3).clean, both.clean)


def test_the_mixture_denoiser_weighs_images_by_their_likelihood():
    # Eq. (2) in pixels, by scipy's blur; levels differ per image.
    rng = np.random.default_rng(1)
    images, x = rng.uniform(-1, 1, (4, 6, 5, 2)), rng.standard_normal((3, 6, 5, 2))
    alpha, beta = np.array([0.0, 0.7, 1.5]), np.array([0.3, 1.0, 2.0])
    found = jax.jit(oracle.mixture(images))(x, alpha, beta)
    for i in range(3):
        blurred = blur(images, alpha[i])
        logs = -np.sum((x[i] - blurred) ** 2, axis=(1, 2, 3)) / (2 * beta[i] ** 2)
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        np.testing.assert_allclose(found.blurry[i], np.tensordot(weights, blurred, 1), atol=1e-12)
        np.testing.assert_allclose(found.clean[i], np.tensordot(weights, images, 1), atol=1e-12)


def test_the_mixture_denoiser_is_stable_where_weights_vanish():
    images = np.stack([np.full((8, 8, 1), -1.0), np.full((8, 8, 1), 1.0)])
    found = oracle.mixture(images)(images + 0.01, 0.0, 1e-4)
    np.testing.assert_allclose(found.clean, images, atol=1e-12)
