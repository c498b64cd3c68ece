"""Programs and arrays on all devices.

The mesh has one axis, `data`; batches are split, the state is everywhere or split as well.
"""

import functools
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STATE_SHARDINGS = ("replicated", "fsdp")
_SMALL = 2**12  # numbers: smaller arrays are everywhere, for messages have a price of their own
# On a CPU jax 0.10 and 0.11 leave convolutions, products and sums to a library, YNNPACK. XLA's
# own sums over positions take a third of a step, YNNPACK's convolutions are slower than XLA's
# (docs/performance.md).
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# LLVM's level 3, XLA's choice, makes nothing here faster than 2, and its passes take five times as
# long over a generator of random numbers, a quarter longer over a sampler.
_CPU_LEVEL, _CPU_LEVEL_ONCE = 2, 0


def make_mesh(count: int | None = None) -> Mesh:
    """All devices of all processes along the axis `data`, or the first `count` of this process."""
    chosen = jax.devices() if count is None else jax.local_devices()[:count]
    return Mesh(np.array(chosen), ("data",))


def platform(mesh: Mesh | None = None) -> str:
    """cpu, gpu or tpu: what the devices of a mesh are, or JAX's default ones."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def jit(function: Callable, mesh: Mesh | None = None, *, once: bool = False, **options):
    """`jax.jit` for large programs, with the compiler's options for their devices.

    For calls from Python alone: JAX refuses compiler options inside another jit or gradient. With
    `once` a process runs it once, so that the time to compile it is what counts.
    """
    chosen = compiler_options(platform(mesh))
    if platform(mesh) == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
        level = {"xla_backend_optimization_level": _CPU_LEVEL_ONCE if once else _CPU_LEVEL}
        chosen = {**(chosen or {}), **level}
    return jax.jit(function, compiler_options=chosen, **options)


@functools.cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """Options for a platform; None where the user has chosen in XLA_FLAGS or XLA has none such."""
    if platform != "cpu" or any(name in os.environ.get("XLA_FLAGS", "") for name in _CPU_OPTIONS):
        return None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return None
    return _CPU_OPTIONS


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, by default the first, divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def state_shardings(kind: str, state, mesh: Mesh):
    """The sharding of each array of a state, a tree of arrays or their shapes.

    `kind` is replicated; or fsdp: each is split over the devices along its longest axis that they
    can share evenly, if there is one and the array is not small.
    """
    if kind not in STATE_SHARDINGS:
        raise ValueError(
            f"training.sharding must be one of {', '.join(STATE_SHARDINGS)}, got {kind!r}"
        )

    def choose(leaf) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if kind == "replicated" or math.prod(leaf.shape) < _SMALL or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(choose, state)


def gathered(tree, mesh: Mesh, shardings):
    """Split arrays on every device, inside jit; their gradient arrives split as they are."""

    @jax.custom_vjp
    def gather(tree):
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    # Without this rule the gradient would be added up on every device before it is split.
    gather.defvjp(
        lambda tree: (gather(tree), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, shardings),),
    )
    return gather(tree)


def global_batch(per_device: int, mesh: Mesh, count: int = 0) -> int:
    """Images at once over all devices: `per_device` on each, or fewer where `count` need fewer."""
    share = -(-count // mesh.size) or per_device
    return min(per_device, share) * mesh.size


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless a global batch divides evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(
            f"{name} is global, over all devices: expected a multiple of {mesh.size} (the number "
            f"of devices), got {batch_size}"
        )


def check_slices(grad_accumulation: int, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the images of a batch that a device holds divide into slices."""
    held = batch_size // mesh.size
    if grad_accumulation < 1 or held % grad_accumulation:
        fitting = [str(count) for count in range(1, held + 1) if held % count == 0]
        raise ValueError(
            f"training.grad_accumulation must divide the {held} images of a batch that each of "
            f"{mesh.size} devices holds: expected one of {', '.join(fitting)}, got "
            f"{grad_accumulation}"
        )


def abstract(tree, shardings):
    """Arrays that are not there yet: their shapes, types and shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def put_split(batch, mesh: Mesh, axis: int = 0, rows: np.ndarray | None = None):
    """Global arrays, split over the devices, of host arrays that every process knows.

    With indices `rows`, of those rows alone; a process reads the ones that its devices hold.
    """

    def put(leaf):
        leaf = np.asarray(leaf)
        shape = leaf.shape if rows is None else (*rows.shape, *leaf.shape[1:])
        read = lambda part: leaf[part if rows is None else rows[part[: rows.ndim]]]  # noqa: E731
        return jax.make_array_from_callback(shape, split(mesh, axis), read)

    return jax.tree.map(put, batch)


def put_replicated(tree, mesh: Mesh):
    """Host arrays, the same in every process, on every device."""
    return put_as(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put_as(tree, shardings):
    """Host arrays, the same in every process, each where its sharding says."""

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda part: leaf[part])

    return jax.tree.map(put, tree, shardings)


def host_view(array: jax.Array) -> jax.Array | np.ndarray:
    """Returns an array that is in this process's memory already, on a CPU, as one of NumPy.

    NumPy needs no program for each shape: a first save would compile some sixty.
    """
    if not array.is_fully_replicated or next(iter(array.devices())).platform != "cpu":
        return array
    return np.asarray(array.addressable_data(0))
