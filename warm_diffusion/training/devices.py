"""Arrays on all devices: one mesh axis `data`; state replicated, batches split."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes along the axis `data`."""
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless a global batch divides evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{name} is global, over all devices: expected a multiple of {mesh.size} (the number "
            f"of devices), got {batch_size}"
        )


def process_slice(array: np.ndarray) -> np.ndarray:
    """This process's part of a global batch that every process knows."""
    share = len(array) // jax.process_count()
    return array[jax.process_index() * share : (jax.process_index() + 1) * share]


def put_split(local, mesh: Mesh):
    """Global arrays of the parts that each process holds (`process_slice`)."""
    sharding = split(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), local)


def put_replicated(tree, mesh: Mesh):
    """Host arrays, the same in every process, on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)
