"""Reference statistics that other projects wrote: mu and sigma of Inception's 2048 features."""

import hashlib

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from warm_diffusion.evaluation import features, fid, metrics, reference

SIZE = 2048
MU, SIGMA = np.linspace(-1, 1, SIZE), 0.25 * np.eye(SIZE)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def sigma_with(row, column, value):
    sigma = SIGMA.copy()
    sigma[row, column] = value
    return sigma


@pytest.fixture(scope="module")
def isotropic(tmp_path_factory):
    """As EDM's fid.py writes it: numpy.savez(path, mu=mu, sigma=sigma), both float64."""
    return save(tmp_path_factory.mktemp("external") / "cifar10-32x32.npz", mu=MU, sigma=SIGMA)


def test_the_file_is_read_with_what_is_known_and_none_for_what_is_not(isotropic):
    found = reference.load(isotropic)
    np.testing.assert_array_equal(found.mean, MU, strict=True)
    np.testing.assert_array_equal(found.covariance, SIGMA, strict=True)
    np.testing.assert_array_equal(found.kept, np.zeros((0, SIZE), np.float32), strict=True)
    unknown = ("count", "source", "data_sha256", "recipe", "image_shape", "weights_hash")
    assert found.provenance == dict.fromkeys(unknown) | {
        "format": 1,
        "origin": "external",
        "file": "cifar10-32x32.npz",
        "sha256": hashlib.sha256(isotropic.read_bytes()).hexdigest(),
        "features": "inception",
        "split": "train",
    }
    assert reference.is_external(found)


def test_read_statistics_can_be_kept_in_a_file_of_ours(isotropic, tmp_path):
    found = reference.load(isotropic)
    reference.save(tmp_path / "stats.npz", found)
    again = reference.load(tmp_path / "stats.npz")
    assert reference.is_external(again)
    assert reference.fingerprint(again) == reference.fingerprint(found)


def test_the_frechet_distance_is_that_of_mu_and_sigma(tmp_path):
    """Generated features vary in three directions: the others add (mu - 1)^2 + sigma of theirs.

    In those three, |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) by scipy's matrix square root.
    """
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((3, 3))
    sigma = SIGMA.copy()
    sigma[:3, :3] = factor @ factor.T
    values = np.ones((40, SIZE))
    values[:, :3] = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 3))
    few, covariance = values[:, :3], np.cov(values[:, :3], rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ sigma[:3, :3]).real
    expected = np.sum((few.mean(0) - MU[:3]) ** 2) + np.sum((1 - MU[3:]) ** 2)
    expected += np.trace(covariance) + np.trace(sigma) - 2 * np.trace(root)
    statistics = reference.load(save(tmp_path / "ref.npz", mu=MU, sigma=sigma))
    found = metrics.compare(features.Features(values), statistics)
    assert list(found) == ["fid40_train"]
    assert found["fid40_train"] == pytest.approx(expected, rel=1e-6)


def test_single_precision_is_read_as_double(tmp_path):
    path = save(tmp_path / "ref.npz", mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32))
    found = reference.load(path)
    np.testing.assert_array_equal(found.mean, MU.astype(np.float32).astype(float), strict=True)
    assert found.covariance.dtype == np.float64


def test_an_asymmetry_of_rounding_is_accepted(tmp_path):
    path = save(tmp_path / "ref.npz", mu=MU, sigma=sigma_with(3, 5, 1e-9))
    assert reference.load(path).covariance[3, 5] == 1e-9


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU[:64], "sigma": SIGMA[:64, :64]}, r"shapes \(64,\) and \(64, 64\).* of 2048"),
        ({"mu": MU, "sigma": SIGMA[:64]}, r"shapes \(2048,\) and \(64, 2048\)"),
        ({"mu": MU[:, None], "sigma": SIGMA}, r"shapes \(2048, 1\) and"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU, "arr_0": MU}, r"it holds \['arr_0', 'mu_s'\]"),
        ({"mu": MU, "sigma": sigma_with(3, 5, 1e-3)}, "not symmetric: it differs by 0.001"),
        ({"mu": MU, "sigma": sigma_with(0, 0, np.nan)}, "sigma .* finite"),
        ({"mu": np.full(SIZE, np.inf), "sigma": SIGMA}, "mu .* finite"),
        ({"mu": np.zeros(SIZE, int), "sigma": SIGMA}, r"mu \(int64\) is not of finite real"),
        ({"mu": np.zeros(SIZE, object), "sigma": SIGMA}, "Object arrays cannot be loaded"),
    ],
)
def test_what_is_not_such_statistics_is_refused(tmp_path, arrays, message):
    path = save(tmp_path / "ref.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        reference.load(path)
    assert str(error.value).startswith(f"{path}: no reference statistics that can be read")


def test_only_what_is_known_of_them_is_checked(isotropic):
    facts = reference.load(isotropic).provenance
    unknown = {"weights_hash": "ab12", "image_shape": [32, 32, 3], "data_sha256": "cd", "count": 5}
    reference.check(facts, unknown | {"features": "inception", "split": "train"}, "ref.npz")
    with pytest.raises(ValueError, match="features is 'inception', expected 'pixels'") as error:
        reference.check(facts, unknown | {"features": "pixels"}, "ref.npz")
    assert "weights_hash" not in str(error.value)
    # Statistics of our own that lack a fact are not excused.
    with pytest.raises(ValueError, match="count is None, expected 5"):
        reference.check(facts | {"origin": "own"}, {"count": 5}, "ref.npz")


@pytest.fixture
def generated(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    (tmp_path / "generated").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "generated" / f"{i:02d}.png")
    return tmp_path / "generated", images


def test_the_fid_command_compares_a_folder_with_them(
    generated, isotropic, inception_weights, monkeypatch, capsys
):
    """numpy's moments of the folder against mu and sigma; the formula is tested above."""
    monkeypatch.setattr(features, "_BATCH", 8)  # compiled for test_fid as well
    compared = []
    monkeypatch.setattr(fid.distances, "frechet", lambda *moments: compared.append(moments) or 12.5)
    folder, images = generated
    assert fid.main([str(folder), str(isotropic), f"--weights={inception_weights}"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert f"{folder}: used 12 of 12" in lines
    assert f"{isotropic}: used unknown images" in lines
    assert [line for line in lines if line.startswith(("fid", "kid"))] == ["fid12_train 12.5"]
    values = features.extractor("inception", weights=str(inception_weights))(images).values
    ((mean, covariance, mu, sigma),) = compared
    np.testing.assert_allclose(mean, values.mean(0, dtype=float), rtol=1e-6)
    expected = np.cov(values.astype(float), rowvar=False)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-6 * expected.max())
    np.testing.assert_array_equal(mu, MU)
    np.testing.assert_array_equal(sigma, SIGMA)


def test_the_fid_command_refuses_them_as_the_generated_side(isotropic, inception_weights, capsys):
    weights = f"--weights={inception_weights}"
    assert fid.main([str(isotropic), str(isotropic), weights]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: the generated side is statistics of an unknown number of images")
    assert err.count("\n") == 1


def test_the_fid_command_refuses_them_for_other_features(generated, isotropic, capsys):
    assert fid.main([str(generated[0]), str(isotropic), "--features=pixels"]) == 2
    assert "features is 'inception', expected 'pixels'" in capsys.readouterr().err
