"""Inception weights that anyone can rebuild, as a file."""

import zlib

import numpy as np
import pytest

from warm_diffusion.evaluation import inception


@pytest.fixture(scope="session")
def golden_arrays():
    """Inception's arrays in torch's layout, by the recipe of shared/golden/README.md."""
    return {name: _golden(name, shape) for name, shape in inception.array_shapes().items()}


def _golden(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        array = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", "bias")):
        array = 0.1 * rng.standard_normal(shape)
    elif ".bn." in name:
        array = rng.uniform(0.5, 1.5, shape)
    else:
        array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return array.astype(np.float32)
