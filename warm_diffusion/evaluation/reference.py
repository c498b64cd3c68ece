"""Statistics of a set of images: moments of their features, with where they come from.

The file is an .npz without pickles:

    mean [D], covariance [D, D]   float64, of all images (no augmentation, none dropped)
    kept [K, D]                   float32, features of up to 10,000 of them: kernel distances,
                                  precision and recall need examples
    provenance                    JSON, see `facts`

Statistics of unknown origin are behind many a FID that nobody could reproduce; so the origin is in
the file, and `check` refuses statistics that are not of the same features, images and recipe.

Other projects' files hold `mu` and `sigma`: EDM's alone, ADM's (VIRTUAL_*.npz) beside arrays that
are not needed here. They are read as well, with a provenance that says so and is None wherever it
is unknown: `check` cannot vouch for their images. They keep no examples: Frechet distances alone.
Inception must have been TensorFlow's, with its resizing, as EDM's, ADM's and torch-fidelity's is.
pytorch-fid and clean-fid resize otherwise, and their files look the same: `warning` says so of
every file but those that are known by their hash.

Deliberately absent: writing such files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from warm_diffusion.evaluation.distances import Moments
from warm_diffusion.evaluation.features import Extractor
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import progress

FORMAT = 1
KEPT = 10_000
_BATCH = 1024
_FACTS = (
    "format", "count", "split", "source", "data_sha256", "recipe", "image_shape", "features",
    "weights_hash",
)  # fmt: skip
_SIZE = 2048  # of Inception's features, which other projects' files do not name
_ASYMMETRY = 1e-6  # of the largest entry, as far as `distances.frechet` goes
# EDM's reference statistics by SHA-256.
_EDM = {"4ada108cdfd8e43409ed427f5f76631beac9b9617cdcaf416d41b1e161d85969": "cifar10-32x32.npz"}


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean [D], covariance [D, D] and some features [K, D] of a set; `provenance` as `facts`."""

    mean: np.ndarray
    covariance: np.ndarray
    kept: np.ndarray
    provenance: dict


def facts(extract: Extractor, images: np.ndarray, info: Mapping, split: str) -> dict:
    """Returns the origin of statistics of images [N, H, W, C], a `split` of the data of which
    `info` is the cache's dataset.json."""
    return {
        "format": FORMAT,
        "count": len(images),
        "split": split,
        "source": info["source"],
        "data_sha256": info["content_sha256"],  # of the pixels
        "recipe": info["resize"],
        "image_shape": list(images.shape[1:]),
        "features": extract.name,
        "weights_hash": extract.weights_hash,
    }


