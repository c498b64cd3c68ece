"""Orthonormal DCT-II over all spatial axes, and the Gaussian blur that it diagonalises.

    (1)  V                    the orthonormal DCT-II over the spatial axes: V V^T = I
    (2)  lambda_k             = sum over axes of pi^2 k_axis^2 / size_axis^2
    (3)  m_k(alpha)           = exp(-lambda_k alpha^2 / 2)
    (4)  B(alpha) x           = V^T (m(alpha) * V x)

B(alpha) is a Gaussian blur of standard deviation alpha pixels with reflecting borders: the heat
equation run for time alpha^2 / 2 (Rissanen et al. 2023, arXiv 2206.13397, sec. 3). It keeps the
mean of an image, B(a) B(b) = B(sqrt(a^2 + b^2)), B(0) = I, and its norm is at most 1. It is the
band-limited continuous Gaussian: below one pixel a sampled kernel (`scipy.ndimage.gaussian_filter`)
is another operator, and differs from it by 24 % of the blur's effect at 0.5 pixels, 93 % at 0.3.

Data are [B, *spatial, C]: signals [B, L, C], images [B, H, W, C], volumes [B, D, H, W, C].
Everything is computed in float32 at least and returned in the type of the data.

Transforms are products with small matrices at full float32 precision: on accelerators a matrix
product is faster than an FFT at these sizes, but its default precision (bfloat16 on TPU, TF32 on
recent GPUs) would drown the fine detail that deblurring is about.
"""

