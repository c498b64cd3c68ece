"""Analysis of a data set: its spectrum, the ratio it recommends, the forward process drawn.

With a checkpoint, of its sampling as well: `manifold.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from warm_diffusion import dct, process, spectra
from warm_diffusion.app import build, plots
from warm_diffusion.app.analyze import manifold
from warm_diffusion.data.images import from_uint8, grid, to_uint8
from warm_diffusion.data.sources import short_name
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say
from warm_diffusion.schedules import Schedule

_LEVELS, _STRIPS = 6, 6


def path_times(schedule: Schedule) -> np.ndarray:
    """Times along the path, evenly over the middle 96 % of the training distribution."""
    t = np.geomspace(schedule.t_min, schedule.t_max, 1000)
    drawn = schedule.sample_levels(jax.random.key(0), (10_000,))
    along = [np.asarray(level) for level in (schedule.alpha(t), schedule.beta(t))]
    rises = int(along[1][-1] > along[1][0])  # the noise; on a path of constant noise the blur
    wanted = np.quantile(np.asarray(drawn[rises]), np.linspace(0.02, 0.98, _LEVELS))
    return np.interp(wanted, along[rises], t)


def analyze(config: ConfigDict, workdir: str, checkpoint: str | None = None) -> dict:
    """Writes spectrum.png, forward.png and analysis.json to `workdir`/analysis; returns the last.

    With a checkpoint also what `manifold.analyze_sampling` measures and draws.

    Raises:
      ValueError: data or schedule that do not work, images without any detail, or a checkpoint that
        cannot be used.
    """
    model = build.trained(config, checkpoint) if checkpoint else None
    data = build.dataset(config)
    statistics = build.data_statistics(config)
    schedule, spectrum = build.sampling_schedule(config, statistics), statistics.spectrum
    attenuation = config.schedule.spectral.attenuation
    recommended = spectra.recommend_bnr(spectrum, attenuation)
    frequency, power = (np.asarray(a) for a in spectra.radial_mean(spectrum))
    folder, name = storage.path(workdir) / "analysis", short_name(config.data.source)

    levels = []
    for t in path_times(schedule):
        alpha, beta = float(schedule.alpha(t)), float(schedule.beta(t))
        m = np.asarray(dct.transfer(alpha, *spectrum.shape))[..., 0]
        levels.append((alpha, beta, np.asarray(spectra.radial_mean(m**2 * spectrum)[1])))
    title = f"{name}: recommended blur-to-noise ratio {recommended:.2f}"
    plots.save(folder / "spectrum.png", plots.spectrum(frequency, power, levels, title))
    title = f"{name} along {manifold.path_name(config, schedule)}"
    plots.save(folder / "forward.png", film_strips(data.images, schedule, title))

    report = {
        "source": config.data.source,
        "count": len(data.images),
        "content_sha256": data.info["content_sha256"],
        "pixel_std": float(np.sqrt(spectrum.mean())),
        "recommended_bnr": recommended,
        "attenuation": attenuation,
        "least_kept_by_bnr": {
            str(ratio): spectra.least_kept(spectrum, ratio) for ratio in spectra.PAPER_RATIOS
        },
        "frequency": frequency.tolist(),
        "power": power.tolist(),
        "levels": [
            {"alpha": alpha, "beta": beta, "power": blurred.tolist()}
            for alpha, beta, blurred in levels
        ],
    }
    storage.write_json(folder / "analysis.json", report)
    say(f"spectrum {len(data.images):,} images, pixel standard deviation {report['pixel_std']:.3f}")
    kept = ", ".join(f"{bnr}: {value:.3f}" for bnr, value in report["least_kept_by_bnr"].items())
    say(f"detail   left by blur in the worst band when noise reaches it, by BNR: {kept}")
    say(
        f"BNR      recommended {recommended:.3f}: no band loses more than {100 * attenuation:g} % "
        "before noise hides it"
    )
    say(f"analysis spectrum.png, forward.png and analysis.json in {folder}")
    if model:
        manifold.analyze_sampling(config, folder, model, str(checkpoint))
    return report


def film_strips(images: np.ndarray, schedule: Schedule, title: str) -> Figure:
    """A row per image: clean, then further and further along the path, scaled to be visible."""
    chosen = np.linspace(0, len(images) - 1, _STRIPS).round().astype(int)
    clean = from_uint8(jnp.asarray(np.asarray(images[chosen])))
    noise = jax.random.normal(jax.random.key(0), clean.shape)
    columns, labels = [clean], ["clean"]
    for t in path_times(schedule):
        alpha, beta = schedule.alpha(t), schedule.beta(t)
        columns.append(process.perturb(clean, noise, alpha, beta) / jnp.sqrt(1 + beta**2))
        labels.append(f"α {plots.number(float(alpha))}\nβ {plots.number(float(beta))}")
    rows = np.stack([to_uint8(column) for column in columns], axis=1)
    canvas = grid(rows.reshape(-1, *images.shape[1:]), columns=len(columns), min_side=64)
    return plots.labelled(canvas, [f"image {i}" for i in chosen], labels, title)
