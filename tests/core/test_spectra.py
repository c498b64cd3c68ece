"""Power spectra of images whose spectrum is known, and the ratio that they recommend."""

import io
import math
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tests.core.closed_forms import (
    GaussianData,
    blur,
    difference_step,
    eigenvalues,
    natural_spectrum,
    rings,
    rough_spectrum,
    transfer,
)
from tests.core.closed_forms import dct as scipy_dct
from warm_diffusion import schedules, spectra
from warm_diffusion.app.analyze import manifold
from warm_diffusion.denoiser import Prediction

pytestmark = pytest.mark.usefixtures("x64")

SIZES = [(16, 16), (12, 20), (20, 12)]
each_size = pytest.mark.parametrize("size", SIZES)


def exact_spectrum(height, width, scale=0.3):
    """S = c / lambda, for which m_k of eq. (2) is exp(-rho^2 c / 2) in every band; DC: 1."""
    eigen = eigenvalues(height, width)
    return np.divide(scale, eigen, out=np.ones_like(eigen), where=eigen > 0)


def radii(height, width):
    """Frequency of every coefficient in cycles per pixel, and its ring, typed anew."""
    i, j = np.indices((height, width))
    radius = np.sqrt((i / height) ** 2 + (j / width) ** 2)
    return radius / 2, np.round(radius * max(height, width)).astype(int)


# --- power_spectrum ------------------------------------------------------------------------------


def test_power_spectrum_is_the_variance_of_every_coefficient():
    # Gaussian images of a known spectrum, one mean image in all channels: 4,000 * 2 samples.
    spectrum = natural_spectrum(6, 5)
    mean = np.random.default_rng(1).uniform(-1, 1, (6, 5, 1)) * np.ones(2)
    data = GaussianData(mean, spectrum[:, :, None] * np.ones(2))
    x = data.draw(np.random.default_rng(0), 4000)
    measured = np.asarray(spectra.power_spectrum(x))
    assert np.all(np.abs(measured / spectrum - 1) < 5 * np.sqrt(2 / 8000))


def test_power_spectrum_equals_numpys_variance_of_scipys_coefficients():
    x = np.random.default_rng(0).uniform(-1, 1, (7, 6, 5, 3))
    expected = np.var(scipy_dct(x), axis=(0, 3))
    np.testing.assert_allclose(spectra.power_spectrum(x), expected, rtol=1e-11)


def test_the_mean_of_the_spectrum_is_the_variance_of_a_pixel():
    # Parseval; grey images, so that there is one mean image.
    x = np.random.default_rng(0).uniform(-1, 1, (7, 6, 5, 1))
    variance = np.mean(np.var(x, axis=0))
    np.testing.assert_allclose(np.mean(spectra.power_spectrum(x)), variance, rtol=1e-12)


# --- radial_mean ---------------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize("exponent", [1.0, 2.2])
def test_radial_mean_finds_the_slope_of_a_power_law(size, exponent):
    frequency = radii(*size)[0]
    spectrum = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** -exponent, 1.0)
    ring, mean = (np.asarray(part)[2:] for part in spectra.radial_mean(spectrum))
    slope = np.polyfit(np.log(ring), np.log(mean), 1)[0]
    assert abs(slope + exponent) < 0.05


@each_size
def test_radial_mean_averages_over_rings_of_equal_frequency(size):
    spectrum = np.random.default_rng(0).uniform(0, 1, size)
    radius, ring = radii(*size)
    frequency, mean = spectra.radial_mean(spectrum)
    rings = np.unique(ring)
    expected = [np.mean(spectrum[ring == k]) for k in rings]
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(
        frequency, [np.mean(radius[ring == k]) for k in rings], rtol=1e-12, atol=1e-15
    )


@each_size
def test_the_mean_of_the_image_is_alone_in_the_first_ring(size):
    spectrum = np.zeros(size)
    spectrum[0, 0] = 3.0
    frequency, mean = spectra.radial_mean(spectrum)
    assert frequency[0] == 0
    assert mean[0] == 3
    assert np.all(mean[1:] == 0)


