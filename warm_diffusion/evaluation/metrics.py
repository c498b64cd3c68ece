"""Metrics of generated images against a reference, with names that state their protocol.

    FID            fid50k_train, kid50k_train, precision50k_train, recall50k_train
    other          fd_pixels_1797, kd_pixels_1797, ... (Frechet and kernel distance of those
    features       features; only Inception's may be called FID and KID)

The number is that of the generated images; `train` (in the other names only if it is not train) the
part of the data that they are compared with. Frechet distances fall as that number grows: compare
only equal names. Formulas: `distances.py`.
"""

import numpy as np

from warm_diffusion.evaluation import distances
from warm_diffusion.evaluation.reference import KEPT, FeatureStatistics, warning

_FEW = 2048  # below, covariances of Inception's features have no full rank
_KERNEL_BLOCK, _KERNEL_BLOCKS = 1000, 100
_NEIGHBOUR = 3
_LEAST = 4  # two blocks of two examples; also one more than neighbours looked at
_INCEPTION_KINDS = {"fd": "fid", "kd": "kid"}
_DISTANCES = ("fid", "kid", "fd_", "kd_")  # names of which the smallest is the best


def metric_name(kind: str, features: str, count: int, split: str = "train") -> str:
    """The name of a metric of `count` generated images against a `split` of the data.

    `kind` is fd, kd (Frechet, kernel distance), precision, recall or bpd (bits per dimension, of
    `count` images of the data).
    """
    thousands, rest = divmod(count, 1000)
    short = f"{thousands}k" if thousands and not rest else str(count)
    if kind == "bpd":
        return f"bpd{short}_{split}"
    if features == "inception":
        return f"{_INCEPTION_KINDS.get(kind, kind)}{short}_{split}"
    suffix = "" if split == "train" else f"_{split}"
    return f"{kind}_{features.replace(':', '.')}_{count}{suffix}"


def main_metric(count: int, reference: FeatureStatistics) -> str:
    """The name of the Frechet distance of `count` images to a reference."""
    return metric_name("fd", reference.provenance["features"], count, reference.provenance["split"])


def compare(generated: FeatureStatistics, reference: FeatureStatistics) -> dict[str, float]:
    """All metrics that the numbers of images allow, by `metric_name` (features of one kind).

    Where the reference keeps no examples, as those of other projects, there is no kernel distance,
    precision or recall.
    """
    count, about = generated.provenance["count"], reference.provenance
    name = lambda kind: metric_name(kind, about["features"], count, about["split"])  # noqa: E731
    moments = (generated.mean, generated.covariance, reference.mean, reference.covariance)
    found = {name("fd"): distances.frechet(*moments)}
    chosen = settings(count, reference)
    if chosen["kernel_distance"]:
        found[name("kd")], found[f"{name('kd')}_standard_error"] = distances.kernel_distance(
            generated.kept,
            reference.kept,
            block_size=chosen["kernel_distance"]["block_size"],
            num_blocks=_KERNEL_BLOCKS,
        )
        found[name("precision")], found[name("recall")] = distances.precision_recall(
            reference.kept, generated.kept, k=_NEIGHBOUR
        )
    return found


def settings(count: int, reference: FeatureStatistics) -> dict:
    """Returns what decides `compare`'s numbers; None where a metric needs more examples."""
    real = len(reference.kept)
    smaller = min(count, real)
    if smaller < _LEAST:
        return {"kernel_distance": None, "precision_recall": None}
    examples = {"real": real, "generated": min(count, KEPT)}
    blocks = {"block_size": min(_KERNEL_BLOCK, smaller // 2), "num_blocks": _KERNEL_BLOCKS}
    return {
        "kernel_distance": blocks | examples,
        "precision_recall": {"k": _NEIGHBOUR} | examples,
    }


def warnings(count: int, reference: FeatureStatistics) -> str:
    """Returns warnings about distances of `count` images, possibly none."""
    few = f"{count:,} samples are few: compare only with distances of as many samples"
    return "; ".join(filter(None, [few * (count < _FEW), warning(reference.provenance)]))


def summarise(rounds: list[dict]) -> dict[str, float | None]:
    """Mean NAME, deviation NAME_std and, of distances, minimum NAME_min over rounds of sampling.

    What is no number is passed over; the deviation of a single round is None.
    """
    summary = {}
    for name, value in rounds[0].items():
        # A standard error belongs to one round and cannot be averaged.
        if not isinstance(value, float) or name.endswith("_standard_error"):
            continue
        values = np.array([metrics[name] for metrics in rounds])
        summary[name] = float(values.mean())
        summary[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        if name.startswith(_DISTANCES):
            summary[f"{name}_min"] = float(values.min())
    return summary
