"""Tiles of large images, photographs that come with a package, and sources joined by +."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import load_dataset
from warm_diffusion.data.sources import open_source


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of one image each, of other sizes: 7x10 and 9x4 (height x width)."""
    images = []
    for name, shape in (("a", (7, 10, 3)), ("b", (9, 4, 3))):
        image = np.random.default_rng(len(images)).integers(0, 256, shape, np.uint8)
        path = tmp_path / "images" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(image).save(path)
        images.append(image)
    return f"folder:{path.parent.parent}", images


def test_tiles_are_the_whole_squares_around_the_centre_row_by_row(load, folder):
    source, (first, second) = folder
    data = load(source, resolution=3, tiles=True)
    # 7x10 has 2 rows of 3 squares and 0 pixels above and left; 9x4 has 3 rows of 1.
    expected = [first[i : i + 3, j : j + 3] for i in (0, 3) for j in (0, 3, 6)]
    expected += [second[i : i + 3, 0:3] for i in (0, 3, 6)]
    np.testing.assert_array_equal(data.images, expected)
    assert data.info["content_sha256"] == hashlib.sha256(np.stack(expected)).hexdigest()


def test_what_does_not_fill_a_tile_is_cut_off_on_both_sides(load, folder):
    source, (first, second) = folder
    data = load(source, resolution=4, tiles=True)
    # 7x10: 1 row, 2 columns: 3 rows left, 1 of them above; 2 columns left, 1 of them on the left.
    expected = [first[1:5, 1:5], first[1:5, 5:9], second[0:4, 0:4], second[4:8, 0:4]]
    np.testing.assert_array_equal(data.images, expected)


def test_a_tile_has_the_class_of_its_image(load, folder):
    source, _ = folder
    data = load(source, resolution=3, tiles=True)
    assert data.labels.tolist() == [0] * 6 + [1] * 3


def test_tiles_are_another_recipe_with_a_cache_of_its_own(load, folder):
    source, _ = folder
    assert len(load(source, resolution=3).images) == 2
    assert len(load(source, resolution=3, tiles=True).images) == 9


def test_images_without_room_for_a_tile_can_be_left_out(load, folder):
    source, (first, _) = folder
    data = load(source, resolution=5, tiles=True, too_small="skip")
    np.testing.assert_array_equal(data.images, [first[1:6, 0:5], first[1:6, 5:10]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": True}, "data.tiles needs the size of a tile: set data.resolution"),
        (
            {"tiles": True, "resolution": 5},
            r"smaller than data.resolution=5, .* 4x9 \(width x height\)",
        ),
        (
            {"tiles": True, "resolution": 3, "too_small": "enlarge"},
            "data.tiles keeps images at their scale: set data.too_small=refuse or skip",
        ),
    ],
)
def test_tiles_without_a_size_or_larger_than_an_image_are_refused(load, folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder[0], **options)


def test_photos_are_scikit_images(load):
    data = pytest.importorskip("skimage").data  # independent: read by that package itself
    photos = open_source("photos")
    assert photos.count() == 10
    names = [photos.name(index) for index in range(10)]
    for name, image in (("astronaut", data.astronaut()), ("chelsea", data.chelsea())):
        index = names.index(f"photos/{name}.png")
        np.testing.assert_array_equal(np.asarray(photos.load(index)[0]), image)
    tiles = load("photos", resolution=128, channels=3, tiles=True).images
    sizes = [photos.load(index)[0].size for index in range(10)]
    assert len(tiles) == sum((width // 128) * (height // 128) for width, height in sizes)


def test_photos_without_scikit_image_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="photos needs scikit-image: pip install scikit-image"):
        open_source("photos")


def test_joined_sources_are_one_after_the_other_as_often_as_they_are_named(load, tmp_path):
    first, second = (np.full((n, 2, 2, 1), n, np.uint8) for n in (3, 2))
    # A + in a file's name does not join.
    np.save(tmp_path / "a+b.npy", first)
    np.save(tmp_path / "c.npy", second)
    one, two = f"npy:{tmp_path / 'a+b.npy'}", f"npy:{tmp_path / 'c.npy'}"
    data = load(f"{one}+{two}+{one}")
    np.testing.assert_array_equal(data.images, np.concatenate([first, second, first]))
    assert data.labels is None
    source = open_source(f"{two}+digits")
    assert [source.name(i) for i in range(3)] == [f"{two}[0]", f"{two}[1]", "digits[0]"]
    assert source.count() == 1799


def test_a_change_in_one_of_the_joined_sources_is_noticed(load, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        np.save(tmp_path / f"{name}.npy", np.full((1, 2, 2, 1), value, np.uint8))
    source = f"npy:{tmp_path / 'a.npy'}+npy:{tmp_path / 'b.npy'}"
    before = load(source)
    np.save(tmp_path / "b.npy", np.full((1, 2, 3, 1), 3, np.uint8)[:, :, :2])
    after = load(source)
    assert before.path != after.path
    assert after.images[:, 0, 0, 0].tolist() == [1, 3]


def test_a_part_that_is_no_source_is_refused_by_name():
    with pytest.raises(ValueError, match=r"data.source must be digits, photos, .* got 'foto'"):
        open_source("foto+digits")
