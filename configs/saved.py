"""A configuration that a run has written: `--config=WORKDIR/config.json` is read by this file."""

import ml_collections

from configs import default
from warm_diffusion.app import settings


def get_config(path: str) -> ml_collections.ConfigDict:
    """The realised configuration in a JSON file."""
    return settings.load(path, default.get_config())
