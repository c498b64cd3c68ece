"""The blur-to-noise ratio that the data recommend, put into a run's configuration."""

import copy
import json
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import factory, spectra
from warm_diffusion.jobs.console import say

RATIOS = (0.1, 0.3, 0.5, 0.65, 1.0, 2.0, 10.0)  # the paper's


def least_kept(spectrum: np.ndarray) -> dict[str, float]:
    """By ratio, what blur has left of the worst ring of frequencies when noise takes over."""
    return {str(bnr): float(np.min(spectra.kept_at_takeover(spectrum, bnr)[1])) for bnr in RATIOS}


def say_curve(curve: dict[str, float]) -> None:
    """Prints `least_kept`."""
    kept = ", ".join(f"{bnr}: {value:.3f}" for bnr, value in curve.items())
    say(f"kept     of the worst band where noise takes over, by BNR: {kept}")


def realise_bnr(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """The configuration with a number as `schedule.bnr`, so that the run's config.json holds it.

    "auto" becomes what the run in `workdir` began with, or else the data's recommendation, which is
    printed and written to `workdir`/bnr.json with the curve that it comes from.

    Raises:
      ValueError: data that cannot be read or have no detail, or a broken config.json.
    """
    if config.schedule.bnr != "auto":
        return config
    config, saved = copy.deepcopy(config), workdir / "config.json"
    if saved.exists():
        config.schedule.bnr = json.loads(saved.read_text())["schedule"]["bnr"]
        say(f"bnr      auto: {config.schedule.bnr}, as this run began")
        return config
    spectrum = factory.spectrum(config)
    config.schedule.bnr, attenuation = factory.bnr(config), config.schedule.attenuation
    frequency, power = (np.asarray(a).tolist() for a in spectra.radial_mean(spectrum))
    curve = least_kept(spectrum)
    say(
        f"bnr      auto: {config.schedule.bnr}, at which no band loses more than "
        f"{100 * attenuation:g} % before noise hides it"
    )
    say_curve(curve)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        report = {
            "recommended_bnr": config.schedule.bnr,
            "attenuation": attenuation,
            "least_kept_by_bnr": curve,
            "frequency": frequency,
            "power": power,
        }
        (workdir / "bnr.json").write_text(json.dumps(report, indent=2) + "\n")
    return config
