"""The InceptionV3 of the Frechet Inception distance: TensorFlow's graph of 2015-12-05, in JAX.

    (1)  resize       TF1's bilinear to 299 x 299: output i reads input i * size / 299, without
                      half-pixel centres or antialiasing; past the last row the last row repeats
    (2)  normalise    (x - 128) / 128, not 127.5
    (3)  convolution  relu(k * x + b) with batch normalisation folded in:
                      k = gamma w / s, b = beta - gamma mean / s, s = sqrt(variance + 0.001)
    (4)  features     the mean over the last 8 x 8 grid: 2048 numbers
    (5)  logits       features @ fc.weight^T over 1008 classes, without fc.bias: Inception Score's

Architecture: Szegedy et al. 2015 (arXiv 1512.00567), figures 5 to 7. This graph differs from
torchvision's InceptionV3 in two ways that move every FID: averages over 3 x 3 neighbours leave the
padding out of the count, and the last block pools by maximum. Layers are named as in pytorch-fid and
torch-fidelity, which share one weights file.

Averaging neighbours and a 1 x 1 convolution commute: the blocks convolve first, all branches in one
product, and average the few channels that are left. Same numbers, less work.

Deliberately absent: training, the auxiliary classifier, and any download. The published weights are
a pickle; they are converted once, without torch:

    python -m warm_diffusion.evaluation.inception convert PUBLISHED.pth OUT.safetensors
"""

import argparse
import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion.evaluation import torch_files

Params = dict[str, dict[str, jax.Array]]

# In pytorch-fid's release `fid_weights`; torch-fidelity's weights-inception-2015-12-05-6726825d.pth
# is the same file. Their names end in the first digits of its SHA-256.
PUBLISHED_NAME = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_COMMAND = "python -m warm_diffusion.evaluation.inception convert"

_SIZE = 299
_EPSILON = 1e-3
_NUM_FEATURES = 2048
_NUM_CLASSES = 1008

# A branch is a chain of stages, a stage one kernel (height, width, channels out) or, at the end of a
# chain, a list of kernels side by side.
_Kernel = tuple[int, int, int]
_Chain = list[_Kernel | list[_Kernel]]


class _Block(NamedTuple):
    branches: dict[str, _Chain]  # in the order of their output channels
    pool: (
        str  # "average" or "maximum" before branch_pool; "reduce": halves the grid, no branch_pool
    )


def _block_a(pooled: int) -> _Block:
    branches = {
        "branch1x1": [(1, 1, 64)],
        "branch5x5": [(1, 1, 48), (5, 5, 64)],
        "branch3x3dbl": [(1, 1, 64), (3, 3, 96), (3, 3, 96)],
        "branch_pool": [(1, 1, pooled)],
    }
    return _Block(branches, "average")


def _block_c(n: int) -> _Block:
    branches = {
        "branch1x1": [(1, 1, 192)],
        "branch7x7": [(1, 1, n), (1, 7, n), (7, 1, 192)],
        "branch7x7dbl": [(1, 1, n), (7, 1, n), (1, 7, n), (7, 1, n), (1, 7, 192)],
        "branch_pool": [(1, 1, 192)],
    }
    return _Block(branches, "average")


def _block_e(pool: str) -> _Block:
    fork = [(1, 3, 384), (3, 1, 384)]
    branches = {
        "branch1x1": [(1, 1, 320)],
        "branch3x3": [(1, 1, 384), fork],
        "branch3x3dbl": [(1, 1, 448), (3, 3, 384), fork],
        "branch_pool": [(1, 1, 192)],
    }
    return _Block(branches, pool)


