"""The paths that the data or a range of ratios choose, against power laws and drawn frequencies."""

import math

import jax
import numpy as np
import pytest
import scipy.stats

from tests.core.closed_forms import eigenvalues, rings, rough_spectrum
from warm_diffusion import schedules, spectra

pytestmark = pytest.mark.usefixtures("x64")

# --- spectral ------------------------------------------------------------------------------------

T = np.geomspace(0.002, 80.0, 200)


def power_law(gamma, size, scale=0.3):
    """S = scale f^-gamma with lambda = f^2; DC, of which no blur takes anything: 1."""
    eigen = eigenvalues(*size)
    return np.divide(scale, eigen ** (gamma / 2), out=np.ones_like(eigen), where=eigen > 0)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (12, 20)])
@pytest.mark.parametrize("attenuation", [0.01, 0.05, 0.5])
def test_a_spectrum_of_one_over_f_squared_gives_a_constant_ratio(size, attenuation):
    # exp(-lambda rho^2 S / 2) = 1 - attenuation with lambda S = 0.3 everywhere; 5 % is the promise.
    path = schedules.spectral(power_law(2.0, size), attenuation)
    expected = math.sqrt(-2 * math.log(1 - attenuation) / 0.3)
    np.testing.assert_allclose(path.bnr(T), np.full(T.size, expected), rtol=0.05)


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_another_power_law_gives_another_power_of_the_noise(gamma):
    # Method section 5: S ~ f^-gamma gives alpha ~ beta^(2 / gamma), between the noise levels at
    # which it takes over the highest and the lowest frequency.
    spectrum = power_law(gamma, (32, 32))
    low, high = np.sqrt(spectrum[-1, -1]), np.sqrt(spectrum[0, 1])
    t = np.geomspace(1.5 * low, high / 1.5, 20)
    slope = np.polyfit(np.log(t), np.log(schedules.spectral(spectrum).alpha(t)), 1)[0]
    assert abs(slope - 2 / gamma) < 0.05 * 2 / gamma


def test_outside_the_data_the_ratio_stays():
    # Less noise than the weakest frequency has, more than the strongest.
    path = schedules.spectral(power_law(3.0, (8, 8)))
    for ends in ([0.002, 0.003, 0.01], [20.0, 50.0, 80.0]):
        ratios = np.asarray(path.bnr(np.array(ends)))
        np.testing.assert_allclose(ratios, ratios[:1].repeat(3), rtol=1e-6)
    assert path.bnr(0.002) > 1.5 * path.bnr(80.0)


def worst_attenuation(path, spectrum):
    """Largest share of a ring that blur has taken when noise reaches that ring's mean power."""
    ring, eigen = rings(*spectrum.shape), eigenvalues(*spectrum.shape)
    worst = 0.0
    for k in range(1, ring.max() + 1):
        power = np.mean(spectrum[ring == k]) if np.any(ring == k) else 0.0
        if power > 0:
            exponent = path.alpha(math.sqrt(power)) ** 2 / 2 / np.mean(1 / eigen[ring == k])
            worst = max(worst, float(1 - np.exp(-exponent)))
    return worst


@pytest.mark.parametrize("attenuation", [0.01, 0.05, 0.3])
def test_blur_takes_no_more_than_the_attenuation_of_what_is_still_visible(attenuation):
    # And in some ring as much: up to the rounding of the corners.
    spectrum = rough_spectrum()
    worst = worst_attenuation(schedules.spectral(spectrum, attenuation), spectrum)
    assert 0.85 * attenuation < worst < 1.25 * attenuation


def digits_spectrum():
    from sklearn.datasets import load_digits

    return np.asarray(spectra.power_spectrum(load_digits().images[..., None] / 8 - 1))


def test_the_digits_have_a_spectral_path_near_their_recommended_ratio():
    # recommend_bnr is the ratio for the worst ring: the path goes from about there upwards.
    spectrum = digits_spectrum()
    path, ratio = schedules.spectral(spectrum), spectra.recommend_bnr(spectrum)
    assert np.all(np.diff(path.alpha(T)) > 0)
    assert ratio < path.bnr(T).min() < path.bnr(T).max() < 2 * ratio


def test_a_path_may_be_chosen_by_the_data_inside_a_jitted_function():
    spectrum = rough_spectrum()
    chosen = jax.jit(
        lambda t: (schedules.spectral(spectrum).alpha(t), spectra.recommend_bnr(spectrum) * t)
    )(0.7)
    expected = schedules.spectral(spectrum).alpha(0.7), spectra.recommend_bnr(spectrum) * 0.7
    np.testing.assert_allclose(chosen, expected, rtol=1e-12)


def test_one_frequency_alone_decides_everywhere():
    spectrum = np.zeros((6, 6))
    spectrum[0, 2] = 0.7
    path = schedules.spectral(spectrum)
    np.testing.assert_allclose(path.bnr(T), np.full(T.size, path.bnr(1.0)), rtol=1e-12)


# --- any_bnr -------------------------------------------------------------------------------------


def test_any_bnr_trains_at_log_uniform_ratios_and_a_share_of_none():
    path = schedules.any_bnr(0.5, (0.2, 5.0), hot_share=0.3)
    alpha, beta = path.sample_levels(jax.random.key(0), (20_000,))
    ratios = np.asarray(alpha / beta)
    share = np.mean(ratios == 0)
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / ratios.size)
    uniform = np.log(ratios[ratios > 0] / 0.2) / np.log(5.0 / 0.2)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert 0 <= uniform.min() < 1e-3 < 1 - 1e-3 < uniform.max() <= 1


def test_any_bnr_draws_noise_levels_as_ever_and_apart_from_the_ratio():
    path = schedules.any_bnr(hot_share=0.0, p_mean=0.3, p_std=0.5)
    alpha, beta = path.sample_levels(jax.random.key(0), (20_000,))
    assert scipy.stats.kstest(np.log(beta), scipy.stats.norm(0.3, 0.5).cdf).pvalue > 1e-4
    correlation = np.corrcoef(np.log(beta), np.log(alpha / beta))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(20_000)


def test_every_other_path_trains_on_itself():
    path = schedules.blurring_diffusion()
    alpha, beta = path.sample_levels(jax.random.key(3), (50,))
    t = path.sample_time(jax.random.key(3), (50,))
    np.testing.assert_array_equal(alpha, path.alpha(t))
    np.testing.assert_array_equal(beta, path.beta(t))
