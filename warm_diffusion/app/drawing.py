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
from warm_diffusion.pretrained import Architecture, Sampling
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


def sampler(
    architecture: Architecture,
    schedule: Schedule,
    sampling: Sampling,
    *,
    batch_size: int,
    mesh: Mesh,
    return_trajectory: bool = False,
) -> Sampler:
    """The sampler of an architecture along a path, its seeds divided over the devices of a mesh.

    With `return_trajectory` it draws (images, states [num_steps + 1, B, H, W, C]).

    Raises:
      ValueError: a solver that is not known or does not fit the path; a batch that the devices
        cannot share.
    """
    devices.check_batch_size("sampling.batch_size", batch_size, mesh)

    def function(params, seeds, start):
        params = jax.lax.with_sharding_constraint(params, everywhere)  # in training it may be split
        return architecture.draw(
            params, seeds, schedule, sampling, start, return_trajectory=return_trajectory
        )

    everywhere, split = devices.replicated(mesh), devices.split(mesh)
    # With the shardings that a call has, so that it need not be traced again.
    params = jax.tree.map(
        lambda leaf: leaf.update(sharding=everywhere), architecture.abstract_params
    )
    seeds = jax.ShapeDtypeStruct((batch_size,), np.uint32, sharding=split)
    shape = (batch_size, *architecture.image_shape)
    image = jax.ShapeDtypeStruct(shape, np.float32, sharding=split)
    arguments = params, seeds, image if schedule.needs_start else None
    shardings = {"in_shardings": (None, split, split), "out_shardings": everywhere}
    program = devices.jit(function, mesh, **shardings)
    program.eval_shape(*arguments)  # what does not fit shows here, before any training
    return Sampler(program, arguments, batch_size, sampling.num_calls, schedule, mesh)