@each_size
def test_rings_keep_the_total_power(size):
    spectrum = np.random.default_rng(0).uniform(0, 1, size)
    counts = np.unique(radii(*size)[1], return_counts=True)[1]
    total = np.sum(counts * np.asarray(spectra.radial_mean(spectrum)[1]))
    np.testing.assert_allclose(total, np.sum(spectrum), rtol=1e-12)


@each_size
def test_rings_reach_from_the_mean_to_the_corner(size):
    # The corner's frequency is sqrt(2) / 2 cycles per pixel, less one coefficient of each axis.
    frequency, _ = spectra.radial_mean(np.ones(size))
    assert np.all(np.diff(frequency) > 0)
    corner = math.hypot((size[0] - 1) / size[0], (size[1] - 1) / size[1]) / 2
    assert corner - 1 / max(size) < frequency[-1] <= corner


# --- recommend_bnr -------------------------------------------------------------------------------


@each_size
@pytest.mark.parametrize("attenuation", [0.01, 0.05, 0.5])
def test_recommended_ratio_of_an_exact_power_law_is_analytic(size, attenuation):
    # 1 - exp(-rho^2 c / 2) = attenuation in every band.
    expected = math.sqrt(-2 * math.log(1 - attenuation) / 0.3)
    ratio = spectra.recommend_bnr(exact_spectrum(*size), attenuation)
    assert isinstance(ratio, float)
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)


def test_the_worst_band_decides():
    # One ring with four times the power of the law around it: half the ratio.
    spectrum, ring = exact_spectrum(16, 16), radii(16, 16)[1]
    louder = np.where(ring == 5, 4 * spectrum, spectrum)
    np.testing.assert_allclose(
        spectra.recommend_bnr(louder), spectra.recommend_bnr(spectrum) / 2, rtol=1e-9
    )


def test_the_ratio_is_in_pixels_per_unit_of_noise():
    # Images of ten times the contrast drown in ten times the noise: a tenth of the ratio.
    spectrum = natural_spectrum(16, 16)
    np.testing.assert_allclose(
        spectra.recommend_bnr(100 * spectrum), spectra.recommend_bnr(spectrum) / 10, rtol=1e-9
    )


def test_the_brightness_of_the_images_does_not_matter():
    spectrum = natural_spectrum(16, 16)
    brighter = spectrum.copy()
    brighter[0, 0] = 1e6
    assert spectra.recommend_bnr(brighter) == spectra.recommend_bnr(spectrum)


def test_more_attenuation_allows_a_larger_ratio():
    spectrum = natural_spectrum(16, 16)
    ratios = [spectra.recommend_bnr(spectrum, share) for share in (0.001, 0.01, 0.05, 0.3, 0.9)]
    assert np.all(np.diff(ratios) > 0)


@pytest.mark.parametrize("bnr", [0.1, 0.5, 3.0])
def test_least_kept_is_what_the_worst_ring_keeps(bnr):
    # exp(-lambda bnr^2 S / 2) averaged over each ring, in numpy; also inside a jitted function.
    spectrum, ring = rough_spectrum(), rings(12, 10)
    kept = np.exp(-eigenvalues(12, 10) * bnr**2 * spectrum / 2)
    expected = min(kept[ring == k].mean() for k in np.unique(ring))
    least = spectra.least_kept(spectrum, bnr)
    assert isinstance(least, float)
    np.testing.assert_allclose(least, expected, rtol=1e-12)
    traced = jax.jit(lambda t: t * spectra.least_kept(spectrum, bnr))(2.0)
    np.testing.assert_allclose(traced, 2 * expected, rtol=1e-12)


def test_without_blur_everything_is_kept():
    assert spectra.least_kept(rough_spectrum(), 0.0) == 1.0


def test_at_the_recommended_ratio_the_worst_ring_keeps_the_rest_of_the_attenuation():
    spectrum = natural_spectrum(16, 16)
    ratio = spectra.recommend_bnr(spectrum, 0.1)
    np.testing.assert_allclose(spectra.least_kept(spectrum, ratio), 0.9, rtol=1e-9)


