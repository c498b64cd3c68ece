"""What a network is, besides its weights: from a description in plain values to objects.

The description is what a model folder's config.json says and what every checkpoint carries:

    image_shape        [H, W, C]
    network            name (ddpmpp, ncsnpp) and arguments of that function in `models`
    parameterization   what its output means: divide, clean, score
    preconditioning    edm, or spectral
    sigma_data         standard deviation of the data
    schedule           name and arguments of that function in `schedules`: the path trained on
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import dct, models, schedules, sizes
from warm_diffusion.data.statistics import Statistics
from warm_diffusion.denoiser import Denoiser, guided, num_heads, precondition

_KEYS = (
    "image_shape", "network", "parameterization", "preconditioning", "sigma_data", "schedule",
)  # fmt: skip
PRECONDITIONINGS = ("edm", "spectral")
# Largest height and width that a network is called with, unless it was trained on larger images;
# above, overlapping tiles (`sizes.py`), so that its memory does not grow with the image.
_TILE, _OVERLAP = 128, 32


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """All of a trained network but its weights; see `build`.

    Attributes:
      description: the plain values that it was made from.
      network: the flax module.
      schedule: the path trained on.
      statistics: mean image and spectrum of the training data, or None where nobody knows them.
    """

    description: dict
    network: models.UNet
    schedule: schedules.Schedule
    statistics: Statistics | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the training images."""
        return tuple(self.description["image_shape"])

    @property
    def num_classes(self) -> int:
        """Classes that the network is told, 0 for none."""
        return self.network.num_classes

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters."""
        return models.init_params(self.network, key)

    @property
    def abstract_params(self) -> dict:
        """Shapes and types of the parameters."""
        return models.init_params.eval_shape(self.network, jax.random.key(0))

    def denoiser(
        self,
        params: dict,
        labels: jax.Array | None = None,
        *,
        augment_labels: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Denoiser:
        """The preconditioned network with its weights; with a dropout key in training mode.

        It takes images of any height and width, see `sizes.py`.
        """
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None

        def apply(x, c_noise, c_blur):
            inputs = x, c_noise, c_blur, labels, augment_labels
            return _apply(self.network, params, inputs, rngs, train)

        multiple = 2 ** (len(self.network.channel_mult) - 1)  # what it can halve
        largest = max(_TILE, *self.image_shape[:2])
        apply = sizes.at_any_size(
            apply,
            multiple=multiple,
            tile=-(-largest // multiple) * multiple,
            overlap=-(-_OVERLAP // multiple) * multiple,
        )

        def denoise(x, alpha, beta):
            x = dct.as_images(x)
            return precondition(
                apply,
                sigma_data=self.description["sigma_data"],
                parameterization=self.description["parameterization"],
                spectrum=self._mean_squares(*x.shape[1:3]),
            )(x, alpha, beta)

        return denoise

    def _mean_squares(self, height: int, width: int) -> np.ndarray | None:
        """Mean square of each DCT coefficient of images of a size, for spectral preconditioning."""
        if self.description["preconditioning"] != "spectral":
            return None
        with jax.ensure_compile_time_eval():  # numbers, also under jit
            mean = dct.dct(self.statistics.mean).mean(axis=-1)
            return np.asarray(sizes.spectrum_at(mean**2 + self.statistics.spectrum, height, width))

    def seed_denoiser(
        self, params: dict, seeds: jax.Array, *, label: int = -1, guidance: float = 1.0
    ) -> Denoiser:
        """The denoiser of each seed's class: its remainder, or `label` if that is not negative.

        Args:
          params: the weights.
          seeds: integers [B].
          label: class of all images.
          guidance: weight of the class (`denoiser.guided`); 1: not guided.

        Raises:
          ValueError: a class that the network does not have.
        """
        if self.num_classes == 0:
            if guidance != 1.0 or label >= 0:
                raise ValueError("sampling.guidance and sampling.label need a network with classes")
            return self.denoiser(params)
        if label >= self.num_classes:
            raise ValueError(f"sampling.label must be below {self.num_classes}, got {label}")
        seeds = seeds.astype(jnp.uint32)
        labels = seeds % self.num_classes if label < 0 else jnp.full_like(seeds, label)
        conditional = self.denoiser(params, labels.astype(jnp.int32))
        if guidance == 1.0:
            return conditional
        return guided(conditional, self.denoiser(params), guidance)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(network: models.UNet, params: dict, inputs: tuple, rngs: dict | None, train: bool):
    # Jitted by itself so that its many calls (a step of Heun makes two) are traced once.
    return network.apply({"params": params}, *inputs, train=train, rngs=rngs)


def check_labels(labels: ArrayLike, batch: int, num_classes: int) -> jax.Array:
    """Classes as integers [batch]; ValueError unless they are that, below `num_classes`."""
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape not in ((), (batch,)):
        raise ValueError(
            f"labels must be integers, one or {batch}, got {labels.dtype} {labels.shape}"
        )
    if not isinstance(labels, jax.core.Tracer) and not jnp.all(
        (labels >= -1) & (labels < num_classes)
    ):
        raise ValueError(f"labels must be below {num_classes} (-1: no class), got {labels}")
    return jnp.broadcast_to(labels, (batch,))


def build(
    description: Mapping, statistics: Statistics | None = None, *, remat: bool = False
) -> Architecture:
    """The objects of a description.

    Args:
      description: see the module; checked in full.
      statistics: of the training data; needed by `spectral` schedule and preconditioning.
      remat: compute blocks anew for their gradient: less memory, more work.

    Raises:
      ValueError: a key, name, number or size that is missing, not known or does not work.
    """
    missing = [key for key in _KEYS if key not in description]
    if missing:
        raise ValueError(f"the description of the network lacks {', '.join(missing)}")
    description = {key: description[key] for key in _KEYS}
    shape = description["image_shape"]
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"image_shape must be three positive integers [H, W, C], got {shape!r}")
    if not all(isinstance(description[key], Mapping) for key in ("network", "schedule")):
        raise ValueError("network and schedule must be objects with a name and its arguments")
    sigma = description["sigma_data"]
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise ValueError(f"loss.sigma_data must be a number > 0, got {sigma!r}")
    if description["preconditioning"] not in PRECONDITIONINGS:
        raise ValueError(
            f"model.preconditioning must be one of {', '.join(PRECONDITIONINGS)}, got "
            f"{description['preconditioning']!r}"
        )
    if statistics is None and needs_statistics(description):
        raise ValueError("a spectral schedule or preconditioning needs the spectrum of the data")
    network = network_of(description, remat=remat)
    heads = num_heads(description["parameterization"])
    if (network.heads, network.channels) != (heads, shape[2]):
        raise ValueError(
            f"parameterization {description['parameterization']!r} of images {shape} needs a "
            f"network of {heads} head(s) and {shape[2]} channel(s), got {network.heads} and "
            f"{network.channels}"
        )
    _check_size(network, shape)
    spectrum = None if statistics is None else statistics.spectrum
    schedule = schedules.by_name(spectrum=spectrum, **description["schedule"])
    return Architecture(description, network, schedule, statistics)


def network_of(description: Mapping, *, remat: bool = False) -> models.UNet:
    """The flax module alone."""
    return models.by_name(**description["network"], remat=remat)


def needs_statistics(description: Mapping) -> bool:
    """Whether path or denoiser depend on the data's mean and spectrum."""
    return "spectral" in (description["preconditioning"], description["schedule"]["name"])


def _check_size(network: models.UNet, image_shape) -> None:
    """Raises ValueError where the network cannot halve such images."""
    if tuple(image_shape[:2]) == (network.resolution, network.resolution):
        models.init_params.eval_shape(network, jax.random.key(0))  # traced once for all uses
        return
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)), image, level, level)
