"""What the loop is fed: the jitted step and its batches, which a thread puts on the devices."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion.app import build
from warm_diffusion.app.memory import fits_device
from warm_diffusion.architecture import Architecture
from warm_diffusion.data import Dataset, batch_indices
from warm_diffusion.runtime import devices
from warm_diffusion.training.state import Batch, TrainMetrics, TrainState

_AHEAD = 2  # batches that wait for the devices


@dataclasses.dataclass(frozen=True)
class Feed:
    """The steps of a run.

    Attributes:
      advance: (state, metrics, batch) -> (state, metrics) after `steps` steps. It starts the
        devices and waits for nothing.
      load: the batch of the call that begins after so many steps, on the devices.
      steps: that a call takes.
    """

    advance: Callable[[TrainState, TrainMetrics, tuple], tuple[TrainState, TrainMetrics]]
    load: Callable[[int], tuple]
    steps: int

    def batches(self, start: int, stop: int) -> Iterator[concurrent.futures.Future]:
        """The batches of the calls from step `start` to `stop`; the next two are under way."""
        with concurrent.futures.ThreadPoolExecutor(1, "batches") as thread:
            pending = collections.deque()
            try:
                for step in range(start, stop, self.steps):
                    pending.append(thread.submit(self.load, step))
                    if len(pending) > _AHEAD:
                        yield pending.popleft()
                yield from pending
            finally:
                thread.shutdown(cancel_futures=True)


def make_feed(
    config: ConfigDict, built: Architecture, data: Dataset, mesh: Mesh, abstract: TrainState
) -> Feed:
    """The steps of a configuration; traced once, so that what is wrong shows."""
    options, labels = config.training, build.labels(config, data)
    steps, count, resident = options.steps_per_call, len(data.images), fits_device(config, data)
    everything, axis = Batch(data.images, labels), min(steps - 1, 1)
    step = build.train_step(config, built, mesh, resident=resident)
    step.eval_shape(*build.step_arguments(config, abstract, everything, mesh, resident=resident))
    # On the devices: the host would send them again at every step.
    varied = devices.put_replicated((np.uint32(config.seed), np.float32(0)), mesh)
    stored = (devices.put_replicated(everything, mesh),) if resident else ()

    def indices(first: int) -> np.ndarray:
        each = [
            batch_indices(config.seed, number, options.batch_size, count)
            for number in range(first, first + steps)
        ]
        return np.stack(each) if axis else each[0]

    def load(first: int) -> tuple:
        if resident:
            return devices.put_split(indices(first), mesh, axis)
        chosen = devices.process_slice(indices(first), mesh, axis)
        return devices.put_local(jax.tree.map(lambda leaf: leaf[chosen], everything), mesh, axis)

    def advance(state, metrics, batch):
        return step(state, metrics, *stored, batch, *varied)

    return Feed(advance, load, steps)
