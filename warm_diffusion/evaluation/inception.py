"""The InceptionV3 of the Frechet Inception distance: TensorFlow's graph of 2015-12-05, in JAX.

    (1)  resize       TF1's bilinear to 299 x 299: output i reads input i * size / 299, without
                      half-pixel centres or antialiasing; past the last row the last row repeats
    (2)  normalise    (x - 128) / 128, not 127.5
    (3)  convolution  relu(k * x + b) with batch normalisation folded in:
                      k = gamma w / s, b = beta - gamma mean / s, s = sqrt(variance + 0.001)
    (4)  features     the mean over the last 8 x 8 grid: 2048 numbers

Architecture: Szegedy et al. 2015 (arXiv 1512.00567), figures 5 to 7. This graph differs from
torchvision's InceptionV3 in two ways that move every FID: averages over 3 x 3 neighbours leave
the padding out of the count, and the last block pools by maximum. Layers have the names of
pytorch-fid's and torch-fidelity's weights file, which is one.

Deliberately absent: training, the classifiers, and any download. The published weights are torch's
file, which is read without torch, running nothing in it.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

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

    Names beyond the needed ones are ignored (`num_batches_tracked`, `fc`, `AuxLogits`).

    Returns:
      Layer to {"kernel": HWIO, "bias": [O]}, eq. (3), float32, folded in float64.

    Raises:
      ValueError: missing or misshaped arrays, which it names, or numbers that are not finite.
    """
    problems = []
    for name, shape in array_shapes().items():
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

    return {name: folded(arrays, f"{name}.conv", f"{name}.bn") for name in layer_shapes()}


