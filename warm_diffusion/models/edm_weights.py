"""EDM's network weights in this project's networks.

EDM stores torch arrays (convolutions OIHW, linear layers OI) under names like
`model.enc.32x32_block0.conv0.weight`. Blocks and layers carry the same names here, so the mapping
is mechanical. The second head and the blur embedding have no counterpart and start at zero.
"""

import re
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.models.unet import UNet, scaled_init

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _edm_name(path: tuple[str, ...]) -> str:
    """EDM's name of one of our parameters: ("enc_8x8_block0", "conv0", "kernel") and so on."""
    if path == ("frequencies",):
        return "map_noise.freqs"
    module = re.sub(r"^(enc|dec)_", r"\1.", path[0])
    return ".".join([module, *path[1:-1], _LEAVES[path[-1]]])


def _to_edm_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_edm_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def from_edm(model: UNet, arrays: Mapping[str, np.ndarray], key: jax.Array) -> dict:
    """Variables of `model` with EDM's weights in the trunk and the denoiser head.

    Args:
      model: a network of the same shape as EDM's.
      arrays: EDM's parameters under its own names (a leading `model.` is optional), torch layouts;
        its fixed `resample_filter` buffers are ignored.
      key: PRNG key for what EDM lacks (the first layer of the blur embedding).

    Returns:
      {"params": ...} for `model.apply`.

    Raises:
      ValueError: missing, extra or misshaped arrays, which it names.
    """
    arrays = {name.removeprefix("model."): np.asarray(array) for name, array in arrays.items()}
    arrays = {name: a for name, a in arrays.items() if not name.endswith("resample_filter")}
    size = model.resolution
    level = jnp.zeros((1,))
    shapes = jax.eval_shape(
        model.init, key, jnp.zeros((1, size, size, model.channels)), level, level
    )
    params = flax.traverse_util.flatten_dict(shapes["params"])
    output_layer = f"dec_{size}x{size}_aux_conv"

    problems, used = [], set()
    for path, value in params.items():
        if path[0] in ("blur0", "blur1"):
            init = scaled_init(1.0 if path == ("blur0", "kernel") else 0.0)
            params[path] = init(key, value.shape)
            continue
        name = _edm_name(path)
        if name not in arrays:
            problems.append(f"missing {name}")
            continue
        used.add(name)
        target = np.zeros(value.shape, np.float32)
        # The output layer holds both heads; EDM's is the first, the denoiser's.
        part = target[..., : model.channels] if path[0] == output_layer else target
        expected = _to_edm_layout(path, part).shape
        if arrays[name].shape != expected:
            problems.append(f"{name} has shape {arrays[name].shape}, expected {expected}")
            continue
        part[...] = _from_edm_layout(path, arrays[name])
        params[path] = jnp.asarray(target)
    problems += [f"unknown {name}" for name in sorted(set(arrays) - used)]
    if problems:
        raise ValueError("EDM weights do not fit the network: " + "; ".join(problems))
    return {"params": flax.traverse_util.unflatten_dict(params)}
