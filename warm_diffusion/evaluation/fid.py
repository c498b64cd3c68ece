"""Frechet and kernel distance of two sets of images: folders, or statistics of --mode=fid_stats.

    python -m warm_diffusion.evaluation.fid GENERATED REFERENCE --weights inception.safetensors
    python -m warm_diffusion.evaluation.fid GENERATED REFERENCE --features pixels

REFERENCE may also be a file of mu and sigma as EDM and pytorch-fid write them: Frechet distance
alone, of a set that it does not describe.

It says how many files of each side it used. A file that is no readable image, or has another size
or mode than the first one, is named and counted, never averaged in, and makes the exit status 1;
2 is a mistake in the command. The images of a run's --mode=sample folder are compared without its
grid.png and sampling.json. No image is resized but by Inception.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from warm_diffusion.evaluation import distances, metrics, reference
from warm_diffusion.evaluation.features import Extractor, Features, concatenate, extractor
from warm_diffusion.runtime import storage

_MODES = ("L", "RGB")
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two sets.

    Attributes:
      statistics: of the images used.
      files: how many files were looked at; of statistics, the images that they are of, or None
        where those are unknown.
      left_out: what was wrong with each file that was not used.
      ignored: files that --mode=sample writes beside its images.
    """

    statistics: reference.FeatureStatistics
    files: int | None
    left_out: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def used(self) -> int | None:
        """How many images the statistics are of, or None where that is unknown."""
        return self.statistics.provenance["count"]


def read_side(path: str | os.PathLike, extract: Extractor) -> Side:
    """Statistics of a folder's images, or those in an .npz file, which may lie on gs://.

    Raises:
      ValueError: nothing there, statistics of other features, or fewer than two usable images.
    """
    if storage.path(path).is_dir():
        return _folder(storage.local(path, "a folder of images"), extract)
    statistics = reference.load(path)
    expected = {"features": extract.name, "weights_hash": extract.weights_hash}
    reference.check(statistics.provenance, expected, str(path))
    return Side(statistics, statistics.provenance["count"])


def _folder(root: pathlib.Path, extract: Extractor) -> Side:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    # What --mode=sample writes beside its images; nothing else is passed over.
    ours = {
        folder / name
        for folder in {path.parent for path in paths if path.name == "sampling.json"}
        for name in ("sampling.json", "grid.png")
    }
    ignored = [path for path in paths if path in ours]
    paths = [path for path in paths if path not in ours]
    left_out: list[str] = []
    images = _images(paths, left_out)
    digest, parts, shape = hashlib.sha256(), [], ()
    for chunk in _chunks(images):
        digest.update(chunk.tobytes())
        parts.append(extract(chunk))
        shape = chunk.shape[1:]
    count = sum(len(part.values) for part in parts)
    if count < 2:
        raise ValueError(
            f"{root}: {count} usable images of {len(paths)} files, expected at least 2"
            + "".join(f"; {problem}" for problem in left_out[:3])
        )
    found = reference.facts(
        extract,
        count=count,
        image_shape=shape,
        split="files",
        source=f"folder:{root}",
        data_sha256=digest.hexdigest(),
        recipe="as in the files",
    )
    statistics = _summarise(concatenate(parts), found)
    return Side(statistics, len(paths), tuple(left_out), tuple(str(path) for path in ignored))


def _summarise(found: Features, provenance: dict) -> reference.FeatureStatistics:
    """As `reference.collect`, of features that are all in memory."""
    moments = distances.Moments.of(found.values)
    rows = reference.kept_rows(len(found.values))
    return reference.FeatureStatistics(
        moments.mean, moments.covariance, found.values[rows], provenance
    )


