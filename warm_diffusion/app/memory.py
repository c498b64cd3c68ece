"""What training needs of a device's memory, by arithmetic, before any of it is asked for.

Certain are the state, one gradient, and what a batch is made of: the images, and what the first
layer makes of them. What the backward pass keeps comes on top (`activations`, by tracing it, before
XLA's optimisations). So `certain` is too small, and what exceeds a device cannot be trained on it.
"""

import math
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion.data import Dataset

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


def of_a_device(mesh: Mesh) -> int:
    """Bytes of one of the devices: its own memory, or on a CPU a share of the machine's."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP.exists() and (text := _CGROUP.read_text().strip()).isdigit():
        limit = min(limit, int(text))
    return limit // len(mesh.local_devices)


def fits_device(config: ConfigDict, data: Dataset) -> bool:
    """Whether the images are kept on the devices."""
    return data.images.nbytes <= config.training.device_megabytes * 2**20


def certain(config: ConfigDict, data: Dataset, state, mesh: Mesh) -> int:
    """Bytes that a training step needs at least on each device.

    Args:
      config: see `configs/default.py`.
      data: the images.
      state: abstract, with shardings; its weights are `state.params`.
      mesh: the devices.
    """
    options, (height, width, channels) = config.training, data.images.shape[1:]
    images = options.batch_size // options.grad_accumulation // mesh.size
    numbers = images * height * width * (channels + config.model.model_channels)
    resident = data.images.nbytes if fits_device(config, data) else 0
    return _held(state) + _held(state.params) + 4 * numbers + resident


def _held(tree) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def activations(loss: Callable, params, *arguments) -> int:
    """Bytes that the backward pass of `loss(params, *arguments)` keeps, all arguments abstract."""

    def kept(params, *arguments):
        return jax.vjp(lambda p: loss(p, *arguments), params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, *arguments))
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)
