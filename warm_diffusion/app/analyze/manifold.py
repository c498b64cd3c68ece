"""Leaving the data manifold, measured step by step on a sampling run of a checkpoint.

At each step's level: how far the sampler's states x are from forward states x+ = B x0 + beta eps of
images, by `spectra.spectral_departure` and by

    (1)  sliced Wasserstein    (mean over directions u on the sphere of W_2(u . x, u . x+)^2)^1/2
                               (Rabin et al. 2011; Bonneel et al. 2015, sec. 3)

(next to both, the same for other forward states, which is what sampling error alone amounts to);
what each head contributes to the step (samplers.py, eq. 1), by frequency:

    (2)  denoiser   (beta' / beta - 1)(x - D) + (m' - m) D        deblurrer   (m' - m) R

how consistent the heads are, and what they see.

The images compared with are held out if `config.analysis.held_out` names a source of such images;
else they are training images, and the report says so.
"""

import copy
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from warm_diffusion import dct, pretrained, process, spectra
from warm_diffusion.app import build, plots
from warm_diffusion.app.drawing import Sampler
from warm_diffusion.data import Dataset
from warm_diffusion.data.images import from_uint8, grid, to_uint8
from warm_diffusion.data.sources import short_name
from warm_diffusion.denoiser import Denoiser, Prediction
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import progress, say
from warm_diffusion.schedules import Schedule

_STRIPS = 4  # seeds in the film strips
Level = tuple[float, float]  # (alpha, beta)


def levels_of(schedule: Schedule, times: jax.Array) -> list[Level]:
    """(alpha, beta) at each time of the sampler's grid."""
    return [(float(schedule.alpha(t)), float(schedule.beta(t))) for t in times]


def sliced_wasserstein(
    x: jax.Array, y: jax.Array, key: jax.Array, num_directions: int = 256
) -> jax.Array:
    """Distance (1) between two sets of N images [N, H, W, C], in units of a pixel.

    Two sets of one distribution are about (variance of a pixel / N)^1/2 apart, not 0.
    """
    x, y = (a.reshape(a.shape[0], -1) for a in (x, y))
    directions = jax.random.normal(key, (x.shape[1], num_directions), jnp.float32)
    directions = directions / jnp.linalg.norm(directions, axis=0, keepdims=True)
    one, two = (jnp.sort(jnp.matmul(a, directions, precision="highest"), axis=0) for a in (x, y))
    return jnp.sqrt(jnp.mean((one - two) ** 2))


def departures(
    states: np.ndarray,
    levels: Sequence[Level],
    spectrum: np.ndarray,
    reference: np.ndarray,
    key: jax.Array,
) -> Iterator[dict]:
    """Both departures of a sampler's states [num_steps + 1, N, H, W, C] at each level.

    Half of the clean images `reference` [2 N, H, W, C] are compared with, the other half shows how
    far forward states are from each other. The key is for noise and directions.
    """
    count = states.shape[1]
    if len(reference) != 2 * count:
        raise ValueError(f"expected {2 * count} reference images, got {len(reference)}")

    @jax.jit
    def compare(x, alpha, beta, key):
        noise_key, directions = jax.random.split(key)
        noise = jax.random.normal(noise_key, reference.shape)
        forward = process.perturb(jnp.asarray(reference), noise, alpha, beta)
        one, other = forward[:count], forward[count:]
        found = {}
        for of, compared in (("", x), ("_of_forward", other)):
            _, departure = spectra.spectral_departure(compared, spectrum, alpha, beta)
            found[f"spectral_departure{of}"] = departure
            found[f"sliced_wasserstein{of}"] = sliced_wasserstein(compared, one, directions)
        return found

    for i, (x, level) in enumerate(zip(states, levels, strict=True)):
        found = compare(jnp.asarray(x), *level, jax.random.fold_in(key, i))
        yield {name: np.asarray(value).tolist() for name, value in found.items()}