def in_batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images [N, H, W, C], which may be memory-mapped, in parts that fit in memory."""
    return (np.asarray(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH))


def collect(
    extract: Extractor, batches: Iterable[np.ndarray], provenance: dict, name: str = "reference"
) -> FeatureStatistics:
    """Statistics of all images of some batches, uint8 [B, H, W, C].

    `provenance` comes from `facts`; ValueError for another number of images than it says.
    """
    count, done, moments, kept = provenance["count"], 0, None, []
    # Not the first ones: a folder's images come class by class.
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[:KEPT]] = True
    with progress(count, name, " images") as bar:
        for batch in batches:
            values = extract(batch)
            new = Moments.of(values)
            moments = moments.merge(new) if moments else new
            kept.append(values[chosen[done : done + len(values)]])
            done += len(values)
            bar.update(len(values))
    if done != count:
        raise ValueError(f"expected {count} images, got {done}")
    return FeatureStatistics(moments.mean, moments.covariance, np.concatenate(kept), provenance)


def save(path: str | os.PathLike, statistics: FeatureStatistics) -> None:
    """Writes an .npz file, whole or not at all."""
    content = vars(statistics) | {"provenance": np.array(json.dumps(statistics.provenance))}
    storage.write_npz(path, **content)


def load(path: str | os.PathLike) -> FeatureStatistics:
    """Reads what `save` wrote, or another project's `mu` [2048] and `sigma` [2048, 2048].

    The latter are taken to be Inception's features of training images (split "train"), as EDM's
    are. A file on gs:// is copied into the user's cache first.

    Raises:
      ValueError: no such file, a damaged one, one without provenance, or another project's of
        other sizes or numbers than these.
    """
    path = storage.fetch(path)
    try:
        with storage.open_npz(path) as file:
            if {"mu", "sigma"} <= set(file.files):
                return _external(path, file["mu"], file["sigma"])
            arrays = {name: file[name] for name in ("mean", "covariance", "kept")}
            provenance = json.loads(str(file["provenance"]))
        missing = [name for name in _FACTS if name not in provenance]
        if missing or provenance["format"] != FORMAT:
            raise ValueError(f"its provenance is not of format {FORMAT} (missing: {missing})")
        size = arrays["mean"].shape[-1]
        shapes = [array.shape for array in arrays.values()]
        if shapes != [(size,), (size, size), (len(arrays["kept"]), size)]:
            raise ValueError(f"its arrays have shapes {shapes}")
    # numpy, zipfile and zlib report damage by very many types.
    except Exception as error:
        reason = _other_kind(path) or error
        raise ValueError(
            f"{path}: no reference statistics that can be read ({reason}); --mode=fid_stats writes "
            "them"
        ) from error
    return FeatureStatistics(**arrays, provenance=provenance)


def _other_kind(path: pathlib.Path) -> str:
    """Returns the kind of a file that was given in place of statistics; empty if unknown."""
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile):
        if storage.read_bytes(path)[:1] == b"\x80":
            return "it is a pickle, as EDM2's references are; save its mu and sigma by numpy.savez"
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith("data.pkl") for name in names):
            return "it is torch's file, such as a cache of torch-fidelity's"
        if "arr_0.npy" in names:
            return "it holds images, not statistics: compare a folder of them by app.fid"
    return ""


def _external(path: pathlib.Path, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    """Another project's statistics."""
    if mean.shape != (_SIZE,) or covariance.shape != (_SIZE, _SIZE):
        raise ValueError(
            f"mu and sigma have shapes {mean.shape} and {covariance.shape}: without a provenance "
            f"they are taken for Inception's, of {_SIZE} features"
        )
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind != "f" or not np.all(np.isfinite(array)):
            raise ValueError(f"{name} ({array.dtype}) is not of finite real numbers")
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > _ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"sigma is not symmetric: it differs by {asymmetry:.3g} from its mirror")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = dict.fromkeys(_FACTS) | {
        "format": FORMAT,
        "origin": "external",
        "file": path.name,
        "sha256": digest,
        "split": "train",
        "features": "inception",
    }
    moments = mean.astype(np.float64), covariance.astype(np.float64)
    return FeatureStatistics(*moments, np.zeros((0, _SIZE), np.float32), provenance)


def warning(provenance: Mapping) -> str:
    """Returns a warning for another project's unknown statistics; empty for all others."""
    if provenance.get("origin") != "external" or provenance["sha256"] in _EDM:
        return ""
    return (
        f"{provenance['file']} is none of EDM's files that are known by their hash: if pytorch-fid "
        "or clean-fid wrote it, which resize otherwise than TensorFlow, the distance means nothing"
    )


def fingerprint(statistics: FeatureStatistics) -> str:
    """SHA-256 of mean, covariance and provenance: two results with equal ones share a reference."""
    digest = hashlib.sha256(json.dumps(statistics.provenance, sort_keys=True).encode())
    for array in (statistics.mean, statistics.covariance):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check(provenance: Mapping, expected: Mapping, name: str) -> None:
    """Raises ValueError that names every fact that differs from what is `expected`.

    Facts that external statistics do not know (None) are passed over.
    """
    external = provenance.get("origin") == "external"
    differences = [
        f"{fact} is {provenance.get(fact)!r}, expected {value!r}"
        for fact, value in expected.items()
        if provenance.get(fact) != value and not (external and provenance.get(fact) is None)
    ]
    if differences:
        raise ValueError(
            f"{name} does not fit: {'; '.join(differences)}. --mode=fid_stats with the same "
            "configuration writes statistics that do"
        )
