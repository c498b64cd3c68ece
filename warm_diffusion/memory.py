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


def certain(
    state, image_shape: tuple[int, int, int], mesh: Mesh, *,
    batch_size: int, grad_accumulation: int, width: int, resident: int,
) -> int:  # fmt: skip
    """Bytes that a training step needs at least on each device.

    Args:
      state: abstract, with shardings; its weights are `state.params`.
      image_shape: (H, W, C).
      mesh: the devices.
      batch_size: over all devices.
      grad_accumulation: slices of it, one after the other.
      width: channels of the first layer.
      resident: bytes of data that every device holds.
    """
    pixels = math.prod(image_shape[:2])
    numbers = batch_size // grad_accumulation // mesh.size * pixels * (image_shape[2] + width)
    return _held(state) + _held(state.params) + resident + 4 * numbers


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
