"""The blur-to-noise ratio that the data recommend, put into a run's configuration."""

import copy

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import spectra
from warm_diffusion.app import build
from warm_diffusion.runtime.console import say, say_kept


def realise_bnr(config: ConfigDict, began: dict | None) -> tuple[ConfigDict, dict | None]:
    """The configuration with a number as `schedule.bnr`, so that the run's config.json holds it.

    "auto" becomes what the run began with, or else the data's recommendation, which is printed.

    Returns:
      The configuration, and of a recommendation the curve that it comes from, for bnr.json.

    Raises:
      ValueError: data that cannot be read or have no detail.
    """
    if config.schedule.bnr != "auto":
        return config, None
    config = copy.deepcopy(config)
    if began is not None:
        config.schedule.bnr = began["schedule"]["bnr"]
        say(f"bnr      auto: {config.schedule.bnr}, as this run began")
        return config, None
    spectrum = build.data_statistics(config).spectrum
    config.schedule.bnr, attenuation = build.bnr(config), config.schedule.attenuation
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
    return config, report