def cifar10_images(archive, every):
    """Every n-th training image [N, 32, 32, 3] in [-1, 1]: the archive is sorted by class."""
    image = pytest.importorskip("PIL.Image", reason="reading the images needs Pillow")
    chosen, count = [], 0
    with tarfile.open(archive, "r|xz") as members:
        for member in members:
            if not member.isfile() or not member.name.startswith("train/"):
                continue
            if count % every == 0:
                with image.open(io.BytesIO(members.extractfile(member).read())) as picture:
                    chosen.append(np.asarray(picture))
            count += 1
            if count == 50_000:
                break
    return np.stack(chosen) / 127.5 - 1


@pytest.fixture(scope="module")
def cifar10_spectrum(shared_folder):
    archive = shared_folder / "data" / "cifar10_jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs CIFAR-10 as images ({archive}): not there")
    x = cifar10_images(archive, every=16)
    assert x.shape == (3125, 32, 32, 3)
    return np.asarray(spectra.power_spectrum(jnp.asarray(x, jnp.float32)))


def test_cifar10_recommends_about_the_papers_best_ratio(cifar10_spectrum):
    # Warm Diffusion finds 0.5 by search; the spectrum of 10,000 images gave 0.53 (method, sec. 5).
    assert abs(spectra.recommend_bnr(cifar10_spectrum) - 0.53) < 0.05


def test_cifar10_has_a_spectral_path_near_the_papers_best_ratio(cifar10_spectrum):
    # Its spectrum falls as f^-2.2 up to mid frequencies, then faster: the ratio is about 0.5 to 0.8
    # where noise takes over those (method, sec. 5), larger where only fine detail is at stake.
    path = schedules.spectral(cifar10_spectrum)
    t = np.geomspace(0.002, 80.0, 400)
    assert np.all(np.diff(path.alpha(t)) > 0)
    middle = path.bnr(t[(t > 0.3) & (t < 80)])
    assert 0.48 < middle.min() < middle.max() < 1.1
    assert path.bnr(0.02) > 2.0


# --- spectral_departure --------------------------------------------------------------------------


def forward_states(alpha, beta, count=3000):
    rng = np.random.default_rng(0)
    spectrum = natural_spectrum(12, 10)
    x0 = GaussianData(np.zeros((12, 10, 1)), spectrum[:, :, None]).draw(rng, count)
    return blur(x0, alpha) + beta * rng.standard_normal(x0.shape), spectrum


def standard_errors(spectrum, alpha, beta, count=3000):
    """Of ln(ring's mean power): the ring's mean has variance 2 sum v^2 / (N K^2)."""
    variance = transfer(alpha, 12, 10)[..., 0] ** 2 * spectrum + beta**2
    ring = radii(12, 10)[1]
    return np.array(
        [
            math.sqrt(2 / count * np.sum(variance[ring == k] ** 2)) / np.sum(variance[ring == k])
            for k in np.unique(ring)
        ]
    )


def test_forward_states_have_not_departed():
    x, spectrum = forward_states(0.8, 0.3)
    _, departure = spectra.spectral_departure(x, spectrum, 0.8, 0.3)
    assert np.all(np.abs(departure) < 5 * standard_errors(spectrum, 0.8, 0.3))


@pytest.mark.parametrize("wrong", [(0.8, 0.4), (1.2, 0.3), (0.5, 0.3)])
def test_states_of_another_level_depart_by_the_ratio_of_powers(wrong):
    # ln of the ring's true power m^2 S + beta^2 over the one at the level that is claimed.
    x, spectrum = forward_states(0.8, 0.3)
    _, departure = spectra.spectral_departure(x, spectrum, *wrong)
    ring = radii(12, 10)[1]
    power = [
        np.array([np.mean(variance[ring == k]) for k in np.unique(ring)])
        for variance in (
            transfer(alpha, 12, 10)[..., 0] ** 2 * spectrum + beta**2
            for alpha, beta in ((0.8, 0.3), wrong)
        )
    ]
    expected = np.log(power[0] / power[1])
    errors = standard_errors(spectrum, 0.8, 0.3)
    assert np.all(np.abs(departure - expected) < 5 * errors)
    assert np.max(np.abs(departure) / errors) > 20


