"""A trained network as a model folder for others, and as a program that needs JAX alone."""

import datetime
import json
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import card, drawing, pretrained
from warm_diffusion.app import build
from warm_diffusion.data.images import quantized
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import say, say_weights

_PLATFORMS = ("cpu", "cuda", "tpu")


def export(config: ConfigDict, workdir: str, checkpoint: str) -> pathlib.Path:
    """Writes the weights that `config.sampling.ema` names as a model folder `workdir`; returns it.

    The picture in its card is drawn by `config.sampling`, as many images as
    `config.export.num_images`. With `config.export.program` also sampler.stablehlo, see `program`.

    Raises:
      ValueError: no usable checkpoint, a folder that is not empty, settings that do not work.
    """
    folder, mesh = storage.path(workdir), devices.make_mesh()
    pretrained.check_new(folder)
    model = pretrained.load(checkpoint, config.sampling.ema)
    say_weights(model.info, checkpoint)
    built = build.trained_architecture(config, model.architecture)
    sampler, info = build.sampler(config, built, mesh), dict(model.info)
    if config.export.evaluation:
        evaluated = storage.path(config.export.evaluation)
        info["evaluation"] = card.evaluations(evaluated, info["weights_sha256"])
    model = pretrained.Model(built, model.params, info)
    samples = _draw(config, model, sampler, mesh)
    files = {}
    if config.export.program:
        if sampler.schedule.needs_start:
            raise ValueError("export.program: this path starts from images, not from seeds alone")
        settings = build.sampling_settings(config)
        content = program(built, model.params, sampler.schedule, settings)
        about = json.dumps(_about(config, sampler), indent=2) + "\n"
        files = {"sampler.stablehlo": content, "sampler.json": about.encode()}
    if jax.process_index() == 0:
        caption = f"{config.sampling.solver}, {sampler.num_calls} network calls"
        if config.sampling.grid != "edm":
            caption += f", grid {config.sampling.grid}"
        if config.sampling.bnr >= 0:
            caption += f", along BNR {config.sampling.bnr:g}"
        pretrained.save(model, folder, samples=samples, caption=caption, files=files)
        say(f"model    {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return folder


def _draw(config: ConfigDict, model: pretrained.Model, sampler: drawing.Sampler, mesh: Mesh):
    if not config.export.num_images:
        return np.zeros((0, *model.image_shape), np.uint8)
    images = build.dataset(config).images if sampler.schedule.needs_start else None
    params = devices.put_replicated(model.params, mesh)
    seeds = np.arange(config.export.num_images)
    return np.concatenate(list(sampler.generate(params, seeds, images)))


def program(built, params: dict, schedule, settings: drawing.Settings) -> bytes:
    """The sampler with its weights inside, serialized by jax.export.

    `jax.export.deserialize(bytearray(content)).call(seeds)` takes uint32 seeds [B], any B, and
    gives uint8 images [B, H, W, C], on a CPU, an NVIDIA GPU or a TPU.

    Raises:
      ValueError: the package flatbuffers is not there.
    """

    def draw(seeds):
        return quantized(drawing.draw(built, params, seeds, schedule, settings))

    (batch,) = jax.export.symbolic_shape("batch")
    seeds = jax.ShapeDtypeStruct((batch,), np.uint32)
    exported = jax.export.export(jax.jit(draw), platforms=_PLATFORMS)(seeds)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ValueError(
            "export.program needs the package flatbuffers: pip install flatbuffers"
        ) from error


def _about(config: ConfigDict, sampler: drawing.Sampler) -> dict:
    today = datetime.datetime.now(datetime.UTC).date()
    return {
        "file": "sampler.stablehlo",
        "call": "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(seeds)",
        "seeds": "uint32 [B]",
        "returns": "uint8 images [B, H, W, C]",
        "platforms": list(_PLATFORMS),
        "network_calls": sampler.num_calls,
        "sampling": config.sampling.to_dict(),
        "jax": jax.__version__,
        "written": today.isoformat(),
        "valid": "JAX promises to read it for 6 months from then; export anew after that",
    }
