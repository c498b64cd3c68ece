"""A trained network as a model folder for others, and as a program that needs JAX alone."""

import dataclasses
import datetime
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import pretrained
from warm_diffusion.app import build
from warm_diffusion.data.images import quantized
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import say
from warm_diffusion.schedules import Schedule

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
    model = build.trained(config, checkpoint)
    sampler = build.sampler(config, model, mesh, num_images=config.export.num_images)
    sampling = build.sampling_settings(config)
    starts = sampler.schedule.needs_start
    if config.export.program and starts:
        raise ValueError("export.program: this path starts from images, not from seeds alone")
    evaluated = config.export.evaluation or pretrained.split_checkpoint(checkpoint)[0]
    reports = _evaluations(storage.path(evaluated), model.info["weights_sha256"])
    if reports:
        model = dataclasses.replace(model, info=model.info | {"evaluation": reports})
    params = devices.put_replicated(model.params, mesh)
    images = build.dataset(config).images if starts and config.export.num_images else None
    drawn = list(sampler.generate(params, range(config.export.num_images), images))
    files = {}
    if config.export.program:
        files["sampler.stablehlo"] = program(model, sampler.schedule, sampling)
        files["sampler.json"] = storage.to_json(_about(config, sampling))
    if jax.process_index() == 0:
        caption = f"{sampling.solver}, {sampling.num_calls} network calls"
        caption += f", {sampling.time_grid} time grid"
        if config.sampling.bnr >= 0:
            caption += f", along BNR {config.sampling.bnr:g}"
        samples = np.concatenate(drawn) if drawn else np.zeros(0)
        pretrained.save(model, folder, samples=samples, caption=caption, files=files)
        say(f"model    {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return folder


def _evaluations(workdir: pathlib.Path, weights_sha256: str) -> list[dict]:
    """The reports of `--mode=eval` in a workdir on these weights, without their details."""
    details = ("rounds", "schedule", "versions", "metric_settings", "identity", "seconds")
    found = []
    for path in sorted((workdir / "eval").glob("*.json")):
        try:
            report = storage.read_json(path)
        except ValueError:
            continue  # not one of ours, or damaged: evaluating says so
        if isinstance(report, dict) and report.get("weights_sha256") == weights_sha256:
            found.append({key: value for key, value in report.items() if key not in details})
    return found


def program(model: pretrained.Model, schedule: Schedule, sampling: pretrained.Sampling) -> bytes:
    """The sampler with its weights inside, serialized by jax.export.

    `jax.export.deserialize(bytearray(content)).call(seeds)` takes uint32 seeds [B], any B, and
    gives uint8 images [B, H, W, C], on a CPU, an NVIDIA GPU or a TPU.

    Raises:
      ValueError: the package flatbuffers is not there.
    """

    def draw(seeds):
        return quantized(model.draw(model.params, seeds, schedule, sampling))

    (batch,) = jax.export.symbolic_shape("batch")
    seeds = jax.ShapeDtypeStruct((batch,), np.uint32)
    exported = jax.export.export(jax.jit(draw), platforms=_PLATFORMS)(seeds)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ValueError(
            "export.program needs the package flatbuffers: pip install flatbuffers"
        ) from error


def _about(config: ConfigDict, sampling: pretrained.Sampling) -> dict:
    return {
        "file": "sampler.stablehlo",
        "call": "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(seeds)",
        "seeds": "uint32 [B]",
        "returns": "uint8 images [B, H, W, C]",
        "platforms": list(_PLATFORMS),
        "network_calls": sampling.num_calls,
        "sampling": config.sampling.to_dict(),
        "jax": jax.__version__,
        "written": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "valid": "JAX promises to read it for 6 months from then; export again after that",
    }