def test_states_of_any_size_have_a_departure():
    # The sampler starts at beta = 80, far from [-1, 1].
    x, spectrum = forward_states(0.0, 80.0, count=200)
    _, departure = spectra.spectral_departure(x, spectrum, 0.0, 80.0)
    assert np.all(np.abs(departure) < 5 * standard_errors(spectrum, 0.0, 80.0, count=200))


def test_departure_is_given_over_the_rings_of_radial_mean():
    x, spectrum = forward_states(0.8, 0.3, count=4)
    frequency, departure = jax.jit(spectra.spectral_departure)(x, spectrum, 0.8, 0.3)
    np.testing.assert_allclose(frequency, spectra.radial_mean(spectrum)[0], rtol=1e-13)
    assert departure.shape == frequency.shape


# --- analyze/manifold.py ------------------------------------------------------------------------


def test_images_of_one_pixel_are_as_far_apart_as_their_sorted_values():
    # W_2 of two samples on the line pairs them in order; both directions of the line say the same.
    x, y = np.random.default_rng(0).standard_normal((2, 50, 1, 1, 1))
    expected = np.sqrt(np.mean((np.sort(x.ravel()) - np.sort(3 + y.ravel())) ** 2))
    distance = manifold.sliced_wasserstein(x, 3 + y, jax.random.key(0), 4)
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_a_set_of_images_moved_by_a_vector_is_its_length_over_the_root_of_dimensions_away():
    # E (u . c)^2 = |c|^2 / D over the sphere, with variance 2 (D - 1) / (D^2 (D + 2)) |c|^4.
    x = np.random.default_rng(0).standard_normal((20, 3, 4, 2))
    move = np.random.default_rng(1).standard_normal((1, 3, 4, 2))
    square = float(manifold.sliced_wasserstein(x, x[::-1] + move, jax.random.key(0), 4000)) ** 2
    expected = np.sum(move**2) / 24
    error = expected * math.sqrt(2 * 23 / 26 / 4000)
    assert abs(square - expected) < 5 * error


def test_the_order_of_images_makes_no_distance():
    x = np.random.default_rng(0).standard_normal((20, 3, 4, 2))
    np.testing.assert_allclose(
        manifold.sliced_wasserstein(x, x[::-1], jax.random.key(0)), 0.0, atol=1e-13
    )


def test_contributions_of_the_heads_are_the_two_parts_of_a_step():
    # Method section 3 (`difference_step`): one part as if R were 0, the other the rest.
    x, blurry, residual = np.random.default_rng(0).standard_normal((3, 4, 6, 5, 2))
    start, end = (0.8, 0.6), (0.3, 0.25)
    first = difference_step(x, blurry, 0 * residual, start, end) - x
    second = difference_step(x, blurry, residual, start, end) - x - first
    prediction = Prediction(jnp.asarray(blurry), jnp.asarray(residual))
    heads, _ = manifold.heads(lambda *_: prediction, jnp.asarray(x), start, end)
    found = heads["denoiser"], heads["deblurrer"]
    ring = radii(6, 5)[1]
    for part, powers in zip((first, second), found, strict=True):
        power = np.mean(scipy_dct(part) ** 2, axis=(0, 3))
        expected = [power[ring == k].mean() for k in np.unique(ring)]
        np.testing.assert_allclose(powers, expected, rtol=1e-10, atol=1e-12)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attenuation", [0.0, 1.0, -0.1, math.nan])
def test_an_attenuation_that_is_no_share_is_refused(attenuation):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {attenuation}"):
        spectra.recommend_bnr(exact_spectrum(8, 8), attenuation)


@pytest.mark.parametrize(
    "spectrum",
    [np.ones(()), np.full((4, 4), -1.0), np.full((4, 4), np.nan), np.full((4, 4), np.inf)],
    ids=["number", "negative", "nan", "infinite"],
)
def test_what_is_no_spectrum_is_refused(spectrum):
    with pytest.raises(ValueError, match=r"finite spectrum \[\*spatial\] >= 0, got shape"):
        spectra.recommend_bnr(spectrum)


