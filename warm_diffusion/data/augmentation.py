"""Non-leaky augmentation: random flips and one affine warp, with labels for the network.

Augmented images would leak into the samples; a network that gets as input what was done to an
image, and zeros ("nothing") when sampling, keeps them apart (Karras et al. 2020, arXiv 2006.06676;
EDM, Karras et al. 2022, arXiv 2206.00364, appendix F.2 and table 6). Per image, each enabled with
`probability`, N standard normal:

    transform    parameters                          labels
    x_flip       0 or 1, always enabled              x_flip                            0
    y_flip       0 or 1                              y_flip                            1
    scale        2^(0.2 N)                           N                                 2
    rotate       angle in [-pi, pi]                  cos(angle) - 1, sin(angle)        3, 4
    anisotropy   2^(0.2 N) along an axis,            N cos(axis), N sin(axis)          5, 6
                 2^(-0.2 N) across it
    translate    N_x W / 8, N_y H / 8                N_x, N_y                          7, 8

The axis is an angle in [-pi, pi], but 0 in half of the images (EDM's code, aniso_rotate_prob).

    (1)  p_out = A R S F p_in + shift    content moves, in the order of the table
    (2)  p_in = S^-1 R^-1 A^-1 (p_out - shift)    evaluated once per output pixel, after the flips F
    (3)  image(p) = sum_k c_k b(p_y - k_y) b(p_x - k_x),  b the cubic B-spline

p = (y, x) in pixels from the centre ((H-1)/2, (W-1)/2), y downwards. Angles turn counter-clockwise
as displayed, shifts go right and down. Eq. (3) interpolates (Unser 1999, doi 10.1109/79.799930; it
is scipy.ndimage's order 3): midway between pixels, where every interpolation is worst, it keeps
97 % of the amplitude at half the Nyquist frequency; bilinear keeps 71 %, and a network that learns
which detail is noise should not be shown blurred images. Values are not clipped: next to an edge
they may pass [-1, 1], as with any filter this sharp.

Differs from the papers: eq. (3) in place of a wavelet filter on a doubled grid; borders reflect
about the outer edge of the border pixels, as the blur of dct.py does.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.process import _image_keys

TRANSFORMS = ("x_flip", "y_flip", "scale", "rotate", "anisotropy", "translate")
NUM_LABELS = 9

_SCALE_STD = 0.2  # in octaves
_SHIFT_STD = 1 / 8  # of the image's width and height
_PRECISION = jax.lax.Precision.HIGHEST


class Parameters(NamedTuple):
    """Parameters of each image's transformation, all [B] float32; zeros change nothing."""

    x_flip: jax.Array  # 0 or 1: left and right change places
    y_flip: jax.Array  # 0 or 1: top and bottom change places
    scale: jax.Array  # exponent N of 2^(0.2 N): above 0 enlarges
    rotation: jax.Array  # radians, counter-clockwise
    anisotropy: jax.Array  # exponent N: above 0 stretches along the axis
    axis: jax.Array  # radians, counter-clockwise from the horizontal
    x_shift: jax.Array  # N_x, in W / 8 pixels to the right
    y_shift: jax.Array  # N_y, in H / 8 pixels downwards


def draw(
    key: jax.Array, batch: int, probability: float, transforms: Sequence[str] = TRANSFORMS
) -> Parameters:
    """Random parameters of `batch` images; for the arguments, see `augment`.

    Image i's depend on (key, i) alone, and what is drawn for one transform does not depend on which
    others take part. Enabled flips happen to half of the images.
    """
    unknown = sorted(set(transforms) - set(TRANSFORMS))
    if unknown or isinstance(transforms, str):
        raise ValueError(f"transforms must be names out of {TRANSFORMS}, got {transforms!r}")
    if not isinstance(probability, jax.core.Tracer) and not 0 <= probability <= 1:
        raise ValueError(f"probability must lie between 0 and 1, got {probability}")
    chosen = np.array([name in transforms for name in TRANSFORMS])
    always = np.array(TRANSFORMS) == "x_flip"

    def one(key: jax.Array) -> Parameters:
        uniform_key, normal_key = jax.random.split(key)
        uniform = jax.random.uniform(uniform_key, (len(TRANSFORMS) + 5,), jnp.float32)
        gate, coin, turn = jnp.split(uniform, [len(TRANSFORMS), len(TRANSFORMS) + 3])
        enabled = (chosen & (always | (gate < probability))).astype(jnp.float32)
        flip, angle = coin < 0.5, math.pi * (2 * turn - 1)
        normal = jax.random.normal(normal_key, (4,), jnp.float32)
        return Parameters(
            x_flip=enabled[0] * flip[0],
            y_flip=enabled[1] * flip[1],
            scale=enabled[2] * normal[0],
            rotation=enabled[3] * angle[0],
            anisotropy=enabled[4] * normal[1],
            axis=enabled[4] * flip[2] * angle[1],
            x_shift=enabled[5] * normal[2],
            y_shift=enabled[5] * normal[3],
        )

    return jax.vmap(one)(_image_keys(key, batch))


