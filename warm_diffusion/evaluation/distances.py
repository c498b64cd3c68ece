"""Distances between two sets of features, in float64 on the host.

    (1)  Frechet     |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2
                     (Heusel et al. 2017, arXiv 1706.08500, eq. 6)
    (2)  kernel      mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k(x, y) = (x . y / D + 1)^3,
                     the first two over pairs of different examples, so that it is unbiased
                     (Binkowski et al. 2018, arXiv 1801.01401, sec. 4)
    (3)  precision   share of generated examples within reach of a real one, whose reach is the
                     distance of its k-th neighbour; recall exchanges the sets (Kynkaanniemi et al.
                     2019, arXiv 1904.06991, eq. 1-2)

Covariances divide by n - 1. The roots in (1) come from eigendecompositions of symmetric matrices:
real, and sound where covariances have no full rank. The usual root of C1 C2 is neither.

Deliberately absent: the features themselves, corrections of (1) for the size of the sets, and the
Inception Score, which compares with no data.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

_ROWS = 1024  # of distances at once: to 10,000 examples they take 80 MB


def _check(name: str, values: np.ndarray, *, minimum: int = 1) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) < minimum or values.shape[1] == 0:
        raise ValueError(f"expected {name} [N, D], N at least {minimum}, got {values.shape}")
    if values.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers as {name}, got {values.dtype}")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(f"{name} are not finite in {len(bad)} rows, the first is {bad[0]}")
    return values


def _check_pair(
    name_a: str, a: np.ndarray, name_b: str, b: np.ndarray, *, minimum: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    a, b = _check(name_a, a, minimum=minimum), _check(name_b, b, minimum=minimum)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name_a} have {a.shape[1]} numbers per example, {name_b} {b.shape[1]}")
    return a, b


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean [D] and scatter [D, D] (sum of outer products around the mean) of features.

    Merging is exact in the count and loses no digits where the mean is large beside the spread
    (Chan, Golub and LeVeque 1979), unlike sums of squares.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Moments of features [N, D]; ValueError for another shape or non-finite numbers."""
        features = _check("features", features).astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean[None]
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together; ValueError if they have different numbers of features."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge {self.mean.shape} features with {other.mean.shape}")
        count = self.count + other.count
        shift = other.mean - self.mean
        between = np.outer(shift, shift) * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance [D, D]; ValueError for fewer than two examples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 examples, got {self.count}")
        return self.scatter / (self.count - 1)


def _check_definite(name: str, eigenvalues: np.ndarray) -> None:
    # Rounding statistics to float32 may make eigenvalues negative by 1e-7 of the largest.
    lowest, highest = eigenvalues[0], eigenvalues[-1]
    if lowest < -1e-5 * abs(highest):
        raise ValueError(
            f"{name} is no covariance: its eigenvalues reach from {lowest:.3g} to {highest:.3g}"
        )


def _overlap(cov1: np.ndarray, cov2: np.ndarray) -> float:
    """tr (C1^1/2 C2 C1^1/2)^1/2, in the directions that C1 has."""
    values, vectors = np.linalg.eigh(cov1)
    _check_definite("cov1", values)
    # Without those that are only round-off: squared and rooted again they would weigh 1e-8, not 0.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    if not kept.any():
        return 0.0
    root = vectors[:, kept] * np.sqrt(values[kept])[None]
    values = np.linalg.eigvalsh(root.T @ cov2 @ root)
    _check_definite("cov2", values)
    return float(np.sqrt(np.maximum(values, 0)).sum())