def test_images_without_detail_are_refused():
    flat = np.zeros((8, 8))
    flat[0, 0] = 2.0
    with pytest.raises(ValueError, match="no detail to blur"):
        spectra.recommend_bnr(flat)


def test_an_attenuation_that_no_blur_reaches_is_refused():
    # One coefficient of its ring of five varies: no blur removes more than a fifth of that ring.
    lonely = np.zeros((8, 8))
    lonely[0, 3] = 1.0
    assert np.sum(radii(8, 8)[1] == 3) == 5
    with pytest.raises(ValueError, match=r"no blur removes more than 0\.5 of any band"):
        spectra.recommend_bnr(lonely, 0.5)


def test_what_is_no_array_of_data_has_no_spectrum():
    with pytest.raises(ValueError, match=r"images must be \[B, \*spatial, C\], got \(8, 8\)"):
        spectra.power_spectrum(np.zeros((8, 8)))


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
    return scipy_dct(images).var(axis=(0, 3))


# --- spectrum_at --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 8), (12, 16), (9, 31), (3, 5), (1, 8), (40, 7)])
def test_one_over_f_squared_is_the_same_law_at_every_size(size):
    np.testing.assert_allclose(spectra.spectrum_at(photographic(6, 8), *size), photographic(*size))


def test_the_own_size_is_left_as_it_is():
    spectrum = np.random.default_rng(0).uniform(0, 1, (5, 4))
    np.testing.assert_array_equal(spectra.spectrum_at(spectrum, 5, 4), spectrum)


def test_lambda_times_the_spectrum_is_linear_in_frequency_and_then_stays():
    """By eq. (6) exactly, but below the first frequencies of both axes, where 1 / f^2 goes on."""

    def linear(height, width):
        down = np.minimum(np.arange(height) / height, 5 / 6)[:, None]
        across = np.minimum(np.arange(width) / width, 7 / 8)
        eigen = eigenvalues(height, width)
        eigen[0, 0] = np.inf
        return (2 + 3 * down + 5 * across) / eigen

    found = np.array(spectra.spectrum_at(linear(6, 8), 20, 21))
    known = np.ones((20, 21), bool)
    known[:4, :3] = False  # i / 20 < 1 / 6, j / 21 < 1 / 8
    np.testing.assert_allclose(found[known], linear(20, 21)[known])


@pytest.mark.parametrize("size", [(40, 60), (25, 22)])
def test_a_stationary_field_has_the_spectrum_that_cuts_of_another_size_tell(size):
    """Measured on both, within a fifth on average, over three orders of magnitude of power."""
    told = np.asarray(spectra.spectrum_at(variance(stationary(1500, 20, 20)), *size))
    found = variance(stationary(500, *size, seed=1))
    # What the cut's edges leak is not of the field; it shows in the highest frequencies of a
    # smooth one. Below a thousandth of the largest power it is most of it.
    visible = found > 1e-3 * found.max()
    assert np.mean(np.abs(np.log(told / found))[visible]) < 0.2
    assert found[visible].max() / found[visible].min() > 500


def test_the_power_of_the_mean_grows_with_the_area():
    assert float(spectra.spectrum_at(np.ones((4, 4)), 8, 12)[0, 0]) == 6.0


def test_a_spectrum_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"a spectrum of 2 axes, got \(4, 4, 1\)"):
        spectra.spectrum_at(np.ones((4, 4, 1)), 8, 8)


@pytest.mark.parametrize(("old", "new"), [((6,), (15,)), ((3, 4, 5), (6, 4, 9))])
def test_one_over_f_squared_is_the_same_law_in_one_and_three_dimensions(old, new):
    def law(*sizes):
        eigen = eigenvalues(*sizes)
        eigen.flat[0] = 1 / (7.0 * math.prod(sizes))
        return 1 / eigen

    np.testing.assert_allclose(spectra.spectrum_at(law(*old), *new), law(*new))
