"""Reference statistics of the prepared data, as evaluation compares with them: every image as it is
stored, uint8, none augmented, none dropped, and where it all came from."""

import pathlib

from ml_collections import ConfigDict

from warm_diffusion.app import build
from warm_diffusion.evaluation import reference
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say


def write_statistics(config: ConfigDict, workdir: str) -> pathlib.Path:
    """Writes `workdir`/FEATURES_SPLIT_N.npz for `--config.eval.reference=`; returns its path.

    Raises:
      ValueError: data or features that cannot be had, or images that these features are not for.
    """
    data = build.dataset(config)
    extract = build.extractor(config, data.images.shape[1:])
    found = build.provenance(config, data, extract)
    name = f"{extract.name.replace(':', '.')}_{found['split']}_{found['count']}.npz"
    path = storage.path(workdir) / name
    statistics = reference.collect(extract, reference.in_batches(data.images), found)
    reference.save(path, statistics)
    for fact, value in statistics.provenance.items():
        say(f"{fact:<13}{value}")
    say(f"statistics   {path}, SHA-256 {reference.fingerprint(statistics)}")
    return path