def labels(parameters: Parameters) -> jax.Array:
    """The network's conditioning [B, 9], in the order of the module's table; zeros: untouched."""
    p = parameters
    return jnp.stack(
        [
            p.x_flip,
            p.y_flip,
            p.scale,
            jnp.cos(p.rotation) - 1,
            jnp.sin(p.rotation),
            p.anisotropy * jnp.cos(p.axis),
            p.anisotropy * jnp.sin(p.axis),
            p.x_shift,
            p.y_shift,
        ],
        axis=1,
    )


def inverse_map(parameters: Parameters, height: int, width: int) -> jax.Array:
    """Returns the map from output to input pixels, eq. (2): [B, 2, 3], flips left out.

    Columns 0 and 1 multiply the output position (y, x) in pixels from the centre; column 2, in
    pixels, is added; rows are the input position's (y, x).
    """

    def one(p: Parameters) -> jax.Array:
        cos, sin = jnp.cos(p.rotation), jnp.sin(p.rotation)
        unturned = jnp.exp2(-_SCALE_STD * p.scale) * jnp.array([[cos, sin], [-sin, cos]])
        # A^-1 divides by `stretch` along the axis and multiplies by it across.
        stretch = jnp.exp2(_SCALE_STD * p.anisotropy)
        axis = jnp.stack([-jnp.sin(p.axis), jnp.cos(p.axis)])
        unstretched = stretch * jnp.eye(2) + (1 / stretch - stretch) * jnp.outer(axis, axis)
        linear = jnp.dot(unturned, unstretched, precision=_PRECISION)
        shift = _SHIFT_STD * jnp.stack([height * p.y_shift, width * p.x_shift])
        offset = -jnp.dot(linear, shift, precision=_PRECISION)
        return jnp.concatenate([linear, offset[:, None]], axis=1)

    return jax.vmap(one)(parameters)


def _check_images(images: jax.Array) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point [B, H, W, C], got {images.dtype} {images.shape}"
        )
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def flip(images: jax.Array, x_flip: jax.Array, y_flip: jax.Array) -> jax.Array:
    """Images [B, H, W, C] mirrored left to right where x_flip [B], upside down where y_flip [B]."""
    images = jnp.where(x_flip[:, None, None, None] > 0, images[:, :, ::-1], images)
    return jnp.where(y_flip[:, None, None, None] > 0, images[:, ::-1], images)


@functools.cache
def _prefilter(size: int) -> np.ndarray:
    """Pixels to spline coefficients along one axis [size, size], reflecting borders, float64."""
    # b is (1/6, 2/3, 1/6) at whole pixels; what it reaches over the border is the border pixel.
    sampled = np.diag(np.full(size, 2 / 3)) + np.diag(np.full(size - 1, 1 / 6), 1)
    sampled += np.diag(np.full(size - 1, 1 / 6), -1)
    sampled[0, 0] += 1 / 6
    sampled[-1, -1] += 1 / 6
    return np.linalg.inv(sampled)


class _Taps(NamedTuple):
    """The four coefficients that a position reads along one axis, and their weights."""

    first: jax.Array  # [B, H, W], index into the coefficients padded by two
    weights: list[jax.Array]  # four of [B, H, W]


def _taps(position: jax.Array, size: int) -> _Taps:
    # Reflected into [-1/2, size - 1/2]: the image continued evenly has period 2 size.
    position = jnp.mod(position + 0.5, 2 * size)
    position = jnp.minimum(position, 2 * size - position) - 0.5
    before = jnp.floor(position)
    t = position - before
    weights = [
        (1 - t) ** 3 / 6,
        2 / 3 - t**2 * (2 - t) / 2,
        2 / 3 - (1 - t) ** 2 * (1 + t) / 2,
        t**3 / 6,
    ]
    return _Taps(before.astype(jnp.int32) + 1, weights)  # -1 for the first tap, +2 for the padding


def _sum_by_gather(spline: jax.Array, y: _Taps, x: _Taps) -> jax.Array:
    """Eq. (3) by reading 16 coefficients a pixel, one gather a tap, which XLA fuses with the sum.

    On a CPU at 32x32, one gather of 4x4 patches took 9 times as long.
    """
    batch, rows, columns, channels = spline.shape
    flat = spline.reshape(batch, rows * columns, channels)
    # Indices are in range by construction: "clip" spares the default's mask, and is safe with NaN.
    read = jax.vmap(lambda coefficients, index: coefficients.at[index].get(mode="clip"))
    total = jnp.zeros((*y.first.shape, channels), spline.dtype)
    for i, y_weight in enumerate(y.weights):
        for j, x_weight in enumerate(x.weights):
            values = read(flat, (y.first + i) * columns + x.first + j)
            total = total + (y_weight * x_weight)[..., None] * values
    return total