# Layer: kernel and stride; none is padded but the third.
_STEM = {
    "Conv2d_1a_3x3": ((3, 3, 32), 2, "VALID"),
    "Conv2d_2a_3x3": ((3, 3, 32), 1, "VALID"),
    "Conv2d_2b_3x3": ((3, 3, 64), 1, "SAME"),
    "Conv2d_3b_1x1": ((1, 1, 80), 1, "VALID"),
    "Conv2d_4a_3x3": ((3, 3, 192), 1, "VALID"),
}
_POOL_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _Block(
        {"branch3x3": [(3, 3, 384)], "branch3x3dbl": [(1, 1, 64), (3, 3, 96), (3, 3, 96)]}, "reduce"
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _Block(
        {
            "branch3x3": [(1, 1, 192), (3, 3, 320)],
            "branch7x7x3": [(1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192)],
        },
        "reduce",
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}


def _stages(block: str, branch: str) -> list[dict[str, _Kernel]]:
    """The layers of a branch, stage by stage: full name to kernel."""
    chain = _BLOCKS[block].branches[branch]
    if len(chain) == 1:
        return [{f"{block}.{branch}": chain[0]}]
    stages = []
    for i, stage in enumerate(chain, start=1):
        kernels = dict(zip("ab", stage, strict=True)) if isinstance(stage, list) else {"": stage}
        stages.append({f"{block}.{branch}_{i}{letter}": k for letter, k in kernels.items()})
    return stages


@functools.cache
def _layer_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Every convolution: name to (height, width, channels in, channels out)."""
    shapes, channels = {}, 3
    for name, ((height, width, out), _, _) in _STEM.items():
        shapes[name] = (height, width, channels, out)
        channels = out
    for block, (branches, pool) in _BLOCKS.items():
        total = channels if pool == "reduce" else 0
        for branch in branches:
            width_in = channels
            for stage in _stages(block, branch):
                shapes |= {name: (k[0], k[1], width_in, k[2]) for name, k in stage.items()}
                width_in = sum(k[2] for k in stage.values())
            total += width_in
        channels = total
    return shapes


def _expected_arrays() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published arrays that are used."""
    expected = {"fc.weight": (_NUM_CLASSES, _NUM_FEATURES)}
    for name, (height, width, channels, out) in _layer_shapes().items():
        expected[f"{name}.conv.weight"] = (out, channels, height, width)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{name}.bn.{statistic}"] = (out,)
    return expected


def params_from_arrays(arrays: Mapping[str, np.ndarray]) -> Params:
    """Parameters from arrays named and laid out as in pytorch-fid and torch-fidelity.

    Args:
      arrays: name to array, convolutions OIHW; names beyond the needed ones are ignored
        (`num_batches_tracked`, `fc.bias`, `AuxLogits`).

    Returns:
      Layer to {"kernel": HWIO, "bias": [1, 1, 1, O]}, eq. (3), float32, folded in float64; "fc" has
      a kernel [2048, 1008] alone.

    Raises:
      ValueError: missing or misshaped arrays, which it names, or numbers that are not finite.
    """
    problems = []
    for name, shape in _expected_arrays().items():
        if name not in arrays:
            problems.append(f"missing {name}")
        elif np.shape(arrays[name]) != shape:
            problems.append(f"{name} has shape {np.shape(arrays[name])}, expected {shape}")
        elif not np.all(np.isfinite(arrays[name])):
            problems.append(f"{name} has numbers that are not finite")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" * (len(problems) > 6))
        raise ValueError(f"these are not the weights of the FID InceptionV3: {shown}")

    params = {"fc": {"kernel": jnp.asarray(arrays["fc.weight"], jnp.float32).T}}
    for name in _layer_shapes():
        weight = np.asarray(arrays[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
        gamma, beta, mean, variance = (
            np.asarray(arrays[f"{name}.bn.{statistic}"], np.float64)
            for statistic in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + _EPSILON)
        params[name] = {
            "kernel": jnp.asarray(weight * scale, jnp.float32),
            "bias": jnp.asarray(beta - mean * scale, jnp.float32).reshape(1, 1, 1, -1),
        }
    return params


@functools.cache
def _resize_matrix(size: int) -> np.ndarray:
    """TF1's bilinear interpolation along one axis, eq. (1): [299, size]."""
    source = np.arange(_SIZE) * size / _SIZE
    low = source.astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((_SIZE, size))
    np.add.at(matrix, (np.arange(_SIZE), low), 1 - (source - low))
    np.add.at(matrix, (np.arange(_SIZE), high), source - low)
    return matrix.astype(np.float32)


def _prepare(images: jax.Array) -> jax.Array:
    """Eq. (1) and (2): uint8 [B, H, W, 3] to float32 [B, 299, 299, 3]."""
    if jnp.ndim(images) != 4 or jnp.shape(images)[-1] != 3:
        raise ValueError(
            f"expected images [B, H, W, 3], got {jnp.shape(images)}; repeat a grey channel thrice"
        )
    if images.dtype != jnp.uint8:
        raise ValueError(f"expected uint8 images in 0..255, got {images.dtype}: convert them first")
    rows, columns = (jnp.asarray(_resize_matrix(size)) for size in images.shape[1:3])
    x = jnp.asarray(images).astype(jnp.float32)
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)
    return (x - 128) / 128


def _three(x: jax.Array, combine, stride: int) -> jax.Array:
    """`combine` over 3 x 3 windows without padding: by rows, then by columns."""
    for axis in (1, 2):
        stop = x.shape[axis] - 2
        first, middle, last = (jax.lax.slice_in_dim(x, i, stop + i, stride, axis) for i in range(3))
        x = combine(combine(first, middle), last)
    return x


def _pad(x: jax.Array, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _average(x: jax.Array) -> jax.Array:
    """Mean of each position's 3 x 3 neighbours, padding left out of sum and count."""
    count = _three(_pad(jnp.ones((1, *x.shape[1:3], 1)), 0), jnp.add, 1)
    return _three(_pad(x, 0), jnp.add, 1) / count


def _convolve(
    params: Params, name: str, x: jax.Array, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    """Eq. (3)."""
    x = jax.lax.conv_general_dilated(
        x,
        params[name]["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.relu(x + params[name]["bias"])


def _project(params: Params, names: list[str], x: jax.Array) -> dict[str, jax.Array]:
    """The 1 x 1 convolutions `names` of the same x in one product, before bias and relu."""
    kernels = [params[name]["kernel"][0, 0] for name in names]
    product = jnp.einsum(
        "bhwi,io->bhwo", x, jnp.concatenate(kernels, -1), precision=jax.lax.Precision.HIGHEST
    )
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])
    return dict(zip(names, jnp.split(product, ends[:-1], -1), strict=True))


def _run_block(params: Params, block: str, x: jax.Array) -> jax.Array:
    branches, pool = _BLOCKS[block]
    stages = {branch: _stages(block, branch) for branch in branches}
    entries = {branch: next(iter(stages[branch][0].items())) for branch in branches}
    shared = [name for branch, (name, kernel) in entries.items() if kernel[:2] == (1, 1)]
    if pool == "maximum":
        shared.remove(f"{block}.branch_pool")  # a maximum does not commute with the convolution
    projected = _project(params, shared, x)
    outputs = []
    for branch in branches:
        y, rest = x, stages[branch]
        name = entries[branch][0]
        if name in projected:
            y, rest = projected[name], rest[1:]
            y = _average(y) if branch == "branch_pool" else y
            y = jax.nn.relu(y + params[name]["bias"])
        elif branch == "branch_pool":
            y = _three(_pad(x, -jnp.inf), jnp.maximum, 1)
        for i, stage in enumerate(rest):
            halve = pool == "reduce" and i == len(rest) - 1
            how = {"stride": 2, "padding": "VALID"} if halve else {}
            y = jnp.concatenate([_convolve(params, name, y, **how) for name in stage], -1)
        outputs.append(y)
    if pool == "reduce":
        outputs.append(_three(x, jnp.maximum, 2))
    return jnp.concatenate(outputs, -1)


def features(params: Params, images: jax.Array) -> jax.Array:
    """The 2048 pool features of FID, eq. (4).

    Args:
      params: of `params_from_arrays` or `load`.
      images: uint8 [B, H, W, 3] of any size.

    Returns:
      [B, 2048] float32. Jittable; compiles once a shape of images.

    Raises:
      ValueError: images of another shape or type.
    """
    x = _prepare(images)
    for name, (_, stride, padding) in _STEM.items():
        x = _convolve(params, name, x, stride, padding)
        if name in _POOL_AFTER:
            x = _three(x, jnp.maximum, 2)
    for block in _BLOCKS:
        x = _run_block(params, block, x)
    return jnp.mean(x, axis=(1, 2))


def features_and_logits(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features [B, 2048] and logits [B, 1008], eq. (4) and (5), from one pass."""
    pool = features(params, images)
    return pool, jnp.matmul(pool, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)


def logits(params: Params, images: jax.Array) -> jax.Array:
    """Logits of the Inception Score, eq. (5): uint8 [B, H, W, 3] to [B, 1008]; see `features`."""
    return features_and_logits(params, images)[1]
