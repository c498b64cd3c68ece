"""The DCT and the blur against scipy, and against what a Gaussian blur must satisfy."""

import jax
import numpy as np
import pytest
import scipy.ndimage

from tests.core import closed_forms
from warm_diffusion import dct

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = [(2, 7, 3), (2, 1, 4, 4), (1, 7, 5, 3), (2, 3, 4, 5, 2)]
forward, inverse, blur = jax.jit(dct.dct), jax.jit(dct.idct), jax.jit(dct.blur)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@each_shape
def test_the_transform_and_its_inverse_are_scipys(shape):
    x = images(shape)
    np.testing.assert_allclose(forward(x), closed_forms.dct(x), atol=1e-13)
    np.testing.assert_allclose(inverse(x), closed_forms.idct(x), atol=1e-13)


@each_shape
def test_eigenvalues_transfer_and_blur_follow_their_formulas(shape):
    sizes, alpha = shape[1:-1], np.linspace(0.3, 2.0, shape[0])
    np.testing.assert_allclose(dct.eigenvalues(*sizes), closed_forms.eigenvalues(*sizes))
    for level in (0.7, alpha):
        expected = closed_forms.transfer(level, *sizes)
        np.testing.assert_allclose(dct.transfer(level, *sizes), expected, rtol=1e-12)
        x = images(shape)
        np.testing.assert_allclose(blur(x, level), closed_forms.blur(x, level), atol=1e-13)


def test_the_blur_is_scipys_gaussian_filter_with_reflecting_borders():
    # A sampled kernel of 1.5 pixels or more is the continuous Gaussian to 1e-7.
    x = images((2, 14, 11, 2))
    for alpha in (1.5, 2.5):
        expected = scipy.ndimage.gaussian_filter(
            x, (0, alpha, alpha, 0), mode="reflect", truncate=9
        )
        np.testing.assert_allclose(blur(x, alpha), expected, atol=2e-6)


@pytest.mark.parametrize(("alpha", "share"), [(0.5, 0.24), (0.3, 0.93)])
def test_below_a_pixel_scipys_sampled_kernel_is_another_operator(alpha, share):
    # The two figures of dct.py: the difference in units of what the blur does, to white noise.
    x = np.random.default_rng(0).standard_normal((1, 32, 32, 1))
    sampled = scipy.ndimage.gaussian_filter(x, (0, alpha, alpha, 0), mode="reflect", truncate=9)
    found = np.linalg.norm(blur(x, alpha) - sampled) / np.linalg.norm(blur(x, alpha) - x)
    assert abs(found - share) < 0.02


@each_shape
def test_the_blur_is_a_semigroup_that_keeps_the_mean_and_never_grows(shape):
    x = images(shape)
    both = blur(blur(x, 0.6), 0.8)
    np.testing.assert_allclose(both, blur(x, 1.0), atol=1e-13)  # 0.6^2 + 0.8^2 = 1
    axes = tuple(range(1, len(shape) - 1))
    np.testing.assert_allclose(both.mean(axis=axes), x.mean(axis=axes), atol=1e-13)
    assert np.linalg.norm(both) <= np.linalg.norm(x)
    np.testing.assert_allclose(blur(x, 0.0), x, atol=1e-13)


def test_float32_is_accurate_to_float32():
    x = images((2, 16, 12, 3))
    small = np.asarray(x, np.float32)
    np.testing.assert_allclose(dct.idct(dct.dct(small)), small, atol=2e-6)
    np.testing.assert_allclose(dct.blur(small, 0.7), closed_forms.blur(x, 0.7), atol=2e-6)
