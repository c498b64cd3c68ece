"""Checksums of arrays on devices that do not depend on how they are split over them.

With u_i the bits of element i as an unsigned number (64 bits as two of 32), and mix a bijection of
32 bits that scatters (the last step of MurmurHash3), an array has the two words

    (1)  a = sum_i mix(u_i xor p_i),    b = sum_i (p_i or 1) mix(u_i xor p_i)    mod 2^32
         p_i = mix(i + 1)

Each device adds up what it holds, so that nothing is gathered and two words travel. A change of one
element is always found; any other damage is missed with a chance of 2^-64. Checksums do not protect
against somebody who means to deceive.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.runtime import devices

_CHUNK = 1 << 20  # elements of a host array at a time, so that they stay in the cache


def checksum(tree: Any) -> str:
    """One checksum of the names, types, shapes and elements of a tree's arrays, of the host or on
    any devices: SHA-256 of the words of eq. (1)."""
    leaves = [
        (
            jax.tree_util.keystr(path),
            devices.host_view(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    found = jax.device_get([_words(leaf) for _, leaf in leaves])
    described = [
        [name, str(leaf.dtype), list(leaf.shape), [int(word) for word in words]]
        for (name, leaf), words in zip(leaves, found, strict=True)
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _words(array: Any) -> Any:
    if isinstance(array, jax.Array):
        words = _words_on_device(array)
        # What is split needs the devices together, and where threads are fewer than devices (forced
        # CPU devices) XLA's reductions wait for each other for ever if many are under way.
        return words if array.is_fully_replicated else jax.block_until_ready(words)
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{min(array.dtype.itemsize, 4)}")
    total = np.zeros(2, np.uint32)
    for first in range(0, bits.size, _CHUNK):
        part = bits[first : first + _CHUNK].astype(np.uint32)
        positions = np.arange(first, first + part.size, dtype=np.uint32)
        total += np.stack([term.sum(dtype=np.uint32) for term in _terms(part, positions)])
    return total


@jax.jit
def _words_on_device(array: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}")
    # Rows and columns instead of an index of the whole: each device counts what it holds.
    rows = (
        jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        * np.uint32(math.prod(bits.shape[axis + 1 :]))
        for axis in range(bits.ndim)
    )
    positions = sum(rows, jnp.zeros(bits.shape, jnp.uint32))
    terms = _terms(bits.astype(jnp.uint32), positions)
    return jnp.stack([jnp.sum(term, dtype=jnp.uint32) for term in terms])


def _terms(bits, positions):
    """The terms of both sums of eq. (1)."""
    scattered = _mix(positions + np.uint32(1))
    mixed = _mix(bits ^ scattered)
    return mixed, (scattered | np.uint32(1)) * mixed


def _mix(h):
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))