def folded(arrays: Mapping[str, np.ndarray], convolution: str, norm: str) -> dict[str, jax.Array]:
    """Kernel [h, w, in, out] and bias [out] of a convolution of PyTorch's and its norm, eq. (3)."""
    weight = np.asarray(arrays[f"{convolution}.weight"], np.float64).transpose(2, 3, 1, 0)
    gamma, beta, mean, variance = (
        np.asarray(arrays[f"{norm}.{name}"], np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + _EPSILON)
    return {
        "kernel": jnp.asarray(weight * scale, jnp.float32),
        "bias": jnp.asarray(beta - mean * scale, jnp.float32),
    }


@functools.cache
def layer_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Every convolution: name to (height, width, channels in, channels out)."""
    shapes = {}

    def record(name, x, kernel, stride=1, padded=True):
        height, width, out = kernel
        shapes[name] = (height, width, x.shape[3], out)
        rows, columns = x.shape[1:3]
        if not padded:
            rows, columns = (rows - height) // stride + 1, (columns - width) // stride + 1
        return jnp.zeros((len(x), rows, columns, out))

    jax.eval_shape(lambda x: _graph(record, x), jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), float))
    return shapes


def array_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published arrays that are used."""
    shapes = {}
    for name, (height, width, channels, out) in layer_shapes().items():
        shapes[f"{name}.conv.weight"] = (out, channels, height, width)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{statistic}"] = (out,)
    return shapes


def abstract_params() -> Params:
    """Shapes and types of `params_from_arrays`, to compile without weights."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return {n: {"kernel": of(*s), "bias": of(s[3])} for n, s in layer_shapes().items()}


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


def convolve(layer: dict[str, jax.Array], x: jax.Array, stride: int = 1, padding="SAME"):
    """k * x + b in full float32."""
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return x + layer["bias"][None, None, None]


def _graph(convolve: Callable, x: jax.Array) -> jax.Array:
    """All layers but the mean, by `convolve(name, x, (height, width, channels out), ...)`.

    Without padding (at stride 2, and in the stem) the grid shrinks by the kernel.
    """
    reduced = {"stride": 2, "padded": False}

    def chain(name: str, x: jax.Array, *kernels: tuple[int, int, int], **last) -> jax.Array:
        for i, kernel in enumerate(kernels, 1):
            x = convolve(f"{name}_{i}", x, kernel, **(last if i == len(kernels) else {}))
        return x

    def fork(name: str, x: jax.Array) -> list[jax.Array]:
        return [convolve(f"{name}a", x, (1, 3, 384)), convolve(f"{name}b", x, (3, 1, 384))]

    x = convolve("Conv2d_1a_3x3", x, (3, 3, 32), **reduced)
    x = convolve("Conv2d_2a_3x3", x, (3, 3, 32), padded=False)
    x = convolve("Conv2d_2b_3x3", x, (3, 3, 64))
    x = _three(x, jnp.maximum, stride=2)
    x = convolve("Conv2d_3b_1x1", x, (1, 1, 80))
    x = convolve("Conv2d_4a_3x3", x, (3, 3, 192), padded=False)
    x = _three(x, jnp.maximum, stride=2)
    for block, pooled in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
        branches = [
            convolve(f"{block}.branch1x1", x, (1, 1, 64)),
            chain(f"{block}.branch5x5", x, (1, 1, 48), (5, 5, 64)),
            chain(f"{block}.branch3x3dbl", x, (1, 1, 64), (3, 3, 96), (3, 3, 96)),
            convolve(f"{block}.branch_pool", _average(x), (1, 1, pooled)),
        ]
        x = jnp.concatenate(branches, -1)
    branches = [
        convolve("Mixed_6a.branch3x3", x, (3, 3, 384), **reduced),
        chain("Mixed_6a.branch3x3dbl", x, (1, 1, 64), (3, 3, 96), (3, 3, 96), **reduced),
        _three(x, jnp.maximum, stride=2),
    ]
    x = jnp.concatenate(branches, -1)
    for block, n in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}.items():
        long = (1, 1, n), (7, 1, n), (1, 7, n), (7, 1, n), (1, 7, 192)
        branches = [
            convolve(f"{block}.branch1x1", x, (1, 1, 192)),
            chain(f"{block}.branch7x7", x, (1, 1, n), (1, 7, n), (7, 1, 192)),
            chain(f"{block}.branch7x7dbl", x, *long),
            convolve(f"{block}.branch_pool", _average(x), (1, 1, 192)),
        ]
        x = jnp.concatenate(branches, -1)
    long = (1, 1, 192), (1, 7, 192), (7, 1, 192), (3, 3, 192)
    branches = [
        chain("Mixed_7a.branch3x3", x, (1, 1, 192), (3, 3, 320), **reduced),
        chain("Mixed_7a.branch7x7x3", x, *long, **reduced),
        _three(x, jnp.maximum, stride=2),
    ]
    x = jnp.concatenate(branches, -1)
    for block in ("Mixed_7b", "Mixed_7c"):
        one = chain(f"{block}.branch3x3", x, (1, 1, 384))
        two = chain(f"{block}.branch3x3dbl", x, (1, 1, 448), (3, 3, 384))
        last = block == "Mixed_7c"
        pooled = _three(x, jnp.maximum, padding=-jnp.inf) if last else _average(x)
        branches = [
            convolve(f"{block}.branch1x1", x, (1, 1, 320)),
            *fork(f"{block}.branch3x3_2", one),
            *fork(f"{block}.branch3x3dbl_3", two),
            convolve(f"{block}.branch_pool", pooled, (1, 1, 192)),
        ]
        x = jnp.concatenate(branches, -1)
    return x


def features(params: Params, images: jax.Array) -> jax.Array:
    """The pool features of FID [B, 2048], float32, eq. (4), of uint8 images [B, H, W, 3]; jittable.

    Raises:
      ValueError: images of another shape or type.
    """

    def layer(name, x, kernel, stride=1, padded=True):
        # One row and column too many is computed and dropped: XLA's CPU convolutions (jax 0.10) are
        # up to seven times slower when nothing is padded, the whole network half as fast again.
        padding = "SAME" if padded else ((0, stride), (0, stride))
        x = convolve(params[name], x, stride, padding)
        return jax.nn.relu(x if padded else x[:, :-1, :-1])

    return jnp.mean(_graph(layer, _prepare(images)), axis=(1, 2))


def load(path: str | os.PathLike) -> tuple[Params, str]:
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
        # The latter three report types that numpy lacks (bfloat16).
        except (safetensors.SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is neither torch's file nor a safetensors one, or damaged: {error}"
            ) from error
    return params_from_arrays(arrays), found
