"""Sampling: images by seed, as PNG files and a grid."""

import itertools
import json
import math
import pathlib

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from warm_diffusion import pretrained
from warm_diffusion.app import build, plots
from warm_diffusion.data.images import grid, save_pngs
from warm_diffusion.data.sources import short_name
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import progress, say

_GRID_IMAGES = 1024  # of the first seeds


def parse_seeds(text: str) -> list[range]:
    """Seeds such as `0-63`, `7` or `0-9,20,30-39`, ends included, each once."""
    seeds = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first, first]
        if not all(n.isascii() and n.isdigit() and len(n) <= 10 for n in numbers):
            raise ValueError(f"--seeds must look like 0-63 or 3,5,8-11, got {text!r}")
        low, high = map(int, numbers)
        if not low <= high < pretrained.NUM_SEEDS:
            raise ValueError(
                f"--seeds must be increasing whole numbers below 2^32, got {part.strip()!r}"
            )
        seeds.append(range(low, high + 1))
    ordered = sorted(seeds, key=lambda numbers: numbers.start)
    for one, other in itertools.pairwise(ordered):
        if other.start < one.stop:
            raise ValueError(f"--seeds names seed {other.start} twice")
    return seeds


def sample(config: ConfigDict, workdir: str, checkpoint: str, seeds: str) -> pathlib.Path:
    """Writes one PNG per seed, as they come, to a folder under `workdir`/generated, and a grid of
    the first 1,024 beside that folder; returns the folder.

    Raises:
      ValueError: no usable checkpoint, seeds or sampling options that do not work.
    """
    numbers = parse_seeds(seeds)
    mesh, options = devices.make_mesh(), config.sampling
    model = build.trained(config, checkpoint)
    sampler = build.sampler(config, model, mesh, num_images=sum(map(len, numbers)))
    start = build.dataset(config).images if sampler.schedule.needs_start else None
    path = "trained" if options.bnr < 0 else f"bnr{options.bnr:g}"
    path += "" if options.time_grid == "edm" else f"_{options.time_grid}"
    name = f"step{model.info.get('step', 0)}_{options.solver}{options.num_steps}_{path}"
    folder = storage.path(workdir) / "generated" / name
    about = {
        "checkpoint": str(checkpoint),
        "step": model.info.get("step"),
        "weights": model.info["weights"],
        "dtype": model.network.dtype.__name__,
        "seeds": seeds,
        "network_calls": sampler.num_calls,
        "schedule": build.chosen_path(config),
        "sampling": options.to_dict(),
    }
    _refuse_a_mixture(folder / "sampling.json", about)
    params, shown, done = devices.put_replicated(model.params, mesh), [], 0
    names = itertools.chain.from_iterable(numbers)
    drawn = sampler.generate(params, itertools.chain.from_iterable(numbers), start)
    with progress(sum(map(len, numbers)), "sampling", " images") as bar:
        for batch in drawn:
            if not done:  # before any image, and not before one could be drawn
                storage.write_json(folder / "sampling.json", about)
            save_pngs(folder, batch, list(itertools.islice(names, len(batch))))
            if done < _GRID_IMAGES:
                shown.append(batch[: _GRID_IMAGES - done])
            done += len(batch)
            bar.update(len(batch))
    title = f"{short_name(config.data.source)}, {options.solver}, {sampler.num_calls} network calls"
    drawn = itertools.islice(itertools.chain.from_iterable(numbers), _GRID_IMAGES)
    # Beside the folder, which is then a set of images that any tool reads.
    plots.save(
        folder.with_name(f"{name}.png"), _labelled_grid(np.concatenate(shown), list(drawn), title)
    )
    say(f"samples  {done:,} images, {sampler.num_calls} network calls each, in {folder}")
    return folder


def _labelled_grid(images: np.ndarray, seeds: list[int], title: str) -> Figure:
    """Images row by row, each row with its first seed."""
    columns = math.ceil(len(images) ** 0.5)
    rows = [f"seed {seed}" for seed in seeds[::columns]]
    return plots.labelled(grid(images, columns, min_side=32), rows, [], title)


def _refuse_a_mixture(path: pathlib.Path, about: dict) -> None:
    """Images of other seeds may join those of a folder, images of other settings may not."""

    def settings(about: dict) -> dict:
        sampling = {**about["sampling"], "batch_size": None}
        return {**about, "sampling": sampling, "seeds": None}

    written = json.loads(json.dumps(about))
    if path.exists() and settings(storage.read_json(path)) != settings(written):
        raise ValueError(
            f"{path.parent} holds images drawn with other settings (see sampling.json there): "
            f"move it away, or give another --workdir and --checkpoint={written['checkpoint']}"
        )
