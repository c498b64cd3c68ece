"""Sampling: images by seed, as PNG files and a grid."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import factory, process, samplers
from warm_diffusion.data import Dataset
from warm_diffusion.data.images import from_uint8, grid, save_png, save_pngs, to_uint8
from warm_diffusion.jobs.console import progress, say
from warm_diffusion.jobs.trained import load_trained
from warm_diffusion.training import devices


def generate(
    sampler: factory.Sampler,
    params: dict,
    seeds: Sequence[int],
    data: Dataset | None = None,
) -> Iterator[np.ndarray]:
    """Draws uint8 images [<= batch_size, H, W, C] for the seeds, batch by batch.

    The last batch is filled up and cut, so that every image comes from the same compiled program.
    On a path that does not end in noise sampling starts from images of `data`, blurred.
    """
    seeds = np.asarray(seeds, np.uint32)
    for first in range(0, len(seeds), sampler.batch_size):
        batch = seeds[first : first + sampler.batch_size]
        padded = np.resize(batch, sampler.batch_size)
        start = blurred_start(sampler, padded, data)
        yield to_uint8(sampler.draw(params, padded, start))[: len(batch)]


def blurred_start(sampler: factory.Sampler, seeds: np.ndarray, data: Dataset | None):
    """Blurred images of `data` to start each seed from, or None on a path that ends in noise."""
    if not sampler.needs_start:
        return None
    if data is None:
        raise ValueError(
            "this path ends in blurred images, not in noise: sampling it needs the data"
        )
    path, t = sampler.schedule, sampler.schedule.t_max
    images = from_uint8(np.asarray(data.images[seeds % len(data.images)]))
    noise = samplers.initial_noise(seeds, images.shape[1:])
    return process.perturb(images, noise, path.alpha(t), path.beta(t))


def parse_seeds(text: str) -> list[int]:
    """Seeds such as `0-63`, `7` or `0-9,20,30-39`, ends included."""
    seeds = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"--seeds must look like 0-63 or 3,5,8-11, got {text!r}")
        if int(last or first) >= 2**32:
            raise ValueError(f"--seeds must be below 2^32, got {last or first}")
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds


def sample_images(config: ConfigDict, workdir: str, checkpoint: str, seeds: str) -> pathlib.Path:
    """Writes one PNG per seed and `grid.png` to a folder under `workdir`/generated; returns it.

    Raises:
      ValueError: no usable checkpoint, seeds or sampling options that do not work.
    """
    numbers = parse_seeds(seeds)
    mesh = devices.make_mesh()
    trained = load_trained(config, checkpoint, mesh)
    options = config.sampling
    sampler = factory.sampler(
        config, trained.network, trained.image_shape, options.batch_size, mesh
    )
    data = factory.dataset(config) if sampler.needs_start else None
    path = "trained" if options.bnr < 0 else f"bnr{options.bnr:g}"
    name = f"step{trained.step}_{options.solver}{options.num_steps}_{path}"
    folder = pathlib.Path(workdir).expanduser().absolute() / "generated" / name
    about = {
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "weights": trained.weights,
        "seeds": seeds,
        "network_calls": sampler.num_calls,
        "schedule": config.schedule.to_dict(),
        "sampling": options.to_dict(),
    }
    _refuse_a_mixture(folder / "sampling.json", about)
    images = []
    with progress(len(numbers), "sampling", " images") as bar:
        for batch in generate(sampler, trained.params, numbers, data):
            images.append(batch)
            bar.update(len(batch))
    images = np.concatenate(images)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sampling.json").write_text(json.dumps(about, indent=2) + "\n")  # before any image
    save_pngs(folder, images, numbers)
    save_png(folder / "grid.png", grid(images, min_side=32))
    say(f"samples  {len(images)} images, {sampler.num_calls} network calls each, in {folder}")
    return folder


def _refuse_a_mixture(path: pathlib.Path, about: dict) -> None:
    """Images of other seeds may join those of a folder, images of other settings may not."""

    def settings(about: dict) -> dict:
        sampling = {**about["sampling"], "batch_size": None}
        return {**about, "sampling": sampling, "seeds": None}

    told = json.loads(json.dumps(about))
    if path.exists() and settings(json.loads(path.read_text())) != settings(told):
        raise ValueError(
            f"{path.parent} holds images drawn with other settings (see sampling.json there): "
            f"move it away, or give another --workdir and --checkpoint={told['checkpoint']}"
        )
