"""Metrics of generated images against a reference, with names that state their protocol.

    FID            fid50k_train, kid50k_train, precision50k_train, recall50k_train, is50k
    other          fd_pixels_1797, kd_pixels_1797, ... (Frechet and kernel distance of those
    features       features; only Inception's may be called FID and KID)

The number is that of the generated images; `train` (in the other names only if it is not train) the
part of the data that they are compared with. Frechet distances fall as that number grows: compare
only equal names. Formulas: `distances.py`.
"""

import numpy as np

from warm_diffusion.evaluation import distances
from warm_diffusion.evaluation.features import Features
from warm_diffusion.evaluation.reference import KEPT, FeatureStatistics, add

FEW_SAMPLES = 2048  # below, covariances of Inception's features have no full rank
_KERNEL_BLOCK, _KERNEL_BLOCKS = 1000, 100
_NEIGHBOUR = 3
KERNEL_MINIMUM = 4  # two blocks of two examples; also one more than neighbours looked at
_SPLITS = 10
_CHUNK = 8192
_INCEPTION_KINDS = {"fd": "fid", "kd": "kid"}
_DISTANCES = ("fid", "kid", "fd_", "kd_")  # names of which the smallest is the best
_SPREADS = ("_standard_error", "_split_std")  # of one round, not to be averaged


def metric_name(kind: str, features: str, count: int, split: str = "train") -> str:
    """The name of a metric.

    Args:
      kind: fd, kd (Frechet, kernel distance), precision, recall, is (Inception Score) or bpd
        (bits per dimension, of `count` images of the data).
      features: name of the features.
      count: number of generated images.
      split: part of the data compared with.
    """
    thousands, rest = divmod(count, 1000)
    short = f"{thousands}k" if thousands and not rest else str(count)
    if kind == "is":
        return f"is{short}"
    if kind == "bpd":
        return f"bpd{short}_{split}"
    if features == "inception":
        return f"{_INCEPTION_KINDS.get(kind, kind)}{short}_{split}"
    suffix = "" if split == "train" else f"_{split}"
    return f"{kind}_{features.replace(':', '.')}_{count}{suffix}"


def compare(generated: Features, reference: FeatureStatistics) -> dict[str, float]:
    """All metrics of the generated images' features that their number allows.

    Args:
      generated: features of at least 2 images, and Inception's logits if there are.
      reference: statistics of the same features; if they keep no examples, as those of other
        projects, there is no kernel distance, precision or recall.

    Returns:
      Metric (see `metric_name`) to value; kd's also with its standard error, the Inception
      Score's with the standard deviation over its splits.

    Raises:
      ValueError: features of another size, not finite, or fewer than 2.
    """
    count, split = len(generated.values), reference.provenance["split"]
    name = lambda kind: metric_name(kind, reference.provenance["features"], count, split)  # noqa: E731
    moments = None
    for first in range(0, count, _CHUNK):
        moments = add(moments, generated.values[first : first + _CHUNK])
    found = {
        name("fd"): distances.frechet(
            moments.mean, moments.covariance, reference.mean, reference.covariance
        )
    }
    smaller = min(count, len(reference.kept))
    if smaller >= KERNEL_MINIMUM:
        found[name("kd")], found[f"{name('kd')}_standard_error"] = distances.kernel_distance(
            generated.values,
            reference.kept,
            block_size=kernel_block_size(smaller),
            num_blocks=_KERNEL_BLOCKS,
        )
        found[name("precision")], found[name("recall")] = distances.precision_recall(
            reference.kept, generated.values[:KEPT], k=_NEIGHBOUR
        )
    if generated.logits is not None and count >= _SPLITS:
        found[name("is")], found[f"{name('is')}_split_std"] = distances.inception_score(
            generated.logits, splits=_SPLITS
        )
    return found


def kernel_block_size(smaller: int) -> int:
    """Examples a block of the kernel distance: 1,000, or half of the smaller set."""
    return min(_KERNEL_BLOCK, smaller // 2)


def settings(count: int, reference: FeatureStatistics) -> dict:
    """What else decides the numbers of `compare`, to be reported beside them.

    Args:
      count: number of generated images.
      reference: what they are compared with.

    Returns:
      Metric to its settings; None for those that need examples, if the reference keeps none.
    """
    if not len(reference.kept):
        return {
            "kernel_distance": None,
            "precision_recall": None,
            "inception_score": {"splits": _SPLITS},
        }
    smaller = min(count, len(reference.kept))
    return {
        "kernel_distance": {"block_size": kernel_block_size(smaller), "num_blocks": _KERNEL_BLOCKS},
        "precision_recall": {
            "k": _NEIGHBOUR,
            "real": len(reference.kept),
            "generated": min(count, KEPT),
        },
        "inception_score": {"splits": _SPLITS},
    }


def summarise(rounds: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean, standard deviation and, of distances, minimum over several rounds of sampling.

    Args:
      rounds: the metrics of each round, of the same names.

    Returns:
      NAME (the mean), NAME_std (over rounds; None for a single one) and of distances NAME_min.
    """
    summary = {}
    for name in rounds[0]:
        if name.endswith(_SPREADS):
            continue
        values = np.array([metrics[name] for metrics in rounds])
        summary[name] = float(values.mean())
        summary[f"{name}_std"] = float(values.std(ddof=1)) if len(values) > 1 else None
        if name.startswith(_DISTANCES):
            summary[f"{name}_min"] = float(values.min())
    return summary
