"""The InceptionV3 of the Frechet Inception distance: TensorFlow's graph of 2015-12-05, in JAX.

    (1)  resize       TF1's bilinear to 299 x 299: output i reads input i * size / 299, without
                      half-pixel centres or antialiasing; past the last row the last row repeats
    (2)  normalise    (x - 128) / 128, not 127.5
    (3)  convolution  relu(k * x + b) with batch normalisation folded in:
                      k = gamma w / s, b = beta - gamma mean / s, s = sqrt(variance + 0.001)
    (4)  features     the mean over the last 8 x 8 grid: 2048 numbers

Architecture: Szegedy et al. 2015 (arXiv 1512.00567), figures 5 to 7. This graph differs from
torchvision's InceptionV3 in two ways that move every FID: averages over 3 x 3 neighbours leave
the padding out of the count, and the last block pools by maximum. `inception_layers` lists the
layers, named as in pytorch-fid and torch-fidelity, which share one weights file.

Deliberately absent: training, the classifiers, and any download. The published weights are torch's
file, which is read without torch, running nothing in it.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion.evaluation import inception_layers as layers
from warm_diffusion.runtime import storage, torch_files
from warm_diffusion.runtime.console import say

Params = dict[str, dict[str, jax.Array]]

# In pytorch-fid's release `fid_weights`; torch-fidelity's weights-inception-2015-12-05-6726825d.pth
# is the same file. Their names end in the first digits of its SHA-256.
PUBLISHED_NAME = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_SIZE = 299
_EPSILON = 1e-3


def params_from_arrays(arrays: Mapping[str, np.ndarray]) -> Params:
    """Parameters from arrays named and laid out as in pytorch-fid and torch-fidelity.

    Args:
      arrays: name to array, convolutions OIHW; names beyond the needed ones are ignored
        (`num_batches_tracked`, `fc`, `AuxLogits`).

    Returns:
      Layer to {"kernel": HWIO, "bias": [1, 1, 1, O]}, eq. (3), float32, folded in float64.

    Raises:
      ValueError: missing or misshaped arrays, which it names, or numbers that are not finite.
    """
    problems = []
    for name, shape in layers.array_shapes().items():
        if name not in arrays:
            problems.append(f"missing {name}")
        elif np.shape(arrays[name]) != shape:
            problems.append(f"{name} has shape {np.shape(arrays[name])}, expected {shape}")
        elif not np.all(np.isfinite(arrays[name])):
            problems.append(f"{name} has numbers that are not finite")
        elif name.endswith("running_var") and np.any(arrays[name] < 0):
            problems.append(f"{name} has negative variances")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" * (len(problems) > 6))
        raise ValueError(f"these are not the weights of the FID InceptionV3: {shown}")

    params = {}
    for name in layers.layer_shapes():
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


def abstract_params() -> Params:
    """Shapes and types of `params_from_arrays`, to compile without weights."""
    shapes = {
        name: {"kernel": shape, "bias": (1, 1, 1, shape[3])}
        for name, shape in layers.layer_shapes().items()
    }
    return {
        name: {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in layer.items()}
        for name, layer in shapes.items()
    }


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
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"expected images [B, H, W, 3], got {images.shape}; repeat a grey channel three times"
        )
    if images.dtype != jnp.uint8:
        raise ValueError(f"expected uint8 images in 0..255, got {images.dtype}: convert them first")
    rows, columns = (jnp.asarray(_resize_matrix(size)) for size in images.shape[1:3])
    x = images.astype(jnp.float32)
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)
    return (x - 128) / 128


def _three(
    x: jax.Array,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    stride: int = 1,
    padding: float | None = None,
) -> jax.Array:
    """`combine` over 3 x 3 windows, by rows and then by columns; with a padding value or without.

    Three slices an axis: on a CPU several times faster than XLA's reduce_window.
    """
    if padding is not None:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=padding)
    for axis in (1, 2):
        stop = x.shape[axis] - 2
        first, middle, last = (jax.lax.slice_in_dim(x, i, stop + i, stride, axis) for i in range(3))
        x = combine(combine(first, middle), last)
    return x


def _average(x: jax.Array) -> jax.Array:
    """Mean of each position's 3 x 3 neighbours, padding left out of the count."""
    count = _three(jnp.ones((1, *x.shape[1:3], 1)), jnp.add, padding=0)
    return _three(x, jnp.add, padding=0) / count


def _convolve(
    params: Params, name: str, x: jax.Array, stride: int = 1, padded: bool = True
) -> jax.Array:
    """Eq. (3); without padding the grid shrinks by the kernel."""
    # One row and column too many is computed and dropped: XLA's CPU convolutions (jax 0.10) are up
    # to seven times slower when nothing at all is padded, the whole network half as fast again.
    x = jax.lax.conv_general_dilated(
        x,
        params[name]["kernel"],
        (stride, stride),
        "SAME" if padded else ((0, stride), (0, stride)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    x = x if padded else x[:, :-1, :-1]
    return jax.nn.relu(x + params[name]["bias"])


def _run_block(params: Params, block: str, x: jax.Array) -> jax.Array:
    branches, pool = layers.BLOCKS[block]
    outputs = []
    for branch in branches:
        y, stages = x, layers.stages(block, branch)
        if branch == "branch_pool":
            y = _average(x) if pool == "average" else _three(x, jnp.maximum, padding=-jnp.inf)
        for i, stage in enumerate(stages):
            halve = pool == "reduce" and i == len(stages) - 1
            how = (2, False) if halve else (1, True)
            y = jnp.concatenate([_convolve(params, name, y, *how) for name in stage], -1)
        outputs.append(y)
    if pool == "reduce":
        outputs.append(_three(x, jnp.maximum, stride=2))
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
    for name, (_, stride, padded) in layers.STEM.items():
        x = _convolve(params, name, x, stride, padded)
        if name in layers.POOL_AFTER:
            x = _three(x, jnp.maximum, stride=2)
    for block in layers.BLOCKS:
        x = _run_block(params, block, x)
    return jnp.mean(x, axis=(1, 2))


class Weights(NamedTuple):
    """Parameters and the SHA-256 of the file that they came from."""

    params: Params
    weights_hash: str


def load(path: str | os.PathLike) -> Weights:
    """Parameters from the published file, and its SHA-256 to store with every result.

    Args:
      path: the published file, or other weights of the same names as .pth or .safetensors.

    Raises:
      ValueError: no such file (says where the weights come from), a file that holds more than
        arrays, or a damaged one, or other weights.
    """
    path = storage.local(path or PUBLISHED_NAME, "eval.inception_weights")
    if not path.is_file():
        raise ValueError(
            f"features=inception: no Inception weights at {path} (eval.inception_weights): fetch "
            f"them by python -m warm_diffusion.public get {PUBLISHED_NAME} --to={path.parent}"
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if data.startswith((b"PK", b"\x80")):
        arrays = torch_files.read_tensors(path)
        if found != PUBLISHED_SHA256:
            say(
                f"note     {path} is not the published file (SHA-256 {found}, expected "
                f"{PUBLISHED_SHA256}): its FIDs compare with no one else's"
            )
    else:
        try:
            arrays = safetensors.numpy.load(data)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is neither torch's file nor a safetensors one, or damaged: {error}"
            ) from error
    return Weights(params_from_arrays(arrays), found)
