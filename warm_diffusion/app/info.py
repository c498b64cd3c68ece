"""Prints what a configuration means: parameters and shapes of the network, data, memory."""

import math

import clu.parameter_overview
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import denoiser
from warm_diffusion.app import build, settings
from warm_diffusion.data import Dataset
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime import devices
from warm_diffusion.runtime.console import say

_FEW_IMAGES = 1_000  # a network of 500 draws variations of them


def print_info(config: ConfigDict, details: bool = False) -> None:
    """Prints parameters, data, memory, shapes and batch sizes; trains nothing.

    With `details` also every key of the configuration and the table of parameters.

    Raises:
      ValueError: what training would refuse.
    """
    mesh = devices.make_mesh()
    devices.check_batch_size("training.batch_size", config.training.batch_size, mesh)
    data = build.dataset(config)
    build.labels(config, data)  # raises what training would
    image_shape = data.images.shape[1:]
    built = build.architecture(config, image_shape)
    settings.check_training(config, image_shape)
    build.sampler(config, built, mesh)
    params = built.abstract_params
    batch = config.training.batch_size
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    level = jax.ShapeDtypeStruct((batch,), jnp.float32)
    shapes = params, images, level, level
    raw = jax.eval_shape(lambda p, *x: built.network.apply({"params": p}, *x), *shapes)
    prediction = jax.eval_shape(lambda p, *x: built.denoiser(p)(*x), *shapes)
    heads = denoiser.PARAMETERIZATIONS[config.denoiser.parameterization]
    parts = _parts(params, heads)
    message = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    say(f"parameters {sum(parts.values()):,}: {message}")
    classes = ", ".join(data.info["class_names"]) or "none"
    if data.info["class_names"] and not config.model.num_classes:
        classes += " (not used: model.num_classes=0)"
    say(f"data       {len(data.images):,} images {image_shape}, classes: {classes}")
    say(f"cache      {data.path}")
    kind = mesh.devices.flat[0].device_kind
    say(f"devices    {mesh.size} x {kind}, {batch // mesh.size} images each")
    say(_memory(config, data, built, mesh))
    inputs = f"x {images.shape}, c_noise and c_blur {level.shape}"
    say(f"network    {inputs} -> {raw.shape}: {heads} head(s)")
    say(f"denoiser   blurry {prediction.blurry.shape}, residual {prediction.residual.shape}")
    epochs = config.training.num_steps * batch / len(data.images)
    say(f"training   {config.training.num_steps:,} steps of {batch} images: {epochs:,.1f} epochs")
    if len(data.images) < _FEW_IMAGES:
        say("note       few images get memorised: docs/train.md has settings by their number")
    if details:
        say(settings.to_json(config))
        say(clu.parameter_overview.get_parameter_overview(params, include_stats=False))


def _memory(config: ConfigDict, data: Dataset, built: Architecture, mesh: Mesh) -> str:
    """Returns what a device certainly holds all the time, without the temporaries of a step."""
    _, state = build.initial_state(config, built, mesh)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    images = data.images.nbytes if build.resident(config, data) else 0
    return (
        f"memory     at least {held / 1e9:,.3f} GB per device: weights, averages, optimizer; and "
        f"{images / 1e9:,.3f} GB of images"
    )


def _parts(params: dict, heads: int) -> dict[str, int]:
    """Parameters of EDM's network and of what is added to it."""

    def count(*prefixes: str) -> int:
        chosen = {name: tree for name, tree in params.items() if name.startswith(prefixes)}
        return clu.parameter_overview.count_parameters(chosen) if chosen else 0

    (last,) = (tree for name, tree in params.items() if name.endswith("aux_conv"))
    added = {
        "blur embedding": count("blur"),
        "second head": clu.parameter_overview.count_parameters(last) * (heads - 1) // heads,
        "augmentation input": count("map_augment"),
        "class input": count("map_label"),
    }
    return {"EDM's network": count("") - sum(added.values())} | added
