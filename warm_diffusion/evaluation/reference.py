"""Reference statistics: moments of a data set's features, with where they come from.

The file is an .npz without pickles:

    mean [D], covariance [D, D]   float64, of all images (no augmentation, none dropped)
    kept [K, D]                   float32, features of up to 10,000 of them: kernel distances,
                                  precision and recall need examples
    provenance                    JSON, see `facts`

Statistics of unknown origin are behind many a FID that nobody could reproduce; so the origin is in
the file, and `check` refuses statistics that are not of the same features, images and recipe.

Other projects' files, EDM's and pytorch-fid's, hold `mu` and `sigma` alone. They are read as well,
with a provenance that says so (`is_external`) and is None wherever it is unknown: `check` cannot
vouch for their images. They keep no examples: Frechet distances alone.

Deliberately absent: writing such files.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from warm_diffusion.evaluation.distances import Moments
from warm_diffusion.evaluation.features import Extractor
from warm_diffusion.runtime import storage

FORMAT = 1
KEPT = 10_000
_CHUNK = 1024
_FACTS = (
    "format", "count", "split", "source", "data_sha256", "recipe", "image_shape", "features",
    "weights_hash",
)  # fmt: skip
_OWN = ("mean", "covariance", "kept", "provenance")
_ASYMMETRY = 1e-6  # of the largest entry, as far as `distances.frechet` goes
_EXTERNAL_SIZE = 2048  # of Inception's features, which other projects' files do not name


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean [D], covariance [D, D] and some features [K, D] of a set; `provenance` as `facts`."""

    mean: np.ndarray
    covariance: np.ndarray
    kept: np.ndarray
    provenance: dict


def facts(
    extract: Extractor,
    *,
    count: int,
    image_shape: Sequence[int],
    split: str,
    source: str,
    data_sha256: str,
    recipe: str,
) -> dict:
    """What statistics are of.

    Args:
      extract: the features; their name and weights hash.
      count: number of images.
      image_shape: (H, W, C).
      split: which part of the data, as metric names call it: train, test...
      source: where the images were read.
      data_sha256: hash of their pixels, in order.
      recipe: how they were cropped and resized.
    """
    return {
        "format": FORMAT,
        "count": count,
        "split": split,
        "source": source,
        "data_sha256": data_sha256,
        "recipe": recipe,
        "image_shape": list(image_shape),
        "features": extract.name,
        "weights_hash": extract.weights_hash,
    }


def collect(
    extract: Extractor,
    images: np.ndarray,
    provenance: dict,
    report: Callable[[int], None] = lambda count: None,
) -> FeatureStatistics:
    """Statistics of all images [N, H, W, C], uint8, read in chunks.

    Args:
      extract: the features.
      images: at least 2; may be memory-mapped.
      provenance: of `facts`; its count must be N.
      report: is told how many more images are done.

    Raises:
      ValueError: images that the features are not for, or another number of them.
    """
    if len(images) != provenance["count"]:
        raise ValueError(f"expected {provenance['count']} images, got {len(images)}")
    chosen = np.zeros(len(images), bool)
    chosen[kept_rows(len(images))] = True
    moments, kept = None, []
    for first in range(0, len(images), _CHUNK):
        values = extract(np.asarray(images[first : first + _CHUNK])).values
        moments = add(moments, values)
        kept.append(values[chosen[first : first + _CHUNK]])
        report(len(values))
    return FeatureStatistics(moments.mean, moments.covariance, np.concatenate(kept), provenance)


def kept_rows(count: int) -> np.ndarray:
    """Which of `count` images' features are kept, ascending: all, or a fixed random part.

    Not the first ones: a folder's images come class by class.
    """
    if count <= KEPT:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:KEPT])


def add(moments: Moments | None, values: np.ndarray) -> Moments:
    """Moments (None: of nothing yet) with those of features [N, D] merged in."""
    new = Moments.of(values)
    return new if moments is None else moments.merge(new)


def save(path: str | os.PathLike, statistics: FeatureStatistics) -> None:
    """Writes an .npz file, whole or not at all."""
    storage.write_npz(
        path,
        mean=statistics.mean,
        covariance=statistics.covariance,
        kept=statistics.kept,
        provenance=np.array(json.dumps(statistics.provenance)),
    )


