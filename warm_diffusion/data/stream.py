"""The order of images: a pure function of (seed, step).

Position p = step * batch_size + i of a run is image perm_e[p mod N] of epoch e = p div N, with
perm_e a permutation drawn from fold_in(seed key, e). So every epoch sees every image once, a batch
may span two epochs; resuming needs one integer and works on any number of devices.
"""

import functools

import jax
import numpy as np


def _device() -> jax.Device:
    """The host's own device, which need not wait for a busy accelerator; the order is the same."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names an accelerator alone
        return jax.local_devices()[0]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    with jax.default_device(_device()):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        order = np.asarray(jax.random.permutation(key, num_examples), np.int32)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Indices of the global batch of a step, from 0, among num_examples: int32 [batch_size]."""
    if batch_size < 1 or num_examples < 1:
        raise ValueError(
            f"batch_size and num_examples must be positive, got {batch_size}, {num_examples}"
        )
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
        offset = epoch * num_examples
        order = _permutation(seed, epoch, num_examples)
        parts.append(order[max(start - offset, 0) : stop - offset])
    return np.concatenate(parts)