def _images(paths: list[pathlib.Path], left_out: list[str]) -> Iterator[np.ndarray]:
    """Readable images like the first one, uint8 [H, W, C]; the others are described."""
    first = None
    for path in tqdm(paths, desc="reading", unit=" files", disable=None):
        try:
            with Image.open(path) as image:
                image.load()
                mode, array = image.mode, np.asarray(image)
        # PIL reports damage by many types: OSError, SyntaxError (broken PNG), bomb error...
        except Exception as error:
            left_out.append(f"{path} is no readable image ({error})")
            continue
        first = first or (mode, array.shape)
        if mode not in _MODES:
            left_out.append(f"{path} has mode {mode}, expected L (grey) or RGB")
        elif (mode, array.shape) != first:
            size, expected = (f"{m} {s[1]}x{s[0]}" for m, s in ((mode, array.shape), first))
            left_out.append(f"{path} is {size} (width x height), the first image {expected}")
        else:
            yield array if array.ndim == 3 else array[..., None]


def _chunks(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    chunk = []
    for image in images:
        chunk.append(image)
        if len(chunk) == _CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)


def compare_sides(generated: Side, real: Side) -> dict[str, float]:
    """Frechet distance and, where both have enough examples, kernel distance.

    Raises:
      ValueError: features of different sizes, or generated statistics of unknown images.
    """
    if generated.used is None:
        raise ValueError(
            "the generated side is statistics of an unknown number of images, which a metric's "
            "name states: give its folder of images, or the .npz of --mode=fid_stats"
        )
    one, two = generated.statistics, real.statistics
    split, features = two.provenance["split"], two.provenance["features"]
    name = lambda kind: metrics.metric_name(kind, features, generated.used, split)  # noqa: E731
    shapes = [side.provenance["image_shape"] for side in (one, two)]
    if one.mean.shape != two.mean.shape or (features == "pixels" and shapes[0] != shapes[1]):
        raise ValueError(
            f"images of shapes {shapes[0]} and {shapes[1]} have {one.mean.size} and "
            f"{two.mean.size} features: no distance between them"
        )
    found = {name("fd"): distances.frechet(one.mean, one.covariance, two.mean, two.covariance)}
    smaller = min(len(one.kept), len(two.kept))
    if smaller >= metrics.KERNEL_MINIMUM:
        found[name("kd")], found[f"{name('kd')}_standard_error"] = distances.kernel_distance(
            one.kept, two.kept, block_size=metrics.kernel_block_size(smaller)
        )
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; try --help\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(
        prog="python -m warm_diffusion.evaluation.fid",
        description=__doc__.split("\n\n")[0],
        epilog="Exit status: 0 done; 1 some files were left out, each named; 2 a mistake here.",
    )
    sets = "folder of images, or the .npz of --mode=fid_stats"
    parser.add_argument("generated", help=sets)
    others = f"{sets}, or EDM's of mu and sigma"
    parser.add_argument("reference", help=others)
    parser.add_argument("--features", default="inception", help="inception, pixels or MODULE:FUNC")
    parser.add_argument("--weights", default="", help="Inception's safetensors file")
    parser.add_argument("--json", help="file to write the result to as well")
    options = parser.parse_args(arguments)
    try:
        extract = extractor(options.features, weights=options.weights)
        sides = [read_side(path, extract) for path in (options.generated, options.reference)]
        found = compare_sides(*sides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for side, path in zip(sides, (options.generated, options.reference), strict=True):
        used = "unknown images" if side.used is None else f"{side.used:,} of {side.files:,}"
        print(f"{path}: used {used}")
        for ignored in side.ignored:
            print(f"  not an image of the set: {ignored}")
        for problem in side.left_out:
            print(f"  left out: {problem}", file=sys.stderr)
    if sides[0].used < metrics.FEW_SAMPLES:
        print(f"warning: {sides[0].used:,} images are few: compare only with results of as many")
    for name, value in found.items():
        print(f"{name} {value:.6g}")
    if options.json:
        report = found | {
            side: {
                "used": s.used,
                "files": s.files,
                "left_out": list(s.left_out),
                "provenance": s.statistics.provenance,
            }
            for side, s in zip(("generated", "reference"), sides, strict=True)
        }
        storage.write_json(options.json, report)
    left_out = sum(len(side.left_out) for side in sides)
    if left_out:
        print(f"error: {left_out} files were left out: the numbers are without them",
              file=sys.stderr)  # fmt: skip
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
