"""Orthonormal DCT-II over height and width, and the Gaussian blur that it diagonalises.

    (1)  V                    the orthonormal DCT-II over H and W: V V^T = I
    (2)  lambda_ij            = pi^2 (i^2 / H^2 + j^2 / W^2)
    (3)  m_ij(alpha)          = exp(-lambda_ij alpha^2 / 2)
    (4)  B(alpha) x           = V^T (m(alpha) * V x)

B(alpha) is a Gaussian blur of standard deviation alpha pixels with reflecting borders: the heat
equation run for time alpha^2 / 2 (Rissanen et al. 2023, arXiv 2206.13397, sec. 3). It keeps the
mean of an image, B(a) B(b) = B(sqrt(a^2 + b^2)), B(0) = I, and its norm is at most 1.

Transforms are products with small matrices at full float32 precision: on accelerators a matrix
product is faster than an FFT at these sizes, but its default precision (bfloat16 on TPU, TF32 on
recent GPUs) would drown the fine detail that deblurring is about.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_LARGEST = 10.0  # images in [-1, 1] may overshoot, by augmentation say; 0..255 reaches beyond this


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [size, size] in float64: row k is the k-th cosine."""
    frequency, position = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (position + 0.5) / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def as_images(x: ArrayLike, name: str = "images") -> jax.Array:
    """The array of images [B, H, W, C] that a function was given, if it is one.

    Args:
      x: what was given, concrete or traced.
      name: what the function calls it.

    Raises:
      ValueError: a list or a tuple, another number of axes, or channels before height and width.

    Example:
      >>> dct.as_images(np.zeros((2, 3, 8, 8)))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: images (2, 3, 8, 8) look like channels first: transpose to [B, H, W, C], ...
    """
    if isinstance(x, list | tuple):
        raise ValueError(
            f"{name} must be one array [B, H, W, C], got a {type(x).__name__}: numpy.stack joins "
            "images, samplers.initial_noise(seeds, (H, W, C)) draws noise"
        )
    x = jnp.asarray(x)
    if x.ndim != 4:
        single = ": a single image is x[None]" if x.ndim == 3 else ""
        raise ValueError(f"{name} must be [B, H, W, C], got {x.shape}{single}")
    if x.shape[1] in (1, 3) and x.shape[2] == x.shape[3] > 4:
        raise ValueError(
            f"{name} {x.shape} look like channels first: transpose to [B, H, W, C], "
            "x.transpose(0, 2, 3, 1)"
        )
    return x


