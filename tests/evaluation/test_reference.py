"""Reference statistics: all images, their origin in the file, refusals."""

import hashlib
import io
import json

import numpy as np
import pytest

from warm_diffusion.evaluation import features, reference

PIXELS = features.extractor("pixels")


def described(images, **changes):
    facts = dict(
        count=len(images), image_shape=images.shape[1:], split="train", source="digits",
        data_sha256="ab12", recipe="centre crop",
    )  # fmt: skip
    return reference.facts(PIXELS, **(facts | changes))


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 3, 1), np.uint8)


def test_statistics_are_of_every_image(monkeypatch):
    """numpy's mean and covariance of all images; their number is no multiple of the chunk."""
    monkeypatch.setattr(reference, "_CHUNK", 16)
    images, told = random_images(53), []
    found = reference.collect(PIXELS, images, described(images), report=told.append)
    values = images.reshape(53, 12).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(found.mean, values.mean(0), atol=1e-7)
    np.testing.assert_allclose(found.covariance, np.cov(values, rowvar=False), atol=1e-6)
    np.testing.assert_allclose(found.kept, values, atol=1e-6)
    assert sum(told) == 53


def test_of_many_images_a_part_from_everywhere_is_kept(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 40)
    monkeypatch.setattr(reference, "_CHUNK", 64)
    images = np.zeros((400, 2, 2, 1), np.uint8)
    images[:] = (np.arange(400) % 256).astype(np.uint8)[:, None, None, None]
    kept = reference.collect(PIXELS, images, described(images)).kept[:, 0]
    rows = reference.kept_rows(400)
    assert len(rows) == len(set(rows)) == len(kept) == 40
    np.testing.assert_allclose(kept, rows % 256 / 127.5 - 1, atol=1e-6)
    # 40 of 400 at random: none of the four quarters is empty but with probability < 1e-4
    assert set(rows // 100) == {0, 1, 2, 3}


def test_another_number_of_images_than_described_is_refused():
    images = random_images(5)
    with pytest.raises(ValueError, match="expected 6 images, got 5"):
        reference.collect(PIXELS, images, described(images, count=6))


def test_a_file_gives_back_what_was_written(tmp_path):
    images = random_images(9)
    written = reference.collect(PIXELS, images, described(images))
    reference.save(tmp_path / "sub" / "stats.npz", written)
    read = reference.load(tmp_path / "sub" / "stats.npz")
    for name in ("mean", "covariance", "kept"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert read.provenance == written.provenance
    assert reference.fingerprint(read) == reference.fingerprint(written)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["stats.npz"]


def test_another_origin_or_other_numbers_have_another_fingerprint():
    images = random_images(9)
    one = reference.collect(PIXELS, images, described(images))
    other = reference.collect(PIXELS, images, described(images, split="test"))
    images[0, 0, 0] ^= 1
    changed = reference.collect(PIXELS, images, described(images))
    assert len({reference.fingerprint(s) for s in (one, other, changed)}) == 3


def _npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


_MOMENTS = dict(mean=np.zeros(2), covariance=np.eye(2), kept=np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK damaged",
        _npz(mu=np.zeros(2048)),
        _npz(**_MOMENTS, provenance=np.array(json.dumps({"format": 1}))),
        _npz(**_MOMENTS, provenance=np.array({"a": "pickled"}, dtype=object)),
        _npz(**_MOMENTS, provenance=np.array("no json")),
        _npz(**(_MOMENTS | {"covariance": np.eye(3)}), provenance=np.array(
            json.dumps(described(random_images(3))))),
    ],
    ids=["empty", "damaged", "half of another's", "no provenance", "pickle", "no json",
         "shapes"],
)  # fmt: skip
def test_a_file_that_is_no_statistics_is_refused_by_name(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"stats\.npz: no reference statistics that can be read"):
        reference.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--mode=fid_stats writes them"):
        reference.load(tmp_path / "gone.npz")


def test_a_file_of_before_external_ones_keeps_its_fingerprint(tmp_path):
    """SHA-256 of provenance, mean and covariance, of a file written here; no fact is added."""
    facts, mean, covariance = described(random_images(3)), np.arange(2.0), 3 * np.eye(2)
    path = tmp_path / "stats.npz"
    moments = {"mean": mean, "covariance": covariance, "kept": np.zeros((3, 2), np.float32)}
    path.write_bytes(_npz(**moments, provenance=np.array(json.dumps(facts))))
    read = reference.load(path)
    hashed = json.dumps(facts, sort_keys=True).encode() + mean.tobytes() + covariance.tobytes()
    assert reference.fingerprint(read) == hashlib.sha256(hashed).hexdigest()
    assert read.provenance == facts
    assert not reference.is_external(read)


def test_every_fact_that_differs_is_named():
    found = described(random_images(3))
    reference.check(found, {"features": "pixels", "split": "train"}, "stats.npz")
    with pytest.raises(ValueError, match="does not fit") as raised:
        reference.check(
            found, {"features": "inception", "recipe": "centre crop", "split": "test"}, "stats.npz"
        )
    message = str(raised.value)
    assert "features is 'pixels', expected 'inception'" in message
    assert "split is 'train', expected 'test'" in message
    assert "recipe" not in message
