"""Names of metrics, and what is compared under them."""

import dataclasses

import numpy as np
import pytest

from warm_diffusion.evaluation import metrics
from warm_diffusion.evaluation.features import Features
from warm_diffusion.evaluation.reference import FeatureStatistics


def statistics(values, features="pixels", split="train"):
    return FeatureStatistics(
        values.mean(0), np.cov(values, rowvar=False), values,
        {"features": features, "split": split, "count": len(values)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("fd", "inception", 50_000), "fid50k_train"),
        (("fd", "inception", 50_000, "test"), "fid50k_test"),
        (("fd", "inception", 1797), "fid1797_train"),
        (("fd", "inception", 500), "fid500_train"),
        (("kd", "inception", 10_000), "kid10k_train"),
        (("precision", "inception", 2_000), "precision2k_train"),
        (("is", "inception", 50_000), "is50k"),
        (("bpd", "pixels", 256, "test"), "bpd256_test"),
        (("fd", "pixels", 1797), "fd_pixels_1797"),
        (("fd", "pixels", 50_000), "fd_pixels_50000"),
        (("fd", "pixels", 1797, "test"), "fd_pixels_1797_test"),
        (("kd", "my.module:embed", 64), "kd_my.module.embed_64"),
    ],
)
def test_names_state_features_number_and_part_of_the_data(arguments, name):
    assert metrics.metric_name(*arguments) == name


def test_a_set_compared_with_itself_is_perfect():
    values = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    found = metrics.compare(Features(values), statistics(values))
    assert found["fd_pixels_40"] == pytest.approx(0, abs=1e-6)
    assert found["precision_pixels_40"] == found["recall_pixels_40"] == 1
    assert not any(name.startswith("is") for name in found)


def test_a_shift_costs_its_square_and_precision():
    """Frechet distance of equal covariances: |m1 - m2|^2; far sets cover nothing of each other."""
    values = np.random.default_rng(0).standard_normal((30, 3))
    moved = Features((values + np.array([10.0, 0, 20.0])).astype(np.float32))
    found = metrics.compare(moved, statistics(values, "m:f", "test"))
    assert found["fd_m.f_30_test"] == pytest.approx(500, rel=1e-5)
    assert found["precision_m.f_30_test"] == found["recall_m.f_30_test"] == 0
    assert found["kd_m.f_30_test"] > 1
    assert found["kd_m.f_30_test_standard_error"] >= 0


def test_moments_taken_in_chunks_are_those_of_all(monkeypatch):
    values = np.random.default_rng(1).standard_normal((50, 4))
    real = statistics(np.random.default_rng(2).standard_normal((60, 4)))
    whole = metrics.compare(Features(values), real)
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    assert metrics.compare(Features(values), real) == pytest.approx(whole, rel=1e-9)


def test_logits_give_the_inception_score():
    """Uniform over K classes in every split, each example sure of one: exp(ln K) = K."""
    values = np.random.default_rng(0).standard_normal((200, 3))
    logits = 100 * np.eye(5)[np.arange(200) % 5]
    found = metrics.compare(Features(values, logits), statistics(values, "inception"))
    assert found["is200"] == pytest.approx(5)
    assert found["is200_split_std"] == pytest.approx(0, abs=1e-9)


def test_two_examples_have_a_frechet_distance_and_no_more():
    values = np.random.default_rng(0).standard_normal((2, 3))
    found = metrics.compare(Features(values), statistics(values))
    assert list(found) == ["fd_pixels_2"]


def test_a_reference_without_examples_has_no_metric_that_needs_them():
    """Of equal covariances: |m1 - m2|^2 = 9 + 16. Every example sure of one of 5 classes: 5."""
    values = np.random.default_rng(0).standard_normal((200, 3))
    real = statistics(values - np.array([3.0, 0, 4.0]), "inception")
    bare = dataclasses.replace(real, kept=np.zeros((0, 3), np.float32))
    found = metrics.compare(Features(values, 100 * np.eye(5)[np.arange(200) % 5]), bare)
    assert list(found) == ["fid200_train", "is200", "is200_split_std"]
    assert found["fid200_train"] == pytest.approx(25)
    assert found["is200"] == pytest.approx(5)
    assert metrics.settings(200, bare) == {
        "kernel_distance": None,
        "precision_recall": None,
        "inception_score": {"splits": 10},
    }
    # With examples the settings are as ever: they decide which reports are the same.
    assert metrics.settings(200, real) == {
        "kernel_distance": {"block_size": 100, "num_blocks": 100},
        "precision_recall": {"k": 3, "real": 200, "generated": 200},
        "inception_score": {"splits": 10},
    }


def test_rounds_are_summarised_by_mean_deviation_and_minimum():
    """1, 2, 6: mean 3, sample standard deviation sqrt((4 + 1 + 9) / 2) = sqrt 7."""
    rounds = [
        {"fid50k_train": v, "precision50k_train": v / 10, "kid50k_train_standard_error": v}
        for v in (2.0, 1.0, 6.0)
    ]
    found = metrics.summarise(rounds)
    assert found == {
        "fid50k_train": pytest.approx(3),
        "fid50k_train_std": pytest.approx(7**0.5),
        "fid50k_train_min": 1,
        "precision50k_train": pytest.approx(0.3),
        "precision50k_train_std": pytest.approx(7**0.5 / 10),
    }


def test_one_round_has_no_deviation():
    found = metrics.summarise([{"fd_pixels_8": 0.5}])
    assert found == {"fd_pixels_8": 0.5, "fd_pixels_8_std": None, "fd_pixels_8_min": 0.5}