def frechet(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Frechet distance between Gaussians, eq. (1); of Inception features: FID.

    Means are [D], covariances [D, D] of any rank. It is a squared distance, at least 0; equal
    Gaussians give 0 up to round-off.

    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or covariances that are not
        symmetric or not positive semi-definite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    size = mean1.size
    shapes = (mean1.shape, cov1.shape, mean2.shape, cov2.shape)
    if shapes != ((size,), (size, size)) * 2 or size == 0:
        raise ValueError(f"expected means [D] and covariances [D, D], got {shapes}")
    for name, values in {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}.items():
        if not np.all(np.isfinite(values)):
            raise ValueError(f"{name} is not finite")
        if values.ndim == 2 and np.abs(values - values.T).max() > 1e-6 * np.abs(values).max():
            raise ValueError(f"{name} is not symmetric")
    difference = np.sum((mean1 - mean2) ** 2)
    squared = difference + np.trace(cov1) + np.trace(cov2) - 2 * _overlap(cov1, cov2)
    return float(max(squared, 0.0))


def _unbiased_mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. (2) for sets of equal size m, all m^2 cross pairs used."""
    m, size = x.shape
    kernel = lambda a, b: (a @ b.T / size + 1) ** 3  # noqa: E731
    within = sum((k.sum() - np.trace(k)) / (m * (m - 1)) for k in (kernel(x, x), kernel(y, y)))
    return within - 2 * kernel(x, y).mean()


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, block_size: int = 1000, num_blocks: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance, eq. (2), over random blocks; of Inception features: KID.

    Args:
      a: features [N, D].
      b: features [M, D].
      block_size: examples per block from each set, drawn without replacement.
      num_blocks: at least 2.
      seed: of the blocks.

    Returns:
      (mean, standard error). The mean is unbiased, so it may be below 0. The standard error covers
      that blocks of a small set share examples, by Hoeffding's bound for U-statistics,
      Var(set) <= block_size / n Var(block); for equal distributions it is too large.

    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or blocks not smaller than
        both sets.
    """
    a, b = _check_pair("a", a, "b", b, minimum=2)
    smaller = min(len(a), len(b))
    if not 2 <= block_size < smaller or num_blocks < 2:
        raise ValueError(
            f"expected at least 2 blocks, of 2 to {smaller - 1} examples (below the smaller set's, "
            f"so that blocks differ), got {num_blocks} of {block_size}"
        )
    rng = np.random.default_rng(seed)
    blocks = np.empty(num_blocks)
    for i in range(num_blocks):
        x, y = (s[rng.choice(len(s), block_size, replace=False)].astype(np.float64) for s in (a, b))
        blocks[i] = _unbiased_mmd2(x, y)
    # Given the set, blocks scatter by Var(block) - Var(set); their mean by Var(set) besides.
    share = block_size / smaller
    variance = blocks.var(ddof=1) * (1 / num_blocks + share / (1 - share))
    return float(blocks.mean()), math.sqrt(variance)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N, M]; what round-off alone can produce counts as zero, so copies are at distance 0."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None]
    squares = norms - 2 * (a @ b.T)
    squares[squares < a.shape[1] * np.finfo(np.float64).eps * norms] = 0
    return squares


def _in_rows(function: Callable[[np.ndarray], np.ndarray], features: np.ndarray) -> np.ndarray:
    parts = (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))
    return np.concatenate([function(part) for part in parts])


def _share_within(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Share of `a` within reach of at least one of `b`, which is its k-th neighbour's distance."""
    # The smallest distance of each row is its own, 0.
    reach = _in_rows(lambda x: np.partition(_squared_distances(x, b), k, axis=1)[:, k], b)
    return float(_in_rows(lambda x: np.any(_squared_distances(x, b) <= reach[None], 1), a).mean())


def precision_recall(real: np.ndarray, generated: np.ndarray, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, eq. (3): (fidelity, coverage), both in [0, 1].

    Args:
      real: features [N, D].
      generated: features [M, D]; both depend on N and M, which results should state.
      k: neighbour whose distance is an example's reach, at least 1, below N and M.

    Raises:
      ValueError: shapes that do not fit, numbers that are not finite, or k out of range.
    """
    real, generated = _check_pair("real", real, "generated", generated)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(
            f"k must be from 1 to below both {len(real)} and {len(generated)} examples, got {k}"
        )
    return _share_within(generated, real, k), _share_within(real, generated, k)
