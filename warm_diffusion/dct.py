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


@functools.cache
def _matrix(size: int) -> np.ndarray:
    """The orthonormal DCT-II matrix [size, size] in float64: row k is the k-th cosine."""
    frequency, position = np.ogrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (position + 0.5) / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def _check_image(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"images must have shape [..., H, W, C], got {x.shape}")
    # At least float32: the transform of a bfloat16 image is still accumulated and kept in float32.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _transform(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    precision = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,...hwc,jw->...ijc", rows, x, columns, precision=precision)


def dct(x: jax.Array) -> jax.Array:
    """Orthonormal DCT-II over height and width, eq. (1).

    Args:
      x: images [..., H, W, C]; H and W may differ.

    Returns:
      Coefficients [..., H, W, C], float32 (float64 if x is), index (i, j) = (vertical, horizontal).

    Raises:
      ValueError: x has fewer than three axes.
    """
    x = _check_image(x)
    return _transform(x, _matrix(x.shape[-3]), _matrix(x.shape[-2]))


def idct(coefficients: jax.Array) -> jax.Array:
    """Inverse of `dct`: coefficients [..., H, W, C] to images [..., H, W, C]."""
    coefficients = _check_image(coefficients)
    return _transform(
        coefficients, _matrix(coefficients.shape[-3]).T, _matrix(coefficients.shape[-2]).T
    )


def eigenvalues(height: int, width: int) -> jax.Array:
    """Eigenvalues lambda_ij of the negative Laplacian, eq. (2): [H, W], per pixel squared."""
    i, j = np.ogrid[:height, :width]
    return jnp.asarray(np.pi**2 * ((i / height) ** 2 + (j / width) ** 2), dtype=float)


def transfer(alpha: jax.Array, height: int, width: int) -> jax.Array:
    """What a blur leaves of each DCT coefficient: m(alpha), eq. (3).

    Args:
      alpha: blur standard deviation in pixels, >= 0, any shape [...].
      height: H.
      width: W.

    Returns:
      Factors in [0, 1], shape [..., H, W, 1].
    """
    alpha = jnp.asarray(alpha)[..., None, None, None]
    eigen = eigenvalues(height, width).reshape((1,) * (alpha.ndim - 3) + (height, width, 1))
    return jnp.exp(-eigen * alpha**2 / 2)


def expand_like(level: jax.Array, x: jax.Array) -> jax.Array:
    """A level (scalar or [B]) shaped to multiply images x [B, H, W, C] (scalar only: [H, W, C]).

    Raises:
      ValueError: the level is neither a scalar nor one number per image.
    """
    level = jnp.asarray(level)
    if level.ndim == 0:
        return level.reshape((1,) * x.ndim)
    if level.ndim > 1 or x.ndim < 4 or level.shape[0] != x.shape[0]:
        expected = f"a scalar or shape ({x.shape[0]},)" if x.ndim > 3 else "a scalar"
        raise ValueError(f"a level for images {x.shape} must be {expected}, got {level.shape}")
    return level.reshape(level.shape + (1,) * (x.ndim - 1))


def transfer_like(alpha: jax.Array, x: jax.Array) -> jax.Array:
    """m(alpha), eq. (3), shaped to multiply the coefficients of images x; alpha scalar or [B]."""
    level = expand_like(alpha, x)
    return transfer(level[..., 0, 0, 0], *x.shape[-3:-1])


def blur(x: jax.Array, alpha: jax.Array) -> jax.Array:
    """Gaussian blur with reflecting borders, B(alpha) x, eq. (4).

    Args:
      x: images [B, H, W, C] (or [H, W, C]).
      alpha: standard deviation in pixels, >= 0; scalar or [B].

    Returns:
      Blurred images, same shape as x.

    Raises:
      ValueError: a wrong number of axes, or alpha neither a scalar nor [B].
    """
    x = _check_image(x)
    return idct(transfer_like(alpha, x) * dct(x))
