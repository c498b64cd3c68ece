"""The blur-to-noise ratio that the data recommend, put into a run's configuration."""

import copy
import pathlib

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import factory, spectra, storage
from warm_diffusion.console import say, say_kept


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
        config.schedule.bnr = storage.read_json(saved)["schedule"]["bnr"]
        say(f"bnr      auto: {config.schedule.bnr}, as this run began")
        return config
    spectrum = factory.data_statistics(config).spectrum
    config.schedule.bnr, attenuation = factory.bnr(config), config.schedule.attenuation
    frequency, power = (np.asarray(a).tolist() for a in spectra.radial_mean(spectrum))
    curve = {str(ratio): spectra.least_kept(spectrum, ratio) for ratio in spectra.PAPER_RATIOS}
    say(
        f"bnr      auto: {config.schedule.bnr}, at which no band loses more than "
        f"{100 * attenuation:g} % before noise hides it"
    )
    say_kept(curve)
    report = {
        "recommended_bnr": config.schedule.bnr,
        "attenuation": attenuation,
        "least_kept_by_bnr": curve,
        "frequency": frequency,
        "power": power,
    }
    storage.write_json(workdir / "bnr.json", report)
    return config
