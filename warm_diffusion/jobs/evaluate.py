"""Evaluation: distance between samples and data, its protocol in its name.

`fd_pixels_N` is the Frechet distance between Gaussians fitted to the pixels, in [-1, 1], of N
samples and of all images of the data set. It is a sound number for small images; it is not FID.
"""

import json
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import factory
from warm_diffusion.data.images import from_uint8
from warm_diffusion.evaluation import distances
from warm_diffusion.jobs.console import progress, say
from warm_diffusion.jobs.sample import generate
from warm_diffusion.jobs.trained import load_trained
from warm_diffusion.training import devices

_MAX_PIXELS = 4096  # a covariance of this size takes seconds; more needs features
_FEW_SAMPLES = 2048


def evaluate(config: ConfigDict, workdir: str, checkpoint: str) -> dict:
    """Evaluates a checkpoint; writes `workdir`/eval/step_N.json and returns what is in it.

    Raises:
      ValueError: no usable checkpoint, images too large for distances between pixels.
    """
    mesh = devices.make_mesh()
    data = factory.dataset(config)
    if np.prod(data.images.shape[1:]) > _MAX_PIXELS:
        raise ValueError(
            f"pixel distances are for images of up to {_MAX_PIXELS} values, got "
            f"{data.images.shape[1:]}; evaluate a smaller data.resolution"
        )
    trained = load_trained(config, checkpoint, mesh)
    options = config.sampling
    sampler = factory.sampler(
        config, trained.network, trained.image_shape, options.batch_size, mesh
    )
    count = config.eval.num_samples or len(data.images)
    if count < 2:
        raise ValueError(f"eval.num_samples must be at least 2, got {count}")
    if count < _FEW_SAMPLES:
        say(f"note     {count} samples: compare only with distances of as many samples")
    began = time.monotonic()
    generated = None
    with progress(count, "sampling", " images") as bar:
        for batch in generate(sampler, trained.params, range(count), data):
            generated = _merge(generated, batch)
            bar.update(len(batch))
    seconds = time.monotonic() - began
    reference = None
    for first in range(0, len(data.images), 1024):
        reference = _merge(reference, np.asarray(data.images[first : first + 1024]))
    name = f"fd_pixels_{count}"
    distance = distances.frechet(
        generated.mean, generated.covariance, reference.mean, reference.covariance
    )
    report = {
        name: distance,
        "step": trained.step,
        "weights": trained.weights,
        "seeds": f"0-{count - 1}",
        "network_calls": sampler.num_calls,
        "sampling": options.to_dict(),
        "schedule": config.schedule.to_dict(),
        "reference": {
            "source": config.data.source,
            "count": len(data.images),
            "content_sha256": data.info["content_sha256"],
        },
        "sampling_seconds": round(seconds, 2),
    }
    folder = pathlib.Path(workdir).expanduser().absolute() / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{trained.step:08d}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    say(
        f"eval     {name} = {distance:.4f} ({options.solver}, {sampler.num_calls} network calls, "
        f"{trained.weights}, {seconds:.1f} s sampling), in {path}"
    )
    return report


def _merge(moments: distances.Moments | None, images: np.ndarray) -> distances.Moments:
    pixels = np.asarray(from_uint8(images), np.float64).reshape(len(images), -1)
    new = distances.Moments.of(pixels)
    return new if moments is None else moments.merge(new)
