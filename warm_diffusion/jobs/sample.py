"""Sampling: images by seed, as PNG files and a grid."""

import json
import pathlib

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import devices, drawing, factory, pretrained, storage
from warm_diffusion.console import progress, say, say_weights
from warm_diffusion.data.images import grid, save_png, save_pngs


def parse_seeds(text: str) -> list[int]:
    """Seeds such as `0-63`, `7` or `0-9,20,30-39`, ends included."""
    seeds = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ValueError(f"--seeds must look like 0-63 or 3,5,8-11, got {text!r}")
        if int(last or first) >= drawing.NUM_SEEDS:
            raise ValueError(f"--seeds must be below 2^32, got {last or first}")
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds


def sample(config: ConfigDict, workdir: str, checkpoint: str, seeds: str) -> pathlib.Path:
    """Writes one PNG per seed and `grid.png` to a folder under `workdir`/generated; returns it.

    Raises:
      ValueError: no usable checkpoint, seeds or sampling options that do not work.
    """
    numbers = parse_seeds(seeds)
    mesh, options = devices.make_mesh(), config.sampling
    model = pretrained.load(checkpoint, options.ema)
    built = factory.trained_architecture(config, model.architecture)
    sampler = factory.sampler(config, built, mesh)
    say_weights(model.info, checkpoint)
    start = factory.dataset(config).images if sampler.schedule.needs_start else None
    path = "trained" if options.bnr < 0 else f"bnr{options.bnr:g}"
    path += "" if options.grid == "edm" else f"_{options.grid}"
    name = f"step{model.info.get('step', 0)}_{options.solver}{options.num_steps}_{path}"
    folder = storage.path(workdir) / "generated" / name
    about = {
        "checkpoint": str(checkpoint),
        "step": model.info.get("step"),
        "weights": model.info["weights"],
        "dtype": built.network.dtype.__name__,
        "seeds": seeds,
        "network_calls": sampler.num_calls,
        "schedule": config.schedule.to_dict(),
        "sampling": options.to_dict(),
    }
    _refuse_a_mixture(folder / "sampling.json", about)
    images = []
    params = devices.put_replicated(model.params, mesh)
    with progress(len(numbers), "sampling", " images") as bar:
        for batch in sampler.generate(params, numbers, start):
            images.append(batch)
            bar.update(len(batch))
    images = np.concatenate(images)
    storage.write_json(folder / "sampling.json", about)  # before any image
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
    if path.exists() and settings(storage.read_json(path)) != settings(told):
        raise ValueError(
            f"{path.parent} holds images drawn with other settings (see sampling.json there): "
            f"move it away, or give another --workdir and --checkpoint={told['checkpoint']}"
        )