def _sum_by_products(spline: jax.Array, y: _Taps, x: _Taps) -> jax.Array:
    """Eq. (3) by products with the weights as matrices, row by row of the output to save memory."""

    def spread(taps: _Taps, size: int) -> jax.Array:
        index = jnp.arange(size)[None, None] - taps.first[..., None]
        pairs = enumerate(taps.weights)
        return sum(jnp.where(index == i, weight[..., None], 0) for i, weight in pairs)

    def row(taps: tuple[_Taps, _Taps]) -> jax.Array:
        y_matrix, x_matrix = map(spread, taps, spline.shape[1:3])
        picked = jnp.einsum("bpi,bijc->bpjc", y_matrix, spline, precision=_PRECISION)
        return jnp.einsum("bpj,bpjc->bpc", x_matrix, picked, precision=_PRECISION)

    rows = jax.lax.map(row, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (y, x)))
    return jnp.moveaxis(rows, 0, 1)


def warp(images: jax.Array, inverse: jax.Array) -> jax.Array:
    """Images [B, H, W, C] warped about the centre, eq. (3), by the map [B, 2, 3] of `inverse_map`.

    Borders reflect. There is no low-pass filter against aliasing: `draw` seldom shrinks an image by
    more than half.

    Raises:
      ValueError: images or inverse of another shape, or images of whole numbers.
    """
    images, inverse = _check_images(images), jnp.asarray(inverse)
    height, width = images.shape[1:3]
    if inverse.shape != (len(images), 2, 3):
        raise ValueError(f"inverse must have shape {(len(images), 2, 3)}, got {inverse.shape}")

    rows, columns = (jnp.asarray(_prefilter(size), images.dtype) for size in (height, width))
    spline = jnp.einsum("ih,bhwc,jw->bijc", rows, images, columns, precision=_PRECISION)
    spline = jnp.pad(spline, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="symmetric")

    y = jnp.arange(height, dtype=images.dtype)[None, :, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=images.dtype)[None, None, :] - (width - 1) / 2
    m = inverse.astype(images.dtype)[:, :, :, None, None]
    y_in, x_in = (m[:, i, 0] * y + m[:, i, 1] * x + m[:, i, 2] for i in range(2))
    taps = _taps(y_in + (height - 1) / 2, height), _taps(x_in + (width - 1) / 2, width)

    # Batched gathers are slow on TPUs (github.com/jax-ml/jax/issues/10378), fast elsewhere.
    return jax.lax.platform_dependent(spline, *taps, default=_sum_by_gather, tpu=_sum_by_products)


def apply(images: jax.Array, parameters: Parameters) -> jax.Array:
    """Images [B, H, W, C] transformed as `parameters` say, eq. (1); ValueError for other shapes.

    Flips alone are exact permutations, and zeros give back the image bit for bit.
    """
    images, p = _check_images(images), parameters
    if any(jnp.shape(value) != images.shape[:1] for value in p):
        shapes = [jnp.shape(value) for value in p]
        raise ValueError(f"parameters must have shape {images.shape[:1]}, got {shapes}")
    images = flip(images, p.x_flip, p.y_flip)
    warped = warp(images, inverse_map(p, *images.shape[1:3]))
    moves = (p.scale, p.rotation, p.anisotropy, p.x_shift, p.y_shift)
    moved = functools.reduce(jnp.logical_or, (value != 0 for value in moves))
    return jnp.where(moved[:, None, None, None], warped, images)


def augment(
    key: jax.Array,
    images: jax.Array,
    probability: float,
    transforms: Sequence[str] = TRANSFORMS,
) -> tuple[jax.Array, jax.Array]:
    """Randomly transformed images and what was done to them; jittable, for the training step.

    Example:
      >>> images, labels = jax.jit(augment)(jax.random.key(0), jnp.zeros((8, 9, 7, 3)), 0.12)
      >>> images.shape, labels.shape
      ((8, 9, 7, 3), (8, 9))

    Args:
      key: a PRNG key, or one per image; new ones each step.
      images: [B, H, W, C] in [-1, 1], floating point; H and W may differ.
      probability: chance of each transform except x_flip, which always happens to half of the
        images; EDM: 0.12 for CIFAR-10, 0.15 for FFHQ.
      transforms: names out of `TRANSFORMS`, fixed when jitted.

    Returns:
      (images, labels): [B, H, W, C], at least float32, and [B, 9], zero where nothing was done.

    Raises:
      ValueError: wrong images or probability, or an unknown transform.
    """
    images = _check_images(images)
    parameters = draw(key, images.shape[0], probability, transforms)
    if {"x_flip", "y_flip"}.issuperset(transforms):  # nothing to interpolate
        return flip(images, parameters.x_flip, parameters.y_flip), labels(parameters)
    return apply(images, parameters), labels(parameters)
