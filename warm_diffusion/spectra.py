"""Power spectra in the DCT basis, the blur-to-noise ratio that they recommend, and departures.

    (1)  S_k  = variance of DCT coefficient k over the data
    (2)  noise takes over coefficient k at beta^2 = S_k; on a path of ratio rho the blur has by then
         left m_k = exp(-lambda_k rho^2 S_k / 2) of it

The blur is harmless where 1 - m_k is small: what it removes was already hidden by noise. For
natural images S_k ~ 1 / lambda_k, so (2) is about equal over all bands and one ratio serves all:
the paper's constant BNR (sec. 3.3), the ratio read off the data instead of searched for (ours).

How far a sampler's states x are from the forward process at the same level (ours; the paper argues
it from a drawing), with x+ forward states of other images:

    (3)  spectral departure    ln of the power of x over m^2 S + beta^2, by ring of frequencies
    (4)  sliced Wasserstein    (mean over directions u on the sphere of W_2(u . x, u . x+)^2)^1/2
                               (Rabin et al. 2011; Bonneel et al. 2015, sec. 3)

and what each head does in a step of samplers.py's eq. (1), by frequency; the two sum to the step:

    (5)  denoiser   (beta' / beta - 1)(x - D) + (m' - m) D        deblurrer   (m' - m) R
"""

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion import dct as _dct
from warm_diffusion.denoiser import Prediction


def power_spectrum(images: jax.Array) -> jax.Array:
    """Variance of each DCT coefficient over images and channels, eq. (1).

    Args:
      images: [N, H, W, C] in [-1, 1].

    Returns:
      [H, W]; its mean is the variance of a pixel around the mean image.

    Raises:
      ValueError: images are not [N, H, W, C].
    """
    if jnp.ndim(images) != 4:
        raise ValueError(f"expected images [N, H, W, C], got {jnp.shape(images)}")
    return jnp.var(_dct.dct(images), axis=(0, 3))


def _bands(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Radial band of each coefficient [H, W], and the mean frequency of each band [K]."""
    i, j = np.ogrid[:height, :width]
    radius = np.hypot(i / height, j / width)  # 1: the Nyquist frequency, half a cycle per pixel
    _, band = np.unique(np.rint(radius * max(height, width)), return_inverse=True)
    band = band.reshape(height, width)
    counts = np.bincount(band.ravel())
    return band, np.bincount(band.ravel(), weights=radius.ravel() / 2) / counts


def radial_mean(spectrum: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Average over rings of equal frequency, one ring per cycle over the longer side times two.

    Args:
      spectrum: [H, W], indexed as `dct.dct` does.

    Returns:
      (frequency, mean), both [K]: the ring's mean frequency in cycles per pixel, from 0 (the mean
      of the image, alone) to about 0.71 (the corner), and the mean of `spectrum` over it.

    Raises:
      ValueError: spectrum is not [H, W].
    """
    spectrum = jnp.asarray(spectrum)
    if spectrum.ndim != 2:
        raise ValueError(f"expected a spectrum [H, W], got {spectrum.shape}")
    band, frequency = _bands(*spectrum.shape)
    total = jax.ops.segment_sum(spectrum.ravel(), band.ravel(), len(frequency))
    return jnp.asarray(frequency), total / np.bincount(band.ravel())


def check_spectrum(spectrum: jax.Array, attenuation: float) -> np.ndarray:
    """The spectrum [H, W] in float64, if a path can be chosen by it.

    Raises:
      ValueError: attenuation out of range, no spectrum, or images without any detail.
    """
    spectrum = np.asarray(spectrum, np.float64)
    if not 0 < attenuation < 1:
        raise ValueError(f"attenuation must lie between 0 and 1, got {attenuation}")
    if spectrum.ndim != 2 or not np.all(np.isfinite(spectrum)) or np.any(spectrum < 0):
        raise ValueError(f"expected a finite spectrum [H, W] >= 0, got shape {spectrum.shape}")
    if not np.any(spectrum.ravel()[1:] > 0):
        raise ValueError(
            "the images have no detail to blur: every DCT coefficient but DC is constant"
        )
    return spectrum


def kept_at_takeover(spectrum: jax.Array, bnr: float) -> tuple[jax.Array, jax.Array]:
    """What blur has left of each ring of frequencies when noise takes over, eq. (2).

    Args:
      spectrum: S_k [H, W] of images in [-1, 1].
      bnr: blur-to-noise ratio of the path.

    Returns:
      (frequency, kept), both [K]: m_k averaged over the rings of `radial_mean`; 1: untouched.
    """
    spectrum = jnp.asarray(spectrum, dtype=float)
    return radial_mean(jnp.exp(-_dct.eigenvalues(*spectrum.shape) * bnr**2 * spectrum / 2))


def recommend_bnr(spectrum: jax.Array, attenuation: float = 0.05) -> float:
    """Largest ratio at which blur removes at most `attenuation` of what noise has not yet hidden.

    The largest rho for which the radially averaged 1 - m_k of eq. (2) stays within `attenuation`
    in every band; CIFAR-10 gives about 0.53, the paper's best ratio is 0.5.

    Args:
      spectrum: S_k [H, W] of images in [-1, 1], concrete (not traced).
      attenuation: share in (0, 1).

    Raises:
      ValueError: attenuation out of range, or images without any detail (no variance beyond DC).
    """
    spectrum = check_spectrum(spectrum, attenuation)
    with jax.ensure_compile_time_eval():  # a number, also under jit
        exponent = np.asarray(_dct.eigenvalues(*spectrum.shape), np.float64) * spectrum / 2
    band, _ = _bands(*spectrum.shape)
    counts = np.bincount(band.ravel())

    def worst(bnr: float) -> float:
        removed = -np.expm1(-exponent * bnr**2)
        return np.max(np.bincount(band.ravel(), weights=removed.ravel()) / counts)

    # A band with some coefficients that never vary may stay within `attenuation` for ever.
    low, high = 0.0, 1.0
    while worst(high) <= attenuation:
        if high > 1e12:
            raise ValueError(
                f"no blur removes more than {attenuation} of any band of this spectrum"
            )
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle) <= attenuation else (low, middle)
    return low


