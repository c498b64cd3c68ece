"""Features of the images of many seeds, drawn batch by batch and kept, so that a stop costs little.

The features so far lie in a folder, one file for every half minute of drawing, each renamed into
place when complete; the same call goes on after them. A kill loses what came after the last file,
SIGTERM and SIGINT lose nothing.
"""

import pathlib
import time

import numpy as np

from warm_diffusion.app import Interrupted
from warm_diffusion.drawing import Sampler
from warm_diffusion.evaluation.features import Extractor, Features, concatenate
from warm_diffusion.runtime import processes, storage
from warm_diffusion.runtime.console import say
from warm_diffusion.training.signals import stop_requests

_SAVE_SECONDS = 30.0


def draw_features(
    sampler: Sampler,
    params: dict,
    seeds: range,
    extract: Extractor,
    folder: pathlib.Path,
    *,
    images: np.ndarray | None,
    bar,
) -> Features:
    """Features of the images of all seeds, in order.

    Args:
      sampler: draws them.
      params: the network's weights.
      seeds: one image each.
      extract: the features.
      folder: keeps the features so far; belongs to these seeds, weights and settings alone.
      images: uint8, for paths that start from images.
      bar: progress bar, told of every image.

    Raises:
      Interrupted: SIGTERM or SIGINT; the features so far are saved.
      ValueError: images that the features are not for.
    """
    parts = load_parts(folder)
    done = sum(len(part.values) for part in parts)
    if done:
        say(f"continue {done:,} of {len(seeds):,} images from seed {seeds[0]} on are there")
    bar.update(done)
    processes.agree(**{f"images there in {folder}": done})
    pending, saved_at = [], time.monotonic()
    with stop_requests() as stop_request:
        for batch in sampler.generate(params, seeds[done:], images):
            pending.append(extract(batch))
            bar.update(len(batch))
            reason = stop_request()
            if reason or time.monotonic() - saved_at > _SAVE_SECONDS:
                part = concatenate(pending)
                save_part(folder, done, part)
                parts.append(part)
                done += len(part.values)
                pending, saved_at = [], time.monotonic()
            if reason:
                raise Interrupted(
                    f"{reason}: stopped after {done:,} of {len(seeds):,} images and saved in "
                    f"{folder}; the same command continues"
                )
    everything = concatenate([*parts, *pending])
    if len(everything.values) != len(seeds):
        raise ValueError(
            f"{folder} holds features of {len(everything.values)} images, expected {len(seeds)}: "
            "delete it"
        )
    return everything


def save_part(folder: pathlib.Path, first: int, part: Features) -> None:
    """Writes features whose first image is number `first`."""
    arrays = {name: array for name, array in part._asdict().items() if array is not None}
    storage.write_npz(folder / f"features_{first:08d}.npz", **arrays)


def load_parts(folder: pathlib.Path) -> list[Features]:
    """What `save_part` wrote, in order, up to the first gap or damaged file."""
    parts, done = [], 0
    for path in sorted(folder.glob("features_*.npz")):
        if path.name != f"features_{done:08d}.npz":
            break
        try:
            with storage.open_npz(path) as file:
                part = Features(file["values"], file.get("logits"))
        except Exception as error:  # numpy and zipfile report damage by very many types
            say(f"note     {path} is damaged ({error}): drawn again from there")
            break
        parts.append(part)
        done += len(part.values)
    return parts
