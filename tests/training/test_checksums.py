"""Checksums by eq. (1), against plain Python's integers."""

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from warm_diffusion.runtime import devices
from warm_diffusion.training import checksums
from warm_diffusion.training.checksums import checksum


def mix(h):
    """MurmurHash3's last step, with Python's unbounded integers."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return h ^ (h >> 16)


def expected(name, array):
    bits = [
        int.from_bytes(element.tobytes(), "little") for element in np.asarray(array).reshape(-1)
    ]
    places = [mix(i + 1) for i in range(len(bits))]
    terms = [mix(u ^ p) for u, p in zip(bits, places, strict=True)]
    words = [
        sum(terms) % 2**32,
        sum((p | 1) * h for p, h in zip(places, terms, strict=True)) % 2**32,
    ]
    told = [[name, str(array.dtype), list(array.shape), words]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


ARRAYS = [
    np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32),
    np.float32(-0.0).reshape(()),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.arange(4, dtype=np.uint8),
    np.ones((2, 2), ml_dtypes.bfloat16),
    np.zeros((0, 4), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{list(a.shape)}")
def test_host_and_device_have_the_words_of_the_equation(array, monkeypatch):
    monkeypatch.setattr(checksums, "_CHUNK", 16)
    assert checksum({"x": array}) == expected("['x']", array)
    assert checksum({"x": jnp.asarray(array)}) == expected("['x']", array)
    monkeypatch.setattr(devices, "host_view", lambda array: array)  # as on an accelerator
    assert checksum({"x": jnp.asarray(array)}) == expected("['x']", array)


def test_any_one_bit_that_flips_is_found():
    array = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    found = {checksum(array)}
    for element in range(8):
        for bit in range(32):
            flipped = array.copy()
            flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
            found.add(checksum(flipped))
    assert len(found) == 1 + 8 * 32


def test_order_shape_type_and_name_count():
    array = np.arange(6, dtype=np.float32)
    swapped = array[[1, 0, 2, 3, 4, 5]]
    trees = [{"a": array}, {"b": array}, {"a": swapped}, {"a": array.reshape(2, 3)},
             {"a": array.view(np.int32)}, {"a": array, "b": array}]  # fmt: skip
    assert len({checksum(tree) for tree in trees}) == len(trees)
    assert len({checksum(jax.device_put(tree)) for tree in trees}) == len(trees)
