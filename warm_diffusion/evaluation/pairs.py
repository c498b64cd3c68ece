"""Measures a restored image against the clean one: PSNR and SSIM, for images in [-1, 1].

    (1)  PSNR = 10 log10(2^2 / mean square error), in dB; the range of pixels is 2
    (2)  SSIM = mean of (2 mu nu + c1)(2 s + c2) / ((mu^2 + nu^2 + c1)(v + w + c2))
         over pixels and channels, with local means mu, nu, variances v, w and covariance s under a
         Gaussian window of deviation 1.5 pixels, 11 wide; c1 = (0.01 * 2)^2, c2 = (0.03 * 2)^2; a
         border of 5 pixels is left out (Wang et al. 2004)

Both are taken after clipping to the range, as a file would hold the images.
"""

import numpy as np
from scipy import ndimage

_RANGE, _BORDER = 2.0, 5


def _checked(image: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, reference = (np.asarray(x, np.float64) for x in (image, reference))
    if image.shape != reference.shape or image.ndim != 3:
        raise ValueError(
            f"expected two images [H, W, C] of one shape, got {image.shape} and {reference.shape}"
        )
    return np.clip(image, -1, 1), np.clip(reference, -1, 1)


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of an image [H, W, C] in dB, eq. (1); infinite if equal."""
    image, reference = _checked(image, reference)
    error = np.mean((image - reference) ** 2)
    return float(10 * np.log10(_RANGE**2 / error)) if error else float("inf")


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of an image [H, W, C], at most 1, eq. (2).

    Raises:
      ValueError: other shapes, or images of fewer than 11 pixels per side.
    """
    image, reference = _checked(image, reference)
    if min(image.shape[:2]) <= 2 * _BORDER:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {image.shape}")

    def local(x):
        window = ndimage.gaussian_filter(x, (1.5, 1.5, 0), radius=(_BORDER, _BORDER, 0))
        return window[_BORDER:-_BORDER, _BORDER:-_BORDER]

    mu, nu = local(image), local(reference)
    v, w = local(image**2) - mu**2, local(reference**2) - nu**2
    s = local(image * reference) - mu * nu
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    top, bottom = (2 * mu * nu + c1) * (2 * s + c2), (mu**2 + nu**2 + c1) * (v + w + c2)
    return float(np.mean(top / bottom))