def spectral_departure(
    x: jax.Array, spectrum: jax.Array, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array]:
    """How far states at one level are, in power, from where the forward process would have them.

    Args:
      x: states [B, H, W, C] of a sampler at level (alpha, beta).
      spectrum: the data's S_k [H, W].
      alpha: blur in pixels, scalar.
      beta: noise standard deviation, scalar.

    Returns:
      (frequency, departure), both [K]: ln of the states' variance over m^2 S + beta^2 in each ring
      of `radial_mean`; zero on the forward process.
    """
    m = _dct.transfer(alpha, *jnp.shape(spectrum))[..., 0]
    frequency, expected = radial_mean(m**2 * spectrum + beta**2)
    return frequency, jnp.log(radial_mean(power_spectrum(x))[1] / expected)


def sliced_wasserstein(
    x: jax.Array, y: jax.Array, key: jax.Array, num_directions: int = 256
) -> jax.Array:
    """Distance between two sets of as many images, eq. (4); in units of a pixel.

    Two sets of N images of one distribution are about (variance of a pixel / N)^1/2 apart, not 0:
    compare with the distance between two such sets.

    Args:
      x: [N, H, W, C].
      y: [N, H, W, C].
      key: PRNG key of the directions.
      num_directions: how many.

    Raises:
      ValueError: other shapes.
    """
    if jnp.ndim(x) != 4 or jnp.shape(x) != jnp.shape(y):
        raise ValueError(
            f"expected two sets of images of one shape [N, H, W, C], got {jnp.shape(x)} and "
            f"{jnp.shape(y)}"
        )
    x, y = (jnp.asarray(a).reshape(len(a), -1) for a in (x, y))
    directions = jax.random.normal(key, (x.shape[1], num_directions), x.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    one, two = (
        jnp.sort(jnp.matmul(a, directions, precision=jax.lax.Precision.HIGHEST), axis=0)
        for a in (x, y)
    )
    return jnp.sqrt(jnp.mean((one - two) ** 2))


def head_contributions(
    x: jax.Array,
    prediction: Prediction,
    start: tuple[float, float],
    end: tuple[float, float],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each head contributes to a step from `start` to `end`, eq. (5).

    Args:
      x: states at `start`, [B, H, W, C].
      prediction: both heads' estimates there.
      start: (alpha, beta), beta > 0.
      end: (alpha, beta).

    Returns:
      (frequency, denoiser, deblurrer), all [K]: the mean square of each head's part over images,
      channels and each ring of `radial_mean`.
    """
    size = x.shape[1:3]
    change = _dct.transfer(end[0], *size) - _dct.transfer(start[0], *size)
    change = jnp.reshape(change, (1, *size, 1))
    noise = (end[1] / start[1] - 1) * _dct.dct(x - prediction.blurry)
    parts = (noise + change * _dct.dct(prediction.blurry), change * _dct.dct(prediction.residual))
    rings = [radial_mean(jnp.mean(part**2, axis=(0, 3))) for part in parts]
    return rings[0][0], rings[0][1], rings[1][1]