def heads(denoise: Denoiser, x: jax.Array, start: Level, end: Level) -> tuple[dict, Prediction]:
    """The heads' mean squares (2) by ring, how consistent they are (losses.py, eq. 4); jittable."""
    prediction = denoise(x, *start)
    one, two = (
        dct.transfer(jnp.asarray(level[0], x.dtype), *x.shape[1:-1]) for level in (start, end)
    )
    change = (two - one)[None]
    noise = (end[1] / start[1] - 1) * dct.dct(x - prediction.blurry)
    parts = {
        "denoiser": noise + change * dct.dct(prediction.blurry),
        "deblurrer": change * dct.dct(prediction.residual),
    }
    found = {
        name: spectra.radial_mean(jnp.mean(part**2, axis=(0, -1)))[1]
        for name, part in parts.items()
    }
    difference = prediction.blurry - dct.blur(prediction.clean, start[0])
    return found | {"consistency": jnp.mean(difference**2)}, prediction


def _reference(config: ConfigDict, data: Dataset, count: int) -> tuple[np.ndarray, dict]:
    """Up to `count` images in [-1, 1] and what they are."""
    held_out = config.analysis.held_out
    if held_out:
        config = copy.deepcopy(config)
        config.data.source = held_out
        images = build.dataset(config).images
        if images.shape[1:] != data.images.shape[1:]:
            raise ValueError(
                f"{held_out} has images {images.shape[1:]}, the training data "
                f"{data.images.shape[1:]}: set data.resolution and data.channels"
            )
    else:
        images = data.images
        say("note     compared with training images: analysis.held_out names no others")
    count = min(count, len(images) // 2 * 2)
    chosen = np.random.default_rng(0).choice(len(images), count, replace=False)
    about = {"source": config.data.source, "held_out": bool(held_out), "count": count}
    return np.asarray(from_uint8(jnp.asarray(images[np.sort(chosen)])))[np.argsort(chosen)], about


def _run(config: ConfigDict, built: Architecture, params, sampler: Sampler, data: Dataset, levels):
    """States [num_steps + 1, N, H, W, C], each step's heads, and strips of a few seeds."""

    @devices.jit
    def look(params, seeds, x, start, end):
        denoise = built.seed_denoiser(
            params, seeds, label=config.sampling.label, guidance=config.sampling.guidance
        )
        found, prediction = heads(denoise, x, start, end)
        return found, prediction.blurry[:_STRIPS], prediction.clean[:_STRIPS]

    batches = max(1, -(-config.analysis.num_images // sampler.batch_size))
    all_states, found, strips = [], [], None
    with progress(batches, "sampling", " batches") as bar:
        for b in range(batches):
            seeds = np.arange(b * sampler.batch_size, (b + 1) * sampler.batch_size, dtype=np.uint32)
            _, states = sampler.draw(params, seeds, sampler.start(seeds, data.images))
            seen = [
                jax.device_get(look(params, seeds, states[i], levels[i], levels[i + 1]))
                for i in range(len(levels) - 1)
            ]
            found.append([step[0] for step in seen])
            all_states.append(np.asarray(states))
            if strips is None:
                strips = [(x[:_STRIPS], *step[1:]) for x, step in zip(states, seen, strict=False)]
            bar.update()
    mean = [
        {name: np.mean([part[name] for part in parts], axis=0).tolist() for name in parts[0]}
        for parts in zip(*found, strict=True)
    ]
    return np.concatenate(all_states, axis=1), mean, strips


def analyze_sampling(
    config: ConfigDict, folder: pathlib.Path, model: pretrained.Model, checkpoint: str
) -> dict:
    """Writes sampling.json, departure.png, heads.png and film.png to `folder`; returns the first.

    Raises:
      ValueError: settings and held-out images that do not fit the model.
    """
    mesh, options = devices.make_mesh(), config.sampling
    data = build.dataset(config)
    count = config.analysis.num_images
    sampler = build.sampler(config, model, mesh, num_images=count, return_trajectory=True)
    times = model.times(sampler.schedule, build.sampling_settings(config))
    levels = levels_of(sampler.schedule, times)
    spectrum = build.data_statistics(config).spectrum
    params = devices.put_replicated(model.params, mesh)
    states, contributions, strips = _run(config, model, params, sampler, data, levels)
    reference, about = _reference(config, data, 2 * states.shape[1])
    states = states[:, : len(reference) // 2]
    frequency = np.asarray(spectra.radial_mean(spectrum)[0])
    found = departures(states, levels, spectrum, reference, jax.random.key(0))
    steps = [  # the last, the clean image, has no heads
        {"alpha": alpha, "beta": beta, **departure, **of_heads}
        for (alpha, beta), departure, of_heads in zip(
            levels, found, [*contributions, {}], strict=True
        )
    ]
    title = _title(config, model, sampler)
    report = {
        "title": title,
        "checkpoint": checkpoint,
        "step": model.info.get("step"),
        "weights": model.info["weights"],
        "seeds": f"0-{states.shape[1] - 1}",
        "network_calls": sampler.num_calls,
        "sampling": options.to_dict(),
        "schedule": build.chosen_path(config),
        "reference": about,
        "frequency": frequency.tolist(),
        "steps": steps,
    }
    # A ring in which the data have no variance has no departure at the clean image: not a number.
    storage.write_json(folder / "sampling.json", _without_nan(report))
    plots.save(folder / "departure.png", plots.departure(frequency, steps, title))
    plots.save(folder / "heads.png", plots.heads(frequency, steps[:-1], title))
    plots.save(folder / "film.png", _film(strips, levels, title))
    _say(steps, about, folder)
    return report


def _without_nan(tree):
    if isinstance(tree, dict):
        return {name: _without_nan(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def path_name(config: ConfigDict, schedule: Schedule) -> str:
    """The path of a schedule, in a title."""
    ratios = [float(schedule.bnr(t)) for t in (schedule.t_min, schedule.t_max)]
    if np.isclose(*ratios, rtol=1e-3):
        return f"blur-to-noise ratio {ratios[0]:.3g}"
    return f"the path {config.schedule.name}"


def _title(config: ConfigDict, model: pretrained.Model, sampler: Sampler) -> str:
    """Returns the title of the figures: data, step, path, solver."""
    step = f", step {model.info['step']:,}" if "step" in model.info else ""
    path, solver = path_name(config, sampler.schedule), config.sampling.solver
    data = short_name(config.data.source)
    return f"{data}{step}: {path}, {solver}, {sampler.num_calls} network calls"


def _film(strips: list, levels: Sequence[Level], title: str) -> Figure:
    """Three rows per seed: state, and blurry and clean image that the heads see in it."""
    rows, labels = [], []
    for seed in range(len(strips[0][0])):
        scaled = [
            to_uint8(np.asarray(x[seed]) / np.sqrt(1 + beta**2))
            for (x, _, _), (_, beta) in zip(strips, levels, strict=False)
        ]
        rows += [scaled, *([to_uint8(step[i][seed]) for step in strips] for i in (1, 2))]
        labels += [f"seed {seed}: state", "D, blurry", "D + R, clean"]
    images = np.stack(rows).reshape(-1, *strips[0][0].shape[1:])
    columns = [
        f"α {plots.number(alpha)}\nβ {plots.number(beta)}" for alpha, beta in levels[: len(strips)]
    ]
    return plots.labelled(grid(images, len(strips), min_side=56), labels, columns, title)


def _say(steps: list[dict], about: dict, folder: pathlib.Path) -> None:
    kind = "held-out" if about["held_out"] else "training"
    for name, of in (("sampler", ""), ("forward", "_of_forward")):
        values = np.array([step[f"spectral_departure{of}"] for step in steps])
        values = np.where(np.isfinite(values), values, 0.0)
        worst = np.unravel_index(np.abs(values).argmax(), values.shape)
        distance = np.array([step[f"sliced_wasserstein{of}"] for step in steps])
        say(
            f"{name}  spectral departure {np.sqrt(np.mean(values**2)):.3f} rms, "
            f"{values[worst]:+.3f} at worst (step {worst[0]}, band {worst[1]}); "
            f"sliced Wasserstein {distance[-1]:.4f}"
        )
    say(f"sampling {about['count'] // 2} images against forward states of {kind} images")
    say(f"sampling sampling.json, departure.png, heads.png and film.png in {folder}")