def check_scale(x: jax.Array | np.ndarray, name: str = "images") -> None:
    """Refuses images that are not floats in about [-1, 1]; traced values cannot be looked at.

    Raises:
      ValueError: integers, or a value beyond 10 in size.

    Example:
      >>> dct.check_scale(np.full((1, 2, 2, 1), 255.0))
      Traceback (most recent call last):
      ValueError: images must be scaled to [-1, 1], got values up to 255: x / 127.5 - 1
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats in [-1, 1], got {x.dtype}: x / 127.5 - 1")
    if isinstance(x, jax.core.Tracer) or not x.size:
        return
    with jax.ensure_compile_time_eval():  # a known array inside a jitted function
        # Both ends instead of |x|: no copy of a large data set.
        largest = float(max(x.max(), -x.min()))
    if largest > _LARGEST:
        raise ValueError(
            f"{name} must be scaled to [-1, 1], got values up to {largest:g}: x / 127.5 - 1"
        )


def _check_image(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"images must have shape [..., H, W, C], got {x.shape}")
    # At least float32: the transform of a bfloat16 image is still accumulated and kept in float32.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _transform(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,...hwc,jw->...ijc", rows, x, columns, precision=precision)


def dct(x: ArrayLike) -> jax.Array:
    """Orthonormal DCT-II over height and width, eq. (1).

    Args:
      x: images [..., H, W, C]; H and W may differ.

    Returns:
      Coefficients [..., H, W, C], float32 (float64 if x is), index (i, j) = (vertical, horizontal).

    Raises:
      ValueError: x has fewer than three axes.

    Example:
      A constant image is its mean times (H W)^1/2, in the first coefficient.

      >>> print(abs(np.asarray(dct.dct(np.ones((2, 2, 1))))[..., 0].round(4)))
      [[2. 0.]
       [0. 0.]]
    """
    x = _check_image(x)
    return _transform(x, _matrix(x.shape[-3]), _matrix(x.shape[-2]))


def idct(coefficients: ArrayLike) -> jax.Array:
    """Inverse of `dct`: coefficients [..., H, W, C] to images [..., H, W, C].

    Example:
      >>> x = dct.idct(np.array([2.0, 0.0, 0.0, 0.0]).reshape(2, 2, 1))
      >>> print(np.asarray(x).round(4).ravel())
      [1. 1. 1. 1.]
    """
    coefficients = _check_image(coefficients)
    return _transform(
        coefficients, _matrix(coefficients.shape[-3]).T, _matrix(coefficients.shape[-2]).T
    )


def eigenvalues(height: int, width: int) -> jax.Array:
    """Eigenvalues lambda_ij of the negative Laplacian, eq. (2): [H, W], per pixel squared.

    Example:
      >>> print(np.asarray(dct.eigenvalues(1, 4) / np.pi**2 * 16).round(3))
      [[0. 1. 4. 9.]]
    """
    i, j = np.ogrid[:height, :width]
    return jnp.asarray(np.pi**2 * ((i / height) ** 2 + (j / width) ** 2), dtype=float)


def transfer(alpha: ArrayLike, height: int, width: int) -> jax.Array:
    """What a blur leaves of each DCT coefficient: m(alpha), eq. (3).

    Args:
      alpha: blur standard deviation in pixels, >= 0, any shape [...].
      height: H.
      width: W.

    Returns:
      Factors in [0, 1], shape [..., H, W, 1].

    Example:
      exp(-pi^2 / 4 / 2) of the one cosine that fits on two pixels.

      >>> print(np.asarray(dct.transfer(1.0, 1, 2))[..., 0].round(4))
      [[1.     0.2912]]
    """
    alpha = jnp.asarray(alpha)[..., None, None, None]
    eigen = eigenvalues(height, width).reshape((1,) * (alpha.ndim - 3) + (height, width, 1))
    return jnp.exp(-eigen * alpha**2 / 2)


def expand_like(level: ArrayLike, x: jax.Array) -> jax.Array:
    """A level (scalar or [B]) shaped to multiply images x [B, H, W, C] (scalar only: [H, W, C]).

    Raises:
      ValueError: the level is neither a scalar nor one number per image.

    Example:
      >>> dct.expand_like(np.array([0.5, 2.0]), np.zeros((2, 8, 8, 3))).shape
      (2, 1, 1, 1)
    """
    level = jnp.asarray(level)
    if level.ndim == 0:
        return level.reshape((1,) * x.ndim)
    if level.ndim > 1 or x.ndim < 4 or level.shape[0] != x.shape[0]:
        expected = f"a scalar or shape ({x.shape[0]},)" if x.ndim > 3 else "a scalar"
        raise ValueError(f"a level for images {x.shape} must be {expected}, got {level.shape}")
    return level.reshape(level.shape + (1,) * (x.ndim - 1))


def transfer_like(alpha: ArrayLike, x: jax.Array) -> jax.Array:
    """m(alpha), eq. (3), shaped to multiply the coefficients of images x; alpha scalar or [B].

    Example:
      >>> dct.transfer_like(np.array([0.5, 2.0]), np.zeros((2, 8, 6, 3))).shape
      (2, 8, 6, 1)
    """
    level = expand_like(alpha, x)
    return transfer(level[..., 0, 0, 0], *x.shape[-3:-1])


def blur(x: ArrayLike, alpha: ArrayLike) -> jax.Array:
    """Gaussian blur with reflecting borders, B(alpha) x, eq. (4).

    Args:
      x: images [B, H, W, C] (or [H, W, C]).
      alpha: standard deviation in pixels, >= 0; scalar or [B].

    Returns:
      Blurred images, same shape as x.

    Raises:
      ValueError: a wrong number of axes, or alpha neither a scalar nor [B].

    Example:
      A long blur leaves the mean, here (0 + 1) / 2.

      >>> x = dct.blur(np.array([0.0, 1.0]).reshape(1, 1, 2, 1), 10.0)
      >>> print(np.asarray(x).round(4).ravel())
      [0.5 0.5]
    """
    x = _check_image(x)
    return idct(transfer_like(alpha, x) * dct(x))
