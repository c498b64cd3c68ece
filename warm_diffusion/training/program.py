"""The training step as one program over devices: how its arguments lie there, several steps a call.

A step is a function

    (state, metrics, batch, seed, ratio) -> (state, metrics)
    (state, metrics, stored, indices, seed, ratio) -> (state, metrics)    resident data

of which the second finds its batch among all images, which are on every device.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from warm_diffusion.runtime import devices
from warm_diffusion.training.state import Batch, TrainMetrics


def jitted(step: Callable, mesh: Mesh, *, resident: bool, steps: int) -> Callable:
    """The jitted step: state and metrics donated, the batch split, the state as it is given.

    Args:
      step: see the module.
      mesh: the devices.
      resident: it is of the second kind.
      steps: that one call takes; above 1 the batch or its indices have one more axis in front, of
        this size, and the numbers are those of as many calls but for rounding.
    """
    # By XLA's CPU compiler gradients of convolutions take 20 times as long in the body of a loop.
    unroll = steps if devices.platform(mesh) == "cpu" else 1

    def several(state, metrics, *arguments):
        *stored, batches, seed, ratio = arguments

        def one(carry, batch):
            return step(*carry, *stored, batch, seed, ratio), None

        return jax.lax.scan(one, (state, metrics), batches, unroll=unroll)[0]

    everywhere, split = devices.replicated(mesh), devices.split(mesh, axis=min(steps - 1, 1))
    stored = (everywhere,) if resident else ()
    return devices.jit(
        step if steps == 1 else several,
        mesh,
        donate_argnums=(0, 1),
        # None: as it is given
        in_shardings=(None, everywhere, *stored, split, everywhere, everywhere),
        out_shardings=(None, everywhere),
    )


def arguments(
    state, data: Batch, mesh: Mesh, *, batch_size: int, resident: bool, steps: int = 1
) -> tuple:
    """The abstract arguments of the jitted step.

    Args:
      state: abstract.
      data: the images and their classes, abstract or not; without `resident` their number does not
        matter.
      mesh: the devices.
      batch_size: images a step.
      resident: see `jitted`.
      steps: see `jitted`.
    """
    everywhere, split = devices.replicated(mesh), devices.split(mesh, axis=min(steps - 1, 1))
    leading = (batch_size,) if steps == 1 else (steps, batch_size)

    def put(sharding):
        return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if resident:
        indices = jax.ShapeDtypeStruct(leading, np.dtype("int32"), sharding=split)
        batch = jax.tree.map(put(everywhere), data), indices
    else:
        batch = (
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    (*leading, *leaf.shape[1:]), leaf.dtype, sharding=split
                ),
                data,
            ),
        )
    metrics = jax.tree.map(put(everywhere), jax.eval_shape(TrainMetrics.empty))
    seed, ratio = (jax.ShapeDtypeStruct((), np.dtype(kind)) for kind in ("uint32", "float32"))
    return state, metrics, *batch, seed, ratio
