"""Images by seed: the sampler of an architecture, compiled once, over any number of devices.

An image depends on its seed alone: neither the batch nor the number of devices matters, except for
rounding.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from warm_diffusion import process, samplers
from warm_diffusion.data.images import from_uint8, to_uint8
from warm_diffusion.runtime import devices
from warm_diffusion.schedules import Schedule
from warm_diffusion.training.signals import compiling


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws images by seed in batches of one size, each from the same compiled program."""

    program: Callable  # (params, seeds [B], start [B, H, W, C] or None) -> images, jitted
    arguments: tuple  # their shapes
    batch_size: int  # the B that it is compiled for, over all devices
    num_calls: int  # of the network per image
    schedule: Schedule  # the path followed
    mesh: Mesh

    def draw(self, params: dict, seeds: np.ndarray, start: jax.Array | None) -> jax.Array:
        """Float images of a batch, of which every process passes the whole and gets all images."""
        return self.program(params, *devices.put_split((seeds, start), self.mesh))

    def generate(
        self, params: dict, seeds: Iterable[int], images: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Draws uint8 images [<= batch_size, H, W, C] of the seeds, batch by batch.

        The last batch is filled up and cut. The devices draw the next batch while the caller works
        on one. Seeds are taken as they are needed. A path that does not end in noise starts from
        `images`, uint8 [N, H, W, C], blurred.
        """
        numbers, drawn = iter(seeds), None
        while part := list(itertools.islice(numbers, self.batch_size)):
            batch = np.asarray(part, np.uint32)
            padded = np.resize(batch, self.batch_size)
            with contextlib.nullcontext() if drawn else compiling("the sampler"):
                following = self.draw(params, padded, self.start(padded, images)), len(batch)
            if drawn:
                yield to_uint8(drawn[0])[: drawn[1]]
            drawn = following
        if drawn:
            yield to_uint8(drawn[0])[: drawn[1]]

    def start(self, seeds: np.ndarray, images: np.ndarray | None) -> jax.Array | None:
        """Blurred images to start each seed from, or None on a path that ends in noise."""
        if not self.schedule.needs_start:
            return None
        if images is None:
            raise ValueError(
                "this path ends in blurred images, not in noise: sampling it needs images to blur"
            )
        t = self.schedule.t_max
        clean = from_uint8(np.asarray(images[seeds % len(images)]))
        noise = samplers.initial_noise(seeds, clean.shape[1:])
        return process.perturb(clean, noise, self.schedule.alpha(t), self.schedule.beta(t))
