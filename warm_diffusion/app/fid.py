"""Distances of two sets of images as files, or as statistics of --mode=fid_stats.

    python -m warm_diffusion.app.fid GENERATED REFERENCE --weights=FILE
    python -m warm_diffusion.app.fid GENERATED REFERENCE --features=pixels

Each is a folder of images, such as --mode=sample fills, a source as config.data.source names it
(zip:FILE, tfds:cifar10:test), or an .npz file of statistics. REFERENCE may be EDM's or ADM's .npz
of mu and sigma: Frechet distance alone. FID is TensorFlow's here, as EDM and torch-fidelity compute
it; pytorch-fid and clean-fid resize images otherwise, and their numbers and references differ. An
image that cannot be read, or of another size than the first one, is a mistake: none is left out.
"""

import argparse
import sys
from typing import NoReturn

from warm_diffusion.data import load_dataset
from warm_diffusion.evaluation import features, metrics, reference
from warm_diffusion.evaluation.features import Extractor
from warm_diffusion.runtime import storage


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; try --help\n")


def _images(spec: str):
    """The data set of a folder or source; None for a file of statistics."""
    if spec.endswith(".npz") and not spec.startswith("npz:"):
        return None
    return load_dataset(f"folder:{spec}" if storage.path(spec).is_dir() else spec)


def _statistics(spec: str, data, extract: Extractor | None) -> reference.FeatureStatistics:
    if data is None:
        return reference.load(spec)
    facts = reference.facts(extract, data.images, data.info, "files")
    return reference.collect(extract, reference.in_batches(data.images), facts, spec)


def compare(generated: str, real: str, name: str = "auto", weights: str = "") -> dict:
    """Distances of two sets, each as on the command line, and where both come from.

    `name` of the features (`features.choose`) and Inception's file of `weights` are not used where
    both are statistics.

    Raises:
      ValueError: images that cannot be read or do not fit, statistics of other features, or
        generated ones of an unknown number of images.
    """
    data = [_images(spec) for spec in (generated, real)]
    extract, shapes = None, [d.images.shape[1:] for d in data if d]
    if shapes:
        name, reason = features.choose(name, shapes[0], weights)
        if reason:
            print(f"features {name}: {reason} (--features=auto)")
        extract = features.extractor(name, weights=weights)
    one, two = (_statistics(*side, extract) for side in zip((generated, real), data, strict=True))
    count = one.provenance["count"]
    if count is None:
        raise ValueError(
            f"{generated} holds statistics of an unknown number of images, which a metric's name "
            "states: give the folder of images, or the .npz of --mode=fid_stats"
        )
    same = ["features", "weights_hash"]
    same += ["image_shape"] if one.provenance["features"] == "pixels" else []
    reference.check(two.provenance, {fact: one.provenance[fact] for fact in same}, real)
    return metrics.compare(one, two) | {
        "warning": metrics.warnings(count, two),
        "generated": one.provenance,
        "reference": two.provenance,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 after one line on stderr."""
    description, _, details = __doc__.partition("\n\n")
    parser = _Parser(
        prog="python -m warm_diffusion.app.fid", description=description, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("generated", help="folder of images, source, or .npz of --mode=fid_stats")
    parser.add_argument("reference", help="the same, or EDM's or ADM's .npz of mu and sigma")
    names = "auto, inception, efficientnet_lite0, pixels or MODULE:FUNCTION [auto]"
    parser.add_argument("--features", default="auto", help=names)
    parser.add_argument("--weights", default="", help="Inception's weights, .pth or .safetensors")
    parser.add_argument("--json", help="file to write the result to as well")
    options = parser.parse_args(arguments)
    try:
        found = compare(options.generated, options.reference, options.features, options.weights)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for side in ("generated", "reference"):
        count = found[side]["count"]
        print(f"{side:<9} {count or 'unknown'} images of {getattr(options, side)}")
    if found["warning"]:
        print(f"warning   {found['warning']}")
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name} {value:.6g}")
    if options.json:
        storage.write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
