"""Spectra at other sizes, by frequency, against closed forms."""

import numpy as np
import pytest
import scipy.ndimage

from tests.core.closed_forms import dct, eigenvalues
from warm_diffusion.sizes import spectrum_at

pytestmark = pytest.mark.usefixtures("x64")


def photographic(height, width, mean=7.0):
    """1 / lambda, and the power of a mean of variance `mean`."""
    eigen = eigenvalues(height, width)
    eigen[0, 0] = 1 / (mean * height * width)
    return 1 / eigen


def stationary(count, height, width, seed=0):
    """Cuts of much larger random fields, smoother along rows than along columns."""
    noise = np.random.default_rng(seed).standard_normal((count, height + 12, width + 12))
    field = scipy.ndimage.gaussian_filter(noise, (0, 0.6, 1.2), mode="wrap")
    return field[:, 6:-6, 6:-6, None]


def variance(images):
    return dct(images).var(axis=(0, 3))


# --- the spectrum --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (12, 16), (9, 31), (3, 5), (1, 8), (40, 7)])
def test_one_over_f_squared_is_the_same_law_at_every_size(size):
    np.testing.assert_allclose(spectrum_at(photographic(6, 8), *size), photographic(*size))


def test_the_own_size_is_left_as_it_is():
    spectrum = np.random.default_rng(0).uniform(0, 1, (5, 4))
    np.testing.assert_array_equal(spectrum_at(spectrum, 5, 4), spectrum)


def test_lambda_times_the_spectrum_is_linear_in_frequency_and_then_stays():
    """By eq. (1) exactly, but below the first frequencies of both axes, where 1 / f^2 goes on."""

    def linear(height, width):
        down = np.minimum(np.arange(height) / height, 5 / 6)[:, None]
        across = np.minimum(np.arange(width) / width, 7 / 8)
        eigen = eigenvalues(height, width)
        eigen[0, 0] = np.inf
        return (2 + 3 * down + 5 * across) / eigen

    found = np.array(spectrum_at(linear(6, 8), 20, 21))
    known = np.ones((20, 21), bool)
    known[:4, :3] = False  # i / 20 < 1 / 6, j / 21 < 1 / 8
    np.testing.assert_allclose(found[known], linear(20, 21)[known])


@pytest.mark.parametrize("size", [(40, 60), (25, 22)])
def test_a_stationary_field_has_the_spectrum_that_cuts_of_another_size_tell(size):
    """Measured on both, within a fifth on average, over three orders of magnitude of power."""
    told = np.asarray(spectrum_at(variance(stationary(1500, 20, 20)), *size))
    found = variance(stationary(500, *size, seed=1))
    # What the cut's edges leak is not of the field; it shows in the highest frequencies of a
    # smooth one. Below a thousandth of the largest power it is most of it.
    visible = found > 1e-3 * found.max()
    assert np.mean(np.abs(np.log(told / found))[visible]) < 0.2
    assert found[visible].max() / found[visible].min() > 500


def test_the_power_of_the_mean_grows_with_the_area():
    assert float(spectrum_at(np.ones((4, 4)), 8, 12)[0, 0]) == 6.0


def test_a_spectrum_with_channels_is_refused():
    with pytest.raises(ValueError, match=r"expected a spectrum \[H, W\], got \(4, 4, 1\)"):
        spectrum_at(np.ones((4, 4, 1)), 8, 8)
