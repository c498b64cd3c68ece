"""Reference statistics: all images, their origin in the file, other projects' files, refusals."""

import hashlib
import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from warm_diffusion.evaluation import features, reference

PIXELS = features.extractor("pixels")
SIZE = 2048
MU, SIGMA = np.linspace(-1, 1, SIZE), 0.25 * np.eye(SIZE)


def described(images, **changes):
    info = {"source": "digits", "content_sha256": "ab12", "resize": "centre crop"}
    return reference.facts(PIXELS, images, info, "train") | changes


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 3, 1), np.uint8)


def collect(images, batch=16, **changes):
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    return reference.collect(PIXELS, batches, described(images, **changes))


def test_statistics_are_of_every_image():
    """numpy's mean and covariance of all images; their number is no multiple of the batch."""
    images = random_images(53)
    found = collect(images)
    values = images.reshape(53, 12).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-7)
    np.testing.assert_allclose(found.covariance, np.cov(values, rowvar=False), atol=1e-6)
    np.testing.assert_allclose(found.kept, values, atol=1e-6)


def test_of_many_images_a_part_from_everywhere_is_kept(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 40)
    images = np.zeros((256, 2, 2, 1), np.uint8)
    images[:] = np.arange(256, dtype=np.uint8)[:, None, None, None]
    kept = collect(images, 64).kept[:, 0]
    rows = np.rint((kept + 1) * 127.5)
    assert len(set(rows)) == len(kept) == 40
    # 40 of 256 at random: none of the four quarters is empty but with probability < 1e-4
    assert set(rows // 64) == {0, 1, 2, 3}


def test_another_number_of_images_than_described_is_refused():
    with pytest.raises(ValueError, match="expected 6 images, got 5"):
        collect(random_images(5), count=6)


def test_a_file_gives_back_what_was_written(tmp_path):
    written = collect(random_images(9))
    reference.save(tmp_path / "sub" / "stats.npz", written)
    read = reference.load(tmp_path / "sub" / "stats.npz")
    for name in ("mean", "covariance", "kept"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert read.provenance == written.provenance
    assert reference.fingerprint(read) == reference.fingerprint(written)
    assert reference.warning(read.provenance) == ""


def test_another_origin_or_other_numbers_have_another_fingerprint():
    images = random_images(9)
    sets = [collect(images), collect(images, split="test"), collect(images ^ 1)]
    assert len({reference.fingerprint(found) for found in sets}) == 3


def _npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


_MOMENTS = {"mean": np.zeros(2), "covariance": np.eye(2), "kept": np.zeros((3, 2), np.float32)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        _npz(**_MOMENTS)[:-30],
        _npz(mu=np.zeros(2)),
        _npz(**_MOMENTS),
        _npz(**_MOMENTS, provenance=np.array({"a": object}, dtype=object)),
        _npz(**_MOMENTS, provenance=np.array("{}")),
        _npz(**(_MOMENTS | {"covariance": np.eye(3)}), provenance=np.array(
            json.dumps(described(random_images(3))))),
    ],
    ids=["empty", "damaged", "half of another's", "no provenance", "pickle", "no json", "shapes"],
)  # fmt: skip
def test_a_file_that_is_no_statistics_is_refused_by_name(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"stats\.npz: no reference statistics that can be read"):
        reference.load(path)


def test_every_fact_that_differs_is_named():
    found = described(random_images(3))
    reference.check(found, {"features": "pixels", "split": "train"}, "stats.npz")
    with pytest.raises(ValueError, match="does not fit") as raised:
        reference.check(
            found, {"features": "inception", "recipe": "centre crop", "split": "test"}, "stats.npz"
        )
    assert "features is 'pixels', expected 'inception'" in str(raised.value)
    assert "split is 'train', expected 'test'" in str(raised.value)
    assert "recipe" not in str(raised.value)


# --- other projects' files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    """Arrays like those of ADM's VIRTUAL_*.npz; EDM's have mu and sigma alone, both float64."""
    path = tmp_path_factory.mktemp("external") / "VIRTUAL_set64.npz"
    np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8), mu=MU, sigma=SIGMA, mu_s=MU)
    return path


def test_mu_and_sigma_are_read_with_what_is_known_and_none_for_what_is_not(external):
    found = reference.load(external)
    np.testing.assert_array_equal(found.mean, MU, strict=True)
    np.testing.assert_array_equal(found.covariance, SIGMA, strict=True)
    np.testing.assert_array_equal(found.kept, np.zeros((0, SIZE), np.float32), strict=True)
    unknown = ("count", "source", "data_sha256", "recipe", "image_shape", "weights_hash")
    assert found.provenance == dict.fromkeys(unknown) | {
        "format": 1,
        "origin": "external",
        "file": "VIRTUAL_set64.npz",
        "sha256": hashlib.sha256(external.read_bytes()).hexdigest(),
        "features": "inception",
        "split": "train",
    }


def test_of_other_projects_files_only_edms_pass_without_a_warning(external, monkeypatch):
    facts = reference.load(external).provenance
    assert "pytorch-fid or clean-fid" in reference.warning(facts)
    monkeypatch.setitem(reference._EDM, facts["sha256"], "a set")
    assert reference.warning(facts) == ""


def test_only_what_is_known_of_them_is_checked(external):
    facts = reference.load(external).provenance
    unknown = {"weights_hash": "ab12", "image_shape": [32, 32, 3], "data_sha256": "cd", "count": 5}
    reference.check(facts, unknown | {"features": "inception", "split": "train"}, "ref.npz")
    with pytest.raises(ValueError, match="features is 'inception', expected 'pixels'"):
        reference.check(facts, unknown | {"features": "pixels"}, "ref.npz")
    # Statistics of our own that lack a fact are not excused.
    with pytest.raises(ValueError, match="count is None, expected 5"):
        reference.check(facts | {"origin": "own"}, {"count": 5}, "ref.npz")


def _sigma_with(row, column, value):
    sigma = SIGMA.copy()
    sigma[row, column] = value
    return sigma


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (MU[:64], SIGMA[:64, :64], r"shapes \(64,\) and \(64, 64\).* of 2048"),
        (MU, _sigma_with(3, 5, 1e-3), "not symmetric: it differs by 0.001"),
        (MU, _sigma_with(0, 0, np.nan), "sigma .* finite"),
        (np.zeros(SIZE, object), SIGMA, "Object arrays cannot be loaded"),
    ],
)
def test_what_is_not_such_statistics_is_refused(tmp_path, mu, sigma, message):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=message):
        reference.load(path)


def _archive(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "/", 1) + ".pkl", data)
    return content.getvalue()


def _samples():
    content = io.BytesIO()
    np.savez(content, np.zeros((2, 4, 4, 3), np.uint8))
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}), "it is a pickle, as EDM2's"),
        (_archive(archive_data=b""), "it is torch's file, such as a cache of torch-fidelity's"),
        (_samples(), "it holds images, not statistics"),
    ],
)
def test_what_people_give_in_place_of_statistics_is_named(tmp_path, content, message):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        reference.load(path)
    assert "allow_pickle" not in str(caught.value)
