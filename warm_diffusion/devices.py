"""Arrays on all devices: one mesh axis `data`; state replicated, batches split."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(count: int | None = None) -> Mesh:
    """All devices of all processes along the axis `data`, or the first `count` of this process."""
    chosen = jax.devices() if count is None else jax.local_devices()[:count]
    return Mesh(np.array(chosen), ("data",))


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


def process_slice(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """This process's part of a global batch that every process of the mesh knows."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    share, own = len(array) // len(processes), processes.index(jax.process_index())
    return array[own * share : (own + 1) * share]


def put_split(batch, mesh: Mesh):
    """Global arrays, split over the devices, of a batch of host arrays that every process knows."""
    return put_local(jax.tree.map(lambda leaf: process_slice(np.asarray(leaf), mesh), batch), mesh)


def put_local(part, mesh: Mesh):
    """The same of the part of the batch that each process holds (`process_slice`)."""
    sharding = split(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), part)


def put_replicated(tree, mesh: Mesh):
    """Host arrays, the same in every process, on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)
