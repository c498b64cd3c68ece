"""Distances between sets of features against closed forms and plain numpy."""

import numpy as np
import pytest

from warm_diffusion.evaluation import distances
from warm_diffusion.evaluation.distances import Moments


def _features(count, size=5, seed=0, mean=0.0):
    return np.random.default_rng(seed).standard_normal((count, size)) + mean


def _rotation(size, seed=0):
    return np.linalg.qr(_features(size, size, seed))[0]


# --- moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [7, 8, 20, 39]])
def test_merged_moments_are_those_of_the_whole_for_any_partition(cuts):
    features = _features(40, mean=3.0)
    first, *others = np.split(features, cuts)
    moments = Moments.of(first)
    for part in others:
        moments = moments.merge(Moments.of(part))
    assert moments.count == 40
    np.testing.assert_allclose(moments.mean, np.mean(features, axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), atol=1e-13)


def test_merging_keeps_a_spread_that_is_small_beside_the_mean():
    # Sums of squares, 1e18 each, would have no digit left for a variance of about 1.
    features = _features(200, mean=1e9)
    moments = Moments.of(features[:90]).merge(Moments.of(features[90:]))
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), atol=1e-6)


def test_moments_of_float32_features_are_computed_in_float64():
    features = _features(1000, mean=100.0).astype(np.float32)
    moments = Moments.of(features)
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (2, 3, 4)])
def test_moments_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected features \[N, D\]"):
        Moments.of(np.zeros(shape))


def test_features_that_are_not_finite_are_refused_with_their_row():
    features = _features(6)
    features[[2, 4], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="not finite in 2 rows, the first is 2"):
        Moments.of(features)


# --- Frechet distance -----------------------------------------------------------------------------


def test_frechet_of_covariances_that_commute():
    # In their common eigenvectors they are diagonal: sum (s1 - s2)^2.
    s1, s2 = np.abs(_features(2, size=20, seed=2))
    basis = _rotation(20)
    cov1, cov2 = (basis * s1**2) @ basis.T, (basis * s2**2) @ basis.T
    value = distances.frechet(np.zeros(20), cov1, np.zeros(20), cov2)
    assert value == pytest.approx(np.sum((s1 - s2) ** 2), rel=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    # Closed form for 2 x 2: tr (C1 C2)^1/2 = sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2))).
    cov1, cov2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 0.5]])
    product = cov1 @ cov2
    overlap = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(cov1) + np.trace(cov2) - 2 * overlap
    value = distances.frechet(np.zeros(2), cov1, np.zeros(2), cov2)
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_of_covariances_without_full_rank():
    # Lines: C = a a^T and b b^T give tr = |a|^2 + |b|^2 - 2 |a . b|.
    a, b = _features(2, size=30, seed=3)
    value = distances.frechet(np.zeros(30), np.outer(a, a), np.zeros(30), np.outer(b, b))
    assert value == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-7)


def test_frechet_to_a_point_is_the_trace():
    cov = Moments.of(_features(50)).covariance
    zero = np.zeros((5, 5))
    for value in (
        distances.frechet(np.zeros(5), cov, np.ones(5), zero),
        distances.frechet(np.zeros(5), zero, np.ones(5), cov),
    ):
        assert value == pytest.approx(5 + np.trace(cov), rel=1e-12)


@pytest.mark.parametrize("count", [20, 500])  # below and above the number of features
def test_frechet_of_identical_sets_is_zero(count):
    features = _features(count, size=100) @ np.diag(np.logspace(0, -6, 100)) @ _rotation(100)
    moments = Moments.of(features)
    pair = (moments.mean, moments.covariance)
    assert 0 <= distances.frechet(*pair, *pair) < 1e-6 * np.trace(moments.covariance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean1": np.zeros(3)}, "expected means"),
        ({"cov2": np.eye(3)}, "expected means"),
        ({"cov1": np.diag([1, np.inf])}, "cov1 is not finite"),
        ({"cov2": np.array([[1.0, 0.5], [0.0, 1.0]])}, "cov2 is not symmetric"),
        ({"cov1": np.diag([1.0, -1.0])}, "cov1 is no covariance"),
    ],
)
def test_frechet_of_anything_but_two_gaussians_is_refused(change, message):
    arguments = {"mean1": np.zeros(2), "cov1": np.eye(2), "mean2": np.zeros(2), "cov2": np.eye(2)}
    with pytest.raises(ValueError, match=message):
        distances.frechet(**(arguments | change))


