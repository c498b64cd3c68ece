"""A trained network and its weights, from a training workdir."""

import dataclasses
import pathlib

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import factory, models
from warm_diffusion.jobs.console import say
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """What sampling and evaluation need of a training run."""

    network: models.UNet
    params: dict
    weights: str  # which ones: a half-life of averaging, or raw
    step: int
    image_shape: tuple[int, int, int]
    about: dict


def split_checkpoint(checkpoint: str) -> tuple[pathlib.Path, int | None]:
    """(training workdir, step or None for the latest) of WORKDIR or WORKDIR/checkpoints/STEP."""
    path = pathlib.Path(checkpoint).expanduser().absolute()
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def choose_weights(config: ConfigDict, state: TrainState) -> tuple[dict, str]:
    """The weights of `config.sampling.ema`, and what to call them."""
    index, halflives = config.sampling.ema, config.training.ema_halflife_images
    if index == -1:
        return state.params, "raw"
    if not 0 <= index < len(halflives):
        raise ValueError(
            f"sampling.ema must be -1 (raw weights) or 0 to {len(halflives) - 1}, got {index}"
        )
    return state.ema[index], f"ema {halflives[index]} images"


def load_trained(config: ConfigDict, checkpoint: str, mesh: Mesh) -> Trained:
    """Restores the weights that `config.sampling.ema` names.

    Raises:
      ValueError: no checkpoint there, or one that cannot be restored.
    """
    workdir, step = split_checkpoint(checkpoint)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"there are no checkpoints in {workdir}: train first, or set --checkpoint")
    saved = Checkpoints(workdir, read_only=True)
    try:
        steps = saved.steps()
        if not steps:
            raise ValueError(f"there is no finished checkpoint in {workdir / 'checkpoints'}")
        step = steps[-1] if step is None else step
        about = saved.about(step)
        image_shape = tuple(about["image_shape"])
        network = factory.model(config, image_shape)
        _, abstract = factory.initial_state(config, network, image_shape, mesh)
        try:
            state = saved.restore(step, abstract)
        except Exception as error:
            raise ValueError(
                f"checkpoint {step} of {workdir} cannot be restored: {str(error)[:300]}"
            ) from error
    finally:
        saved.close()
    params, weights = choose_weights(config, state)
    jax.block_until_ready(params)
    say(f"weights  {weights}, step {step:,} of {workdir}")
    return Trained(network, params, weights, step, image_shape, about)
