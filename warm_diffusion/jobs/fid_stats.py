"""Reference statistics of the prepared data, as evaluation compares with them: every image as it is
stored, uint8, none augmented, none dropped, and where it all came from."""

import pathlib

from ml_collections import ConfigDict

from warm_diffusion import factory
from warm_diffusion.data import Dataset
from warm_diffusion.evaluation import features, reference
from warm_diffusion.jobs.console import progress, say
from warm_diffusion.training import devices


def write_statistics(config: ConfigDict, workdir: str) -> pathlib.Path:
    """Writes `workdir`/FEATURES_SPLIT_N.npz for `--config.eval.reference=`; returns its path.

    Raises:
      ValueError: data or features that cannot be had, or images that these features are not for.
    """
    extract = make_extractor(config)
    data = factory.dataset(config)
    found = describe(config, data, extract)
    name = f"{extract.name.replace(':', '.')}_{found['split']}_{found['count']}.npz"
    path = pathlib.Path(workdir).expanduser().absolute() / name
    statistics = collect(data, extract, found)
    reference.save(path, statistics)
    for fact, value in statistics.provenance.items():
        say(f"{fact:<13}{value}")
    say(f"statistics   {path}, SHA-256 {reference.fingerprint(statistics)}")
    return path


def make_extractor(config: ConfigDict) -> features.Extractor:
    """The features of `config.eval`, on all devices."""
    options = config.eval
    return features.extractor(
        options.features, weights=options.inception_weights, mesh=devices.make_mesh()
    )


def describe(config: ConfigDict, data: Dataset, extract: features.Extractor) -> dict:
    """Provenance of statistics of a data set."""
    return reference.describe(
        extract,
        count=len(data.images),
        image_shape=data.images.shape[1:],
        split=split_name(config),
        source=config.data.source,
        data_sha256=data.info["content_sha256"],
        recipe=data.info["resize"],
    )


def split_name(config: ConfigDict) -> str:
    """Which part of the data `config.data` is: `eval.split`, or what the source says, or train."""
    if config.eval.split:
        return config.eval.split
    kind, _, argument = config.data.source.partition(":")
    return (argument.partition(":")[2] if kind == "tfds" else "") or "train"


def collect(data: Dataset, extract: features.Extractor, found: dict) -> reference.Statistics:
    """Statistics of a data set, with a progress bar."""
    with progress(len(data.images), "reference", " images") as bar:
        return reference.collect(extract, data.images, found, report=bar.update)