import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [size, size] in float64: row k is the k-th cosine."""
    frequency, position = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (position + 0.5) / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def _array(x: ArrayLike, name: str = "x") -> jax.Array:
    """Data [B, *spatial, C] as a float array; ValueError if they are something else."""
    if isinstance(x, list | tuple):
        raise ValueError(
            f"{name} must be one array [B, *spatial, C], got a {type(x).__name__}: numpy.stack "
            "joins images, samplers.initial_noise(seeds, (H, W, C)) draws noise"
        )
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(
            f"{name} must be [B, *spatial, C], got {x.shape}: add the channel by x[..., None] and "
            "the batch by x[None]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floats, got {x.dtype}: bytes become images in [-1, 1] by x / 127.5 - 1"
        )
    return x


def _floating(x: ArrayLike) -> jax.Array:
    """An array of floats: itself, or of integers their values."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def _wide(x: jax.Array) -> jax.Array:
    """The same in float32, or in float64 if it is that already."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _level(level: ArrayLike, x: jax.Array) -> jax.Array:
    """A level (a scalar or [B]) in the type of data x [B, *spatial, C], shaped to multiply them."""
    level = jnp.asarray(level)
    if level.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"a level for data {x.shape} must be a scalar or shape ({x.shape[0]},), got "
            f"{level.shape}"
        )
    return level.astype(x.dtype).reshape(level.shape + (1,) * (x.ndim - level.ndim))


def _per_image(level: ArrayLike, x: jax.Array) -> jax.Array:
    """A level (a scalar or [B]) in the type of data x, as [B]."""
    return jnp.broadcast_to(_level(level, x).reshape(-1), x.shape[:1])


def _squares(*sizes: int) -> np.ndarray:
    """Squared frequencies [*sizes] in units of the Nyquist frequency, in float64."""
    axes = np.ogrid[tuple(slice(size) for size in sizes)]
    return sum((k / size) ** 2 for k, size in zip(axes, sizes, strict=True))


def _eigenvalues(*sizes: int) -> np.ndarray:
    """Eq. (2) in float64."""
    return np.pi**2 * _squares(*sizes)


def _eigenvalues_like(x: jax.Array) -> jax.Array:
    """Eq. (2) in the type of data x, shaped to multiply their coefficients."""
    return jnp.asarray(_eigenvalues(*x.shape[1:-1])[None, ..., None], x.dtype)


def _transfer_like(alpha: ArrayLike, x: jax.Array) -> jax.Array:
    """Eq. (3) for alpha a scalar or [B], shaped to multiply the coefficients of data x."""
    return jnp.exp(-_eigenvalues_like(x) * _level(alpha, x) ** 2 / 2)


def _dct(x: jax.Array, inverse: bool = False) -> jax.Array:
    """Eq. (1) or its inverse for wide data."""
    letters, count = string.ascii_letters, x.ndim - 2
    old, new = letters[:count], letters[count : 2 * count]
    matrices = [jnp.asarray(_matrix(size), x.dtype) for size in x.shape[1:-1]]
    factors = [b + a if inverse else a + b for a, b in zip(new, old, strict=True)]
    # With the data in the middle, contracted from both sides: for images the fastest order.
    formula = f"{','.join([*factors[:1], f'Y{old}Z', *factors[1:]])}->Y{new}Z"
    operands = [*matrices[:1], x, *matrices[1:]]
    return jnp.einsum(formula, *operands, precision=jax.lax.Precision.HIGHEST)


def _idct(coefficients: jax.Array) -> jax.Array:
    return _dct(coefficients, inverse=True)


def dct(x: ArrayLike) -> jax.Array:
    """Orthonormal DCT-II over all axes but the first and the last, eq. (1).

    Args:
      x: data [B, *spatial, C]; sizes may differ.

    Returns:
      Coefficients of the same shape and type, indexed by frequency.

    Raises:
      ValueError: no float array of three axes or more.

    Example:
      A constant image is its mean times (H W)^1/2, in the first coefficient.

      >>> print(abs(np.asarray(dct.dct(np.ones((1, 2, 2, 1))))[0, ..., 0].round(4)))
      [[2. 0.]
       [0. 0.]]
    """
    x = _array(x)
    return _dct(_wide(x)).astype(x.dtype)


def idct(coefficients: ArrayLike) -> jax.Array:
    """Inverse of `dct`: coefficients [B, *spatial, C] to data of the same shape and type.

    Example:
      >>> print(dct.idct(np.array([2.0, 0.0, 0.0, 0.0]).reshape(1, 2, 2, 1)).round(4).ravel())
      [1. 1. 1. 1.]
    """
    coefficients = _array(coefficients, "coefficients")
    return _idct(_wide(coefficients)).astype(coefficients.dtype)


def eigenvalues(*sizes: int) -> jax.Array:
    """Eigenvalues lambda of the negative Laplacian, eq. (2): [*sizes], per pixel squared.

    Example:
      >>> print(np.asarray(dct.eigenvalues(1, 4) / np.pi**2 * 16).round(3))
      [[0. 1. 4. 9.]]
    """
    return jnp.asarray(_eigenvalues(*sizes), dtype=float)


def transfer(alpha: ArrayLike, *sizes: int) -> jax.Array:
    """Returns the factor m(alpha) by which a blur multiplies each DCT coefficient, eq. (3).

    Args:
      alpha: blur standard deviation in pixels, >= 0, any shape [...].
      *sizes: number of pixels along each spatial axis.

    Returns:
      Factors in [0, 1], shape [..., *sizes, 1], in the type of alpha.

    Example:
      exp(-pi^2 / 4 / 2) of the one cosine that fits on two pixels.

      >>> print(np.asarray(dct.transfer(1.0, 1, 2))[..., 0].round(4))
      [[1.     0.2912]]
    """
    alpha = _floating(alpha)
    square = _wide(alpha).reshape(alpha.shape + (1,) * (len(sizes) + 1)) ** 2
    eigen = jnp.asarray(_eigenvalues(*sizes), square.dtype)
    eigen = eigen.reshape((1,) * alpha.ndim + (*sizes, 1))
    return jnp.exp(-eigen * square / 2).astype(alpha.dtype)


def blur(x: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """Gaussian blur with reflecting borders, B(alpha) x, eq. (4).

    Args:
      x: data [B, *spatial, C].
      alpha: standard deviation in pixels, >= 0; scalar or [B].

    Returns:
      Blurred data, same shape and type as x.

    Raises:
      ValueError: no float array of three axes or more, or alpha neither a scalar nor [B].

    Example:
      A long blur leaves the mean, here (0 + 1) / 2.

      >>> print(dct.blur(np.array([0.0, 1.0]).reshape(1, 2, 1), 10.0).round(4).ravel())
      [0.5 0.5]
    """
    x = _array(x)
    return _blur(_wide(x), alpha).astype(x.dtype)


def _blur(x: jax.Array, alpha: ArrayLike) -> jax.Array:
    """Eq. (4) for wide data."""
    return _idct(_transfer_like(alpha, x) * _dct(x))


def check_images(images: ArrayLike, name: str = "images") -> jax.Array:
    """Images [B, H, W, C] in about [-1, 1], or a ValueError that says how they become that.

    The core takes any [B, *spatial, C] as it is: this check is for those who have images. It asks
    for four axes, channels last, floats, and no value beyond 10 (values that are traced cannot be
    looked at).

    Example:
      >>> dct.check_images(np.zeros((2, 3, 8, 8)))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: images (2, 3, 8, 8) look like channels first: x.transpose(0, 2, 3, 1) ...
    """
    images = jnp.asarray(images) if isinstance(images, list | tuple) else _array(images, name)
    if images.ndim != 4:
        raise ValueError(
            f"{name} must be [B, H, W, C], got {images.shape}: grey images [B, H, W] are "
            "x[..., None], one image [H, W, C] is x[None], signals [B, L, C] need no such check"
        )
    _, rows, columns, channels = images.shape
    if rows <= 4 < min(columns, channels):
        raise ValueError(
            f"{name} {images.shape} look like channels first: x.transpose(0, 2, 3, 1) turns "
            "them into [B, H, W, C]"
        )
    if not isinstance(images, jax.core.Tracer) and images.size:
        # Both ends instead of |x|: no copy of a large data set.
        largest = float(max(images.max(), -images.min()))
        if largest > 10:
            raise ValueError(
                f"{name} must be scaled to [-1, 1], got values up to {largest:g}: x / 127.5 - 1"
            )
    return images
