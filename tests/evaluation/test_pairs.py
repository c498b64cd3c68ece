"""PSNR and SSIM against scikit-image's."""

import numpy as np
import pytest

from warm_diffusion.evaluation import pairs

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1.2, 1.2, (23, 17, 3))
OTHER = np.clip(IMAGE + 0.2 * RNG.standard_normal(IMAGE.shape), -1, 1)


def test_both_are_scikit_images_on_clipped_images():
    metrics = pytest.importorskip("skimage.metrics")
    clipped = np.clip(IMAGE, -1, 1)
    expected = metrics.peak_signal_noise_ratio(clipped, OTHER, data_range=2)
    np.testing.assert_allclose(pairs.psnr(OTHER, IMAGE), expected, rtol=1e-12)
    expected = metrics.structural_similarity(
        OTHER, clipped, data_range=2, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    np.testing.assert_allclose(pairs.ssim(OTHER, IMAGE), expected, rtol=1e-9)


def test_an_error_of_a_tenth_of_the_range_is_20_db():
    flat = np.zeros((12, 12, 1))
    np.testing.assert_allclose(pairs.psnr(flat + 0.2, flat), 20.0)


@pytest.mark.parametrize("shape", [(23, 17, 1), (23, 17)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="one shape, got"):
        pairs.psnr(np.zeros(shape), IMAGE)


def test_small_images_have_no_ssim():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        pairs.ssim(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))
