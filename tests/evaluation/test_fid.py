"""The command that compares folders and statistics."""

import json

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.evaluation import distances, features, fid, metrics, reference


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
    numbers = {
        line[0]: float(line[1]) for line in lines if len(line) == 2 and line[0][:2] in ("fi", "fd",
                                                                                       "ki", "kd")
    }  # fmt: skip
    return status, numbers, out, err


@pytest.fixture
def sides(tmp_path):
    generated, real = random_images(30), random_images(25, seed=1) // 2
    return write(tmp_path / "generated", generated), write(tmp_path / "real", real), generated, real


def pixel_distance(generated, real):
    """numpy's moments of all images; `distances.frechet` has its own tests against closed forms."""
    one, two = (a.reshape(len(a), -1) / 127.5 - 1 for a in (generated, real))
    return distances.frechet(
        one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False)
    )


def test_distances_from_files_are_those_from_memory(capsys, sides):
    generated, real, generated_images, real_images = sides
    status, numbers, out, err = run(capsys, generated, real, "--features=pixels")
    assert (status, err) == (0, "")
    expected = pixel_distance(generated_images, real_images)
    assert numbers["fd_pixels_30_files"] == pytest.approx(expected, rel=1e-5)
    assert f"{generated}: used 30 of 30" in out
    assert f"{real}: used 25 of 25" in out
    assert "kd_pixels_30_files" in numbers


@pytest.mark.long
def test_fid_from_png_files_is_fid_from_memory(capsys, tmp_path, inception_weights, monkeypatch):
    monkeypatch.setattr(features, "_BATCH", 6)
    generated_images, real_images = random_images(6), random_images(5, seed=1) // 2
    generated = write(tmp_path / "generated", generated_images)
    real = write(tmp_path / "real", real_images)
    weights = f"--weights={inception_weights}"
    status, numbers, _, _ = run(capsys, generated, real, weights)
    assert status == 0
    extract = features.extractor("inception", weights=str(inception_weights))
    statistics = reference.collect(
        extract, real_images, reference.facts(
            extract, count=5, image_shape=(8, 8, 3), split="files", source="", data_sha256="",
            recipe="",
        ),
    )  # fmt: skip
    expected = metrics.compare(extract(generated_images), statistics)
    assert expected["fid6_files"] > 1e-3
    assert numbers["fid6_files"] == pytest.approx(expected["fid6_files"], rel=1e-5)


def test_a_folder_and_its_statistics_are_the_same_side(capsys, sides, tmp_path):
    generated, real, _, real_images = sides
    pixels = features.extractor("pixels")
    facts = reference.facts(
        pixels, count=25, image_shape=(8, 8, 3), split="test", source="", data_sha256="", recipe=""
    )
    reference.save(tmp_path / "real.npz", reference.collect(pixels, real_images, facts))
    _, from_files, _, _ = run(capsys, generated, real, "--features=pixels")
    status, numbers, out, _ = run(capsys, generated, tmp_path / "real.npz", "--features=pixels")
    assert status == 0
    assert numbers["fd_pixels_30_test"] == pytest.approx(from_files["fd_pixels_30_files"], rel=1e-6)
    assert "real.npz: used 25 of 25" in out


def _cut_short(folder):
    content = (folder / "0000.png").read_bytes()
    (folder / "x.png").write_bytes(content[: len(content) // 2])


def _text(folder):
    (folder / "x.txt").write_text("notes")


def _other_size(folder):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / "x.png")


def _other_mode(folder):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "x.png")