# --- kernel distance ------------------------------------------------------------------------------


def _mmd2(x, y):
    """Unbiased MMD^2 by loops over pairs (Gretton et al. 2012, eq. 3)."""

    def kernel(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kernel_distance_is_the_mean_over_blocks_of_the_brute_force_one():
    a, b = _features(9, seed=1), _features(7, seed=2, mean=1.0)
    rng = np.random.default_rng(3)  # blocks: without replacement, a's before b's
    expected = []
    for _ in range(4):
        x, y = a[rng.choice(9, 5, replace=False)], b[rng.choice(7, 5, replace=False)]
        expected.append(_mmd2(x, y))
    value, error = distances.kernel_distance(a, b, block_size=5, num_blocks=4, seed=3)
    assert value == pytest.approx(np.mean(expected), rel=1e-12)
    # With Var(set) = 5/7 Var(block), s^2 estimates 2/7 Var(block), and the mean of four blocks has
    # Var(set) + s^2 / 4 = (5/2 + 1/4) s^2.
    assert error == pytest.approx(np.std(expected, ddof=1) * np.sqrt(5 / 2 + 1 / 4), rel=1e-12)


def test_standard_error_of_the_kernel_distance_is_its_scatter_over_data_sets():
    # Distributions that differ, blocks that overlap (8 of 50 from 100): the scatter between blocks
    # over sqrt(8) alone would be too small by a factor of about 3.
    draws = [
        distances.kernel_distance(
            _features(100, seed=2 * s), _features(100, seed=2 * s + 1, mean=1.0),
            block_size=50, num_blocks=8, seed=s,
        )
        for s in range(200)
    ]  # fmt: skip
    values, errors = np.transpose(draws)
    # 200 draws fix the scatter to 5 %.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(values, ddof=1), rel=0.25)


@pytest.mark.parametrize("block", [(1, 10), (30, 10), (10, 1)])
def test_blocks_that_cannot_differ_are_refused(block):
    with pytest.raises(ValueError, match="expected at least 2 blocks, of 2 to 29 examples"):
        distances.kernel_distance(
            _features(40), _features(30), block_size=block[0], num_blocks=block[1]
        )


# --- precision, recall and neighbours -------------------------------------------------------------


def _brute_distances(a, b):
    return np.array([[np.sqrt(np.sum((x - y) ** 2)) for y in b] for x in a])


def _brute_precision(real, generated, k):
    # Sorted distances of a real example: itself first, so its k-th neighbour is at index k.
    reach = np.sort(_brute_distances(real, real), axis=1)[:, k]
    return np.mean([any(row <= reach) for row in _brute_distances(generated, real)])


@pytest.fixture(params=[7, 1024])
def block_rows(request, monkeypatch):
    """Blocks smaller than, comparable to and larger than the sets."""
    monkeypatch.setattr(distances, "_ROWS", request.param)


@pytest.mark.usefixtures("block_rows")
@pytest.mark.parametrize("k", [1, 10])
def test_precision_and_recall_are_those_of_brute_force(k):
    real, generated = _features(40, seed=1), _features(25, seed=2, mean=0.8)
    expected = (_brute_precision(real, generated, k), _brute_precision(generated, real, k))
    assert distances.precision_recall(real, generated, k=k) == pytest.approx(expected)
    assert 0 < min(expected) < max(expected)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    # Two clusters 100 apart: a set that has one of them covers half of the set that has both.
    near, far = _features(50), _features(50, seed=1, mean=100.0)
    both, one = np.concatenate([near, far]), _features(50, seed=2)
    precision, recall = distances.precision_recall(both, one, k=10)
    assert precision > 0.95
    assert 0.45 < recall <= 0.5
    assert distances.precision_recall(one, both, k=10) == (recall, precision)


@pytest.mark.usefixtures("block_rows")
def test_identical_sets_have_full_precision_and_recall_also_with_repeated_examples():
    # At a large mean |a|^2 + |b|^2 - 2 a . b of copies is not 0 but round-off, of either sign and
    # depending on the place in the block.
    features = np.repeat(_features(8, size=300, mean=1e3), 5, axis=0)
    shuffled = np.random.default_rng(0).permutation(features)
    assert distances.precision_recall(features, shuffled) == (1.0, 1.0)


@pytest.mark.parametrize("k", [0, 10])
def test_a_neighbour_that_does_not_exist_is_refused(k):
    with pytest.raises(ValueError, match=f"below both 12 and 10 examples, got {k}"):
        distances.precision_recall(_features(12), _features(10), k=k)
