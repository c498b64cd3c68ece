"""Analysis of a data set: its spectrum, the ratio it recommends, the forward process drawn."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import dct, factory, plots, process, spectra
from warm_diffusion.data.images import from_uint8, grid, save_png, to_uint8
from warm_diffusion.jobs.console import progress, say
from warm_diffusion.schedules import Schedule

_RATIOS = (0.1, 0.3, 0.5, 0.65, 1.0, 2.0, 10.0)  # the paper's
_LEVELS, _STRIPS, _CHUNK = 6, 6, 2048


def dataset_spectrum(images: np.ndarray) -> np.ndarray:
    """`spectra.power_spectrum` of any number of uint8 images [N, H, W, C], merged by chunks."""

    @jax.jit
    def chunk_moments(chunk):
        coefficients = dct.dct(from_uint8(chunk))
        return coefficients.mean(axis=(0, 3)), coefficients.var(axis=(0, 3))

    count, mean, scatter = 0, 0.0, 0.0
    with progress(len(images), "spectrum", " images") as bar:
        for first in range(0, len(images), _CHUNK):
            chunk = np.asarray(images[first : first + _CHUNK])
            new_mean, variance = (np.asarray(a, np.float64) for a in chunk_moments(chunk))
            added, difference = len(chunk) * chunk.shape[3], new_mean - mean
            # Chan et al.: the scatter of two groups is theirs plus that between their means.
            scatter = scatter + variance * added
            scatter = scatter + difference**2 * count * added / (count + added)
            mean = mean + difference * added / (count + added)
            count += added
            bar.update(len(chunk))
    return scatter / count


def path_times(schedule: Schedule) -> np.ndarray:
    """Times along the path, evenly over the middle 96 % of the training distribution."""
    times = schedule.sample_time(jax.random.key(0), (10_000,))
    return np.quantile(np.asarray(times), np.linspace(0.02, 0.98, _LEVELS))


def analyze(config: ConfigDict, workdir: str) -> dict:
    """Writes spectrum.png, forward.png and analysis.json to `workdir`/analysis; returns the last.

    Raises:
      ValueError: data or schedule that do not work, or images without any detail.
    """
    data = factory.dataset(config)
    schedule = factory.sampling_schedule(config)
    spectrum = dataset_spectrum(data.images)
    recommended = spectra.recommend_bnr(spectrum)
    frequency, power = (np.asarray(a) for a in spectra.radial_mean(spectrum))
    folder = pathlib.Path(workdir).expanduser().absolute() / "analysis"
    folder.mkdir(parents=True, exist_ok=True)

    levels = []
    for t in path_times(schedule):
        alpha, beta = float(schedule.alpha(t)), float(schedule.beta(t))
        m = np.asarray(dct.transfer(alpha, *spectrum.shape))[..., 0]
        levels.append((alpha, beta, np.asarray(spectra.radial_mean(m**2 * spectrum)[1])))
    title = f"{config.data.source}: recommended blur-to-noise ratio {recommended:.2f}"
    plots.spectrum(folder / "spectrum.png", frequency, power, levels, title)
    save_png(folder / "forward.png", _film_strips(data.images, schedule))

    report = {
        "source": config.data.source,
        "count": len(data.images),
        "content_sha256": data.info["content_sha256"],
        "pixel_std": float(np.sqrt(spectrum.mean())),
        "recommended_bnr": recommended,
        "attenuation": 0.05,
        "least_kept_by_bnr": {str(bnr): _least_kept(spectrum, bnr) for bnr in _RATIOS},
        "frequency": frequency.tolist(),
        "power": power.tolist(),
    }
    (folder / "analysis.json").write_text(json.dumps(report, indent=2) + "\n")
    say(f"spectrum {len(data.images):,} images, pixel standard deviation {report['pixel_std']:.3f}")
    kept = ", ".join(f"{bnr}: {value:.3f}" for bnr, value in report["least_kept_by_bnr"].items())
    say(f"kept     of the worst band where noise takes over, by BNR: {kept}")
    say(
        f"BNR      recommended {recommended:.3f}: no band loses more than 5 % before noise hides it"
    )
    say(f"analysis spectrum.png, forward.png and analysis.json in {folder}")
    return report


def _least_kept(spectrum: np.ndarray, bnr: float) -> float:
    """m_k of the worst ring when noise takes over: spectra.py, eq. (2)."""
    eigen = np.asarray(dct.eigenvalues(*spectrum.shape), np.float64)
    kept = np.exp(-eigen * bnr**2 * spectrum / 2)
    return float(np.min(np.asarray(spectra.radial_mean(kept)[1])))


def _film_strips(images: np.ndarray, schedule: Schedule) -> np.ndarray:
    """A row per image: clean, then further and further along the path, scaled to be visible."""
    chosen = np.linspace(0, len(images) - 1, _STRIPS).round().astype(int)
    clean = from_uint8(jnp.asarray(np.asarray(images[chosen])))
    noise = jax.random.normal(jax.random.key(0), clean.shape)
    columns = [clean]
    for t in path_times(schedule):
        alpha, beta = schedule.alpha(t), schedule.beta(t)
        columns.append(process.perturb(clean, noise, alpha, beta) / jnp.sqrt(1 + beta**2))
    rows = np.stack([to_uint8(column) for column in columns], axis=1)
    return grid(rows.reshape(-1, *images.shape[1:]), columns=len(columns), min_side=64)