def _transparent(folder):
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "x.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_short, "x.png is no readable image"),
        (_text, "x.txt is no readable image"),
        (_other_size, "x.png is RGB 9x8 (width x height), the first image RGB 8x8"),
        (_other_mode, "x.png is L 8x8 (width x height), the first image RGB 8x8"),
        (_transparent, "x.png has mode RGBA, expected L (grey) or RGB"),
    ],
)
def test_a_file_that_does_not_fit_is_named_counted_and_left_out(capsys, sides, spoil, message):
    generated, real, *_ = sides
    _, clean, _, _ = run(capsys, generated, real, "--features=pixels")
    spoil(generated)
    status, numbers, out, err = run(capsys, generated, real, "--features=pixels")
    assert status == 1
    assert message in err
    assert "error: 1 files were left out" in err
    assert "used 30 of 31" in out
    assert numbers == clean


def test_a_sampling_folder_is_compared_without_its_grid(capsys, sides):
    generated, real, *_ = sides
    _, clean, _, _ = run(capsys, generated, real, "--features=pixels")
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(generated / "grid.png")
    (generated / "sampling.json").write_text("{}")
    status, numbers, out, err = run(capsys, generated, real, "--features=pixels")
    assert (status, err) == (0, "")
    assert numbers == clean
    assert "not an image of the set: " + str(generated / "grid.png") in out
    # without --mode=sample's mark a grid is an image that does not fit
    (generated / "sampling.json").unlink()
    assert run(capsys, generated, real, "--features=pixels")[0] == 1


def test_the_result_can_be_had_as_json(capsys, sides, tmp_path):
    generated, real, *_ = sides
    _text(generated)
    path = tmp_path / "result.json"
    _, numbers, _, _ = run(capsys, generated, real, "--features=pixels", f"--json={path}")
    report = json.loads(path.read_text())
    assert report["fd_pixels_30_files"] == pytest.approx(numbers["fd_pixels_30_files"], rel=1e-5)
    assert report["generated"]["used"] == 30
    assert len(report["generated"]["left_out"]) == 1
    assert report["reference"]["provenance"]["features"] == "pixels"


def test_few_images_are_warned_about(capsys, sides):
    assert "warning: 30 images are few" in run(capsys, *sides[:2], "--features=pixels")[2]


def test_grey_images_are_no_fid(capsys, tmp_path, inception_weights):
    folder = write(tmp_path / "grey", random_images(3, (8, 8, 1)))
    status, numbers, _, err = run(capsys, folder, folder, f"--weights={inception_weights}")
    assert (status, numbers) == (2, {})
    assert "got grey ones" in err


def test_images_of_different_sizes_have_no_pixel_distance(capsys, tmp_path):
    """8 x 8 and 4 x 16 have equally many pixels, but not the same ones."""
    one = write(tmp_path / "one", random_images(6, (8, 8, 1)))
    two = write(tmp_path / "two", random_images(6, (4, 16, 1)))
    status, numbers, _, err = run(capsys, one, two, "--features=pixels")
    assert (status, numbers) == (2, {})
    assert "no distance between them" in err


def test_statistics_of_other_features_are_refused(capsys, sides, tmp_path):
    pixels = features.extractor("pixels")
    facts = reference.facts(
        pixels, count=25, image_shape=(8, 8, 3), split="train", source="", data_sha256="", recipe=""
    )
    facts["features"] = "inception"
    reference.save(tmp_path / "real.npz", reference.collect(pixels, sides[3], facts))
    status, numbers, _, err = run(capsys, sides[0], tmp_path / "real.npz", "--features=pixels")
    assert (status, numbers) == (2, {})
    assert "features is 'inception', expected 'pixels'" in err


@pytest.mark.parametrize(
    ("count", "message"), [(0, "0 usable images of 0 files"), (1, "1 usable images of 1 files")]
)
def test_a_folder_without_a_set_in_it_is_refused(capsys, sides, tmp_path, count, message):
    folder = write(tmp_path / "few", random_images(count))
    status, _, _, err = run(capsys, folder, sides[1], "--features=pixels")
    assert status == 2
    assert message in err


def test_a_path_that_is_not_there_is_refused(capsys, sides, tmp_path):
    status, _, _, err = run(capsys, tmp_path / "gone", sides[1], "--features=pixels")
    assert status == 2
    assert len(err.splitlines()) == 1