def load(path: str | os.PathLike) -> FeatureStatistics:
    """Reads what `save` wrote, or another project's `mu` [2048] and `sigma` [2048, 2048].

    The latter are taken to be Inception's features of training images (split "train"), as EDM's
    are; their provenance has the origin "external", the file's name and SHA-256, and None for all
    that is unknown: count, source, data_sha256, recipe, image_shape, weights_hash.

    A file on gs:// is copied into the user's cache first.

    Raises:
      ValueError: no such file, a damaged one, one without provenance, or another project's of
        other arrays, sizes or numbers than these.
    """
    path = storage.fetch(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if {"mu", "sigma"} <= set(file.files):
                return _external(path, {name: file[name] for name in ("mu", "sigma")}, file.files)
            arrays = {name: file[name] for name in _OWN}
        provenance = json.loads(str(arrays.pop("provenance")))
        missing = [name for name in _FACTS if name not in provenance]
        if missing or provenance["format"] != FORMAT:
            raise ValueError(f"its provenance is not of format {FORMAT} (missing: {missing})")
        size = arrays["mean"].shape[-1]
        shapes = [array.shape for array in arrays.values()]
        if shapes != [(size,), (size, size), (len(arrays["kept"]), size)]:
            raise ValueError(f"its arrays have shapes {shapes}")
    # numpy, zipfile and zlib report damage by very many types.
    except Exception as error:
        raise ValueError(
            f"{path}: no reference statistics that can be read ({error}); --mode=fid_stats writes "
            "them"
        ) from error
    return FeatureStatistics(**arrays, provenance=provenance)


def _external(
    path: pathlib.Path, arrays: dict[str, np.ndarray], names: list[str]
) -> FeatureStatistics:
    """Another project's statistics: `arrays` mu and sigma, of all the `names` in the file."""
    mean, covariance = arrays["mu"], arrays["sigma"]
    unknown = sorted(set(names) - {"mu", "sigma"})
    if unknown:
        raise ValueError(f"beside mu and sigma it holds {unknown}: expected these two alone")
    if mean.shape != (_EXTERNAL_SIZE,) or covariance.shape != (_EXTERNAL_SIZE,) * 2:
        raise ValueError(
            f"mu and sigma have shapes {mean.shape} and {covariance.shape}: without a provenance "
            f"they are taken for Inception's, of {_EXTERNAL_SIZE} features"
        )
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind != "f" or not np.all(np.isfinite(array)):
            raise ValueError(f"{name} ({array.dtype}) is not of finite real numbers")
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"sigma is not symmetric: it differs by {asymmetry:.3g} from its mirror")
    provenance = dict.fromkeys(_FACTS) | {
        "format": FORMAT,
        "origin": "external",
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "split": "train",
        "features": "inception",
    }
    return FeatureStatistics(
        mean.astype(np.float64),
        covariance.astype(np.float64),
        np.zeros((0, _EXTERNAL_SIZE), np.float32),
        provenance,
    )


def is_external(statistics: FeatureStatistics) -> bool:
    """Whether another project wrote them: of images that nobody can check, without examples."""
    return _is_external(statistics.provenance)


def _is_external(provenance: Mapping) -> bool:
    return provenance.get("origin") == "external"


def fingerprint(statistics: FeatureStatistics) -> str:
    """SHA-256 of mean, covariance and provenance: two results with equal ones share a reference."""
    digest = hashlib.sha256(json.dumps(statistics.provenance, sort_keys=True).encode())
    for array in (statistics.mean, statistics.covariance):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check(provenance: Mapping, expected: Mapping, name: str) -> None:
    """Refuses statistics whose provenance differs from what is `expected` of some facts.

    Facts that external statistics do not know (None) are passed over.

    Raises:
      ValueError: names every fact that differs.
    """
    differences = [
        f"{fact} is {provenance.get(fact)!r}, expected {value!r}"
        for fact, value in expected.items()
        if provenance.get(fact) != value
        and not (_is_external(provenance) and provenance.get(fact) is None)
    ]
    if differences:
        raise ValueError(
            f"{name} does not fit: {'; '.join(differences)}. --mode=fid_stats with the same "
            "configuration writes statistics that do"
        )
