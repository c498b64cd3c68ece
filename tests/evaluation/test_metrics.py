"""Names of metrics, and what is compared under them."""

import dataclasses

import numpy as np
import pytest

from warm_diffusion.evaluation import metrics
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
        (("kd", "inception", 10_000), "kid10k_train"),
        (("bpd", "pixels", 256, "test"), "bpd256_test"),
        (("fd", "pixels", 1797), "fd_pixels_1797"),
        (("fd", "pixels", 1797, "test"), "fd_pixels_1797_test"),
        (("kd", "my.module:embed", 64), "kd_my.module.embed_64"),
    ],
)
def test_names_state_features_number_and_part_of_the_data(arguments, name):
    assert metrics.metric_name(*arguments) == name


def test_a_set_compared_with_itself_is_perfect():
    values = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    found = metrics.compare(statistics(values), statistics(values))
    assert found["fd_pixels_40"] == pytest.approx(0, abs=1e-6)
    assert found["precision_pixels_40"] == found["recall_pixels_40"] == 1


def test_a_shift_costs_its_square_and_precision():
    """Frechet distance of equal covariances: |m1 - m2|^2; far sets cover nothing of each other."""
    values = np.random.default_rng(0).standard_normal((30, 3))
    moved = statistics(values + np.array([10.0, 0, 20.0]))
    found = metrics.compare(moved, statistics(values, "m:f", "test"))
    assert found["fd_m.f_30_test"] == pytest.approx(500, rel=1e-5)
    assert found["precision_m.f_30_test"] == found["recall_m.f_30_test"] == 0
    assert found["kd_m.f_30_test"] > 1
    assert found["kd_m.f_30_test_standard_error"] >= 0


def test_a_reference_without_examples_has_no_metric_that_needs_them():
    """Equal covariances leave |m1 - m2|^2 = 9 + 16."""
    values = np.random.default_rng(0).standard_normal((200, 3))
    real = statistics(values - np.array([3.0, 0, 4.0]), "inception")
    bare = dataclasses.replace(real, kept=np.zeros((0, 3), np.float32))
    found = metrics.compare(statistics(values), bare)
    assert found == {"fid200_train": pytest.approx(25)}
    assert metrics.settings(200, bare) == {"kernel_distance": None, "precision_recall": None}
    assert metrics.settings(200, real) == {
        "kernel_distance": {"block_size": 100, "num_blocks": 100, "real": 200, "generated": 200},
        "precision_recall": {"k": 3, "real": 200, "generated": 200},
    }


def test_few_samples_and_unknown_references_are_warned_about():
    real = statistics(np.zeros((3, 2)))
    assert metrics.warnings(50_000, real) == ""
    assert "2,047 samples are few" in metrics.warnings(2047, real)
    external = {"origin": "external", "sha256": "", "file": "a.npz"}
    real = dataclasses.replace(real, provenance=real.provenance | external)
    assert metrics.warnings(50_000, real).startswith("a.npz is none of EDM's files")


def test_rounds_are_summarised_by_mean_deviation_and_minimum():
    """1, 2, 6: mean 3, sample standard deviation sqrt((4 + 1 + 9) / 2) = sqrt 7."""
    rounds = [
        {
            "seeds": "0-9",
            "fid50k_train": v,
            "precision50k_train": v / 10,
            "kid50k_train_standard_error": v,
        }
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
