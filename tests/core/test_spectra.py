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
    eigenvalues,
    natural_spectrum,
    rings,
    rough_spectrum,
    transfer,
)
from tests.core.closed_forms import dct as scipy_dct
from warm_diffusion import schedules, spectra

pytestmark = pytest.mark.usefixtures("x64")

each_size = pytest.mark.parametrize("size", [(16, 16), (12, 20)])


def exact_spectrum(height, width, scale=0.3):
    """S = c / lambda, for which m_k of eq. (2) is exp(-rho^2 c / 2) in every band; DC: 1."""
    eigen = eigenvalues(height, width)
    return np.divide(scale, eigen, out=np.ones_like(eigen), where=eigen > 0)


def radii(height, width):
    """Frequency of every coefficient in cycles per pixel, and its ring, typed anew."""
    i, j = np.indices((height, width))
    radius = np.sqrt((i / height) ** 2 + (j / width) ** 2)
    return radius / 2, np.round(radius * max(height, width)).astype(int)


def test_power_spectrum_equals_numpys_variance_of_scipys_coefficients():
    x = np.random.default_rng(0).uniform(-1, 1, (7, 6, 5, 3))
    expected = np.var(scipy_dct(x), axis=(0, 3))
    np.testing.assert_allclose(spectra.power_spectrum(x), expected, rtol=1e-11)


@each_size
def test_radial_mean_averages_over_rings_of_equal_frequency(size):
    # Of which the mean of the image is alone in the first, and the last is the corner's.
    spectrum = np.random.default_rng(0).uniform(0, 1, size)
    radius, ring = radii(*size)
    frequency, mean = spectra.radial_mean(spectrum)
    kept = np.unique(ring)
    expected = [np.mean(spectrum[ring == k]) for k in kept]
    np.testing.assert_allclose(mean, expected, rtol=1e-12)
    np.testing.assert_allclose(
        frequency, [np.mean(radius[ring == k]) for k in kept], rtol=1e-12, atol=1e-15
    )
    assert (frequency[0], mean[0]) == (0, spectrum[0, 0])
    assert np.all(np.diff(frequency) > 0)
    # The corner's frequency is sqrt(2) / 2 cycles per pixel, less one coefficient of each axis.
    corner = math.hypot((size[0] - 1) / size[0], (size[1] - 1) / size[1]) / 2
    assert corner - 1 / max(size) < frequency[-1] <= corner


@pytest.mark.parametrize(("size", "attenuation"), [((16, 16), 0.05), ((12, 20), 0.5)])
def test_recommended_ratio_of_an_exact_power_law_is_analytic(size, attenuation):
    # 1 - exp(-rho^2 c / 2) = attenuation in every band.
    expected = math.sqrt(-2 * math.log(1 - attenuation) / 0.3)
    ratio = spectra.recommend_bnr(exact_spectrum(*size), attenuation)
    assert isinstance(ratio, float)
    np.testing.assert_allclose(ratio, expected, rtol=1e-9)


def test_the_ratio_is_that_of_the_worst_band_in_pixels_per_unit_of_noise():
    spectrum, ring = exact_spectrum(16, 16), radii(16, 16)[1]
    ratio = spectra.recommend_bnr(spectrum)
    # One ring with four times the power of the law around it: half the ratio.
    louder = np.where(ring == 5, 4 * spectrum, spectrum)
    np.testing.assert_allclose(spectra.recommend_bnr(louder), ratio / 2, rtol=1e-9)
    # Images of ten times the contrast drown in ten times the noise: a tenth of the ratio.
    np.testing.assert_allclose(spectra.recommend_bnr(100 * spectrum), ratio / 10, rtol=1e-9)
    # The brightness does not matter.
    assert spectra.recommend_bnr(np.where(ring == 0, 1e6, spectrum)) == ratio


@pytest.mark.parametrize("bnr", [0.0, 0.1, 3.0])
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


@pytest.fixture
def cifar10_spectrum(shared_folder):
    archive = shared_folder / "data" / "cifar10_jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs CIFAR-10 as images ({archive}): not there")
    x = cifar10_images(archive, every=50)
    assert x.shape == (1000, 32, 32, 3)
    return np.asarray(spectra.power_spectrum(jnp.asarray(x, jnp.float32)))


