"""A network's weights in a file: safetensors, which holds arrays and nothing to run.

Arrays are named by their path, with dots: `enc_32x32_block0.conv0.kernel`.
"""

import functools
import os
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion.models.unet import UNet
from warm_diffusion.runtime import storage


@functools.partial(jax.jit, static_argnums=0)
def init_params(network: UNet, key: jax.Array) -> dict:
    """Fresh parameters; `init_params.eval_shape(network, key)` tells their shapes alone."""
    size, level = network.resolution, jnp.zeros((1,))
    return network.init(key, jnp.zeros((1, size, size, network.channels)), level, level)["params"]


def flatten(tree: Mapping) -> dict:
    """{"a": {"b": array}} to {"a.b": array}."""
    return flax.traverse_util.flatten_dict(tree, sep=".")


_TYPES = {"F32": np.float32, "BF16": jnp.bfloat16}


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A file of float32 or bfloat16 arrays by name."""
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    return safetensors.numpy.save(arrays)


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name.

    Numbers stored as bfloat16 are returned as float32.

    Raises:
      ValueError: no such file, another kind of file, or arrays of other types or not finite.
    """
    try:
        entries = safetensors.deserialize(storage.read_bytes(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from error
    bad = [f"{name} ({entry['dtype']})" for name, entry in entries if entry["dtype"] not in _TYPES]
    arrays = {
        name: np.frombuffer(entry["data"], _TYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in entries
        if entry["dtype"] in _TYPES
    }
    bad += [f"{name} (not finite)" for name, a in arrays.items() if not np.all(np.isfinite(a))]
    if bad:
        raise ValueError(
            f"{path}: expected finite numbers, float32 or bfloat16, got others in {', '.join(bad)}"
        )
    return arrays


def unflatten(arrays: Mapping[str, np.ndarray], like: Mapping) -> dict:
    """{"a.b": array} to {"a": {"b": array}}.

    Raises:
      ValueError: names or shapes are not those of the tree `like`; the first are named.
    """
    expected, found = (
        {name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (flatten(like), arrays)
    )
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"these are weights of another network: {'; '.join(problems[:5])}{more}")
    return flax.traverse_util.unflatten_dict(dict(arrays), sep=".")


def at_resolution(params: Mapping, network: UNet, resolution: int) -> dict:
    """A network's parameters by the names of the same network at another resolution.

    Levels are named after their size: those of 16x16, 8x8 become those of 32x32, 16x16.
    """
    names = {
        f"_{network.resolution >> level}x{network.resolution >> level}_": (
            f"_{resolution >> level}x{resolution >> level}_"
        )
        for level in range(len(network.channel_mult))
    }

    def renamed(name: str) -> str:
        return next((name.replace(old, new) for old, new in names.items() if old in name), name)

    return {renamed(name): value for name, value in params.items()}
