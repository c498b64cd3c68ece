"""The command that compares folders and statistics."""

import json

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.app import fid
from warm_diffusion.evaluation import distances, features, reference

PIXELS = features.extractor("pixels")


def random_images(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def write(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            folder / f"{i:04d}.png"
        )
    return folder


def run(capsys, *arguments):
    """(exit status, metric -> value, stdout, stderr)."""
    status = fid.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    numbers = {line[0]: float(line[1]) for line in lines if len(line) == 2}
    return status, numbers, out, err


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def sides(tmp_path):
    generated, real = random_images(30), random_images(25, seed=1) // 2
    return write(tmp_path / "generated", generated), write(tmp_path / "real", real), generated, real


def statistics(path, images, split="test"):
    info = dict.fromkeys(("source", "content_sha256", "resize"), "")
    facts = reference.facts(PIXELS, images, info, split)
    reference.save(path, reference.collect(PIXELS, [images], facts))
    return path


def test_distances_from_files_are_those_of_the_pixels(capsys, sides, tmp_path):
    """numpy's moments of all images; `distances.frechet` has its own tests against closed forms."""
    generated, real, *images = sides
    (generated / "sampling.json").write_text("{}")  # as --mode=sample leaves its folder
    status, numbers, out, err = run(
        capsys, generated, real, "--features=pixels", f"--json={tmp_path / 'result.json'}"
    )
    assert (status, err) == (0, "")
    one, two = (a.reshape(len(a), -1) / 127.5 - 1 for a in images)
    expected = distances.frechet(
        one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False)
    )
    assert numbers["fd_pixels_30_files"] == pytest.approx(expected, rel=1e-5)
    assert "kd_pixels_30_files" in numbers
    assert f"30 images of {generated}" in out
    assert "warning   30 samples are few" in out
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["fd_pixels_30_files"] == pytest.approx(expected, rel=1e-5)
    assert report["reference"]["features"] == "pixels"


def test_a_folder_and_its_statistics_are_the_same_side(capsys, sides, tmp_path):
    generated, real, generated_images, real_images = sides
    two = statistics(tmp_path / "real.npz", real_images)
    _, from_files, _, _ = run(capsys, generated, real, "--features=pixels")
    _, mixed, _, _ = run(capsys, generated, two, "--features=pixels")
    one = statistics(tmp_path / "generated.npz", generated_images)
    _, stored, _, _ = run(capsys, one, two)
    expected = pytest.approx(from_files["fd_pixels_30_files"], rel=1e-6)
    assert (mixed["fd_pixels_30_test"], stored["fd_pixels_30_test"]) == (expected, expected)


@pytest.mark.long
def test_inceptions_distance_to_mu_and_sigma_of_another_project(
    capsys, tmp_path, inception_weights, monkeypatch
):
    """numpy's moments of the folder; the moments of the reference are read as they are."""
    monkeypatch.setattr(features, "_BATCH", 6)
    images = random_images(6, (32, 32, 3))  # compiled for the golden test as well
    folder = write(tmp_path / "generated", images)
    mu, sigma = np.linspace(-1, 1, 2048), 0.25 * np.eye(2048)
    np.savez(tmp_path / "other.npz", mu=mu, sigma=sigma, mu_s=mu)
    weights = f"--weights={inception_weights}"
    status, numbers, out, _ = run(capsys, folder, tmp_path / "other.npz", weights)
    assert status == 0
    assert "reference unknown images of" in out
    assert "other.npz is none of EDM's files that are known" in out
    values = features.extractor("inception", weights=str(inception_weights))(images).astype(float)
    # tr sqrt(S / 4) over the five eigenvalues of six images, from their Gram matrix
    centred = (values - values.mean(0)) / np.sqrt(5)
    expected = np.sum((values.mean(0) - mu) ** 2) + np.sum(centred**2) + 2048 / 4
    expected -= np.sqrt(np.maximum(np.linalg.eigvalsh(centred @ centred.T), 0)).sum()
    assert numbers == {"fid6_train": pytest.approx(expected, rel=1e-4)}
    status, _, _, err = run(capsys, tmp_path / "other.npz", tmp_path / "other.npz")
    assert status == 2
    assert "holds statistics of an unknown number of images" in err


def _other_size(folder):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / "x.png")


def _one_is_left(folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def _grey(folder):
    for path in folder.iterdir():
        Image.open(path).convert("L").save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_size, "x.png is 9x8 (width x height)"),
        (_one_is_left, "at least 2 examples"),
        (_grey, "image_shape is [8, 8, 3], expected [8, 8, 1]"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_in_one_line(capsys, sides, spoil, message):
    spoil(sides[0])
    status, numbers, _, err = run(capsys, *sides[:2], "--features=pixels")
    assert (status, numbers) == (2, {})
    assert message in err
    assert len(err.splitlines()) == 1