def test_cifar10_recommends_about_the_papers_best_ratio(cifar10_spectrum):
    # Warm Diffusion finds 0.5 by search; the spectrum of 10,000 images gave 0.53 (method, sec. 5).
    assert abs(spectra.recommend_bnr(cifar10_spectrum) - 0.53) < 0.05
    # Its spectrum falls as f^-2.2 up to mid frequencies, then faster: the ratio is about 0.5 to 0.8
    # where noise takes over those (method, sec. 5), larger where only fine detail is at stake.
    path = schedules.spectral(cifar10_spectrum)
    t = np.geomspace(0.002, 80.0, 400)
    assert np.all(np.diff(path.alpha(t)) > 0)
    middle = path.bnr(t[(t > 0.3) & (t < 80)])
    assert 0.48 < middle.min() < middle.max() < 1.1
    assert path.bnr(0.02) > 2.0


def forward_states(alpha, beta, count=3000):
    rng = np.random.default_rng(0)
    spectrum = natural_spectrum(12, 10)
    x0 = GaussianData(np.zeros((12, 10, 1)), spectrum[:, :, None]).draw(rng, count)
    return blur(x0, alpha) + beta * rng.standard_normal(x0.shape), spectrum


def standard_errors(spectrum, alpha, beta, count=3000):
    """Deviation of ln(ring's mean power): the ring's mean has variance 2 sum v^2 / (N K^2)."""
    variance = transfer(alpha, 12, 10)[..., 0] ** 2 * spectrum + beta**2
    ring = radii(12, 10)[1]
    return np.array(
        [
            math.sqrt(2 / count * np.sum(variance[ring == k] ** 2)) / np.sum(variance[ring == k])
            for k in np.unique(ring)
        ]
    )


# The sampler starts at beta = 80, far from [-1, 1].
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (0.0, 80.0)])
def test_forward_states_have_not_departed(alpha, beta):
    x, spectrum = forward_states(alpha, beta)
    frequency, departure = jax.jit(spectra.spectral_departure)(x, spectrum, alpha, beta)
    assert np.all(np.abs(departure) < 5 * standard_errors(spectrum, alpha, beta))
    np.testing.assert_allclose(frequency, spectra.radial_mean(spectrum)[0], rtol=1e-13)


@pytest.mark.parametrize("wrong", [(0.8, 0.4), (1.2, 0.3)])
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


def stationary(count, height, width, seed=0):
    """Cuts of much larger random fields, smoother along rows than along columns."""
    noise = np.random.default_rng(seed).standard_normal((count, height + 12, width + 12))
    field = scipy.ndimage.gaussian_filter(noise, (0, 0.6, 1.2), mode="wrap")
    return field[:, 6:-6, 6:-6, None]


def variance(images):
    return scipy_dct(images).var(axis=(0, 3))


@pytest.mark.parametrize(("old", "new"), [
    ((6,), (15,)), ((6, 8), (12, 16)), ((6, 8), (9, 31)), ((6, 8), (1, 7)),
    ((3, 4, 5), (6, 4, 9)),
])  # fmt: skip
def test_one_over_f_squared_is_the_same_law_at_every_size(old, new):
    def law(*sizes):
        eigen = eigenvalues(*sizes)
        eigen.flat[0] = 1 / (7.0 * math.prod(sizes))
        return 1 / eigen

    np.testing.assert_allclose(spectra.spectrum_at(law(*old), *new), law(*new))


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


def test_a_stationary_field_has_the_spectrum_that_cuts_of_another_size_tell():
    """Measured on both, within a fifth on average, over three orders of magnitude of power."""
    told = np.asarray(spectra.spectrum_at(variance(stationary(1500, 20, 20)), 25, 32))
    found = variance(stationary(500, 25, 32, seed=1))
    # What the cut's edges leak is not of the field; it shows in the highest frequencies of a
    # smooth one. Below a thousandth of the largest power it is most of it.
    visible = found > 1e-3 * found.max()
    assert np.mean(np.abs(np.log(told / found))[visible]) < 0.2
    assert found[visible].max() / found[visible].min() > 500
