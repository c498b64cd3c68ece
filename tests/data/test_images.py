"""Pixels in and out."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data.images import from_uint8, grid, save_png, save_pngs, to_uint8


def test_every_byte_survives_the_way_to_float_and_back():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(jnp.asarray(every))), every)


def test_bytes_span_minus_one_to_one():
    np.testing.assert_allclose(from_uint8(np.array([0, 255], np.uint8)), [-1, 1])


def test_values_out_of_range_are_clipped_not_stretched():
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 0.0, 5.0])), [0, 128, 255])


def test_a_grid_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, 1).repeat(3, 2)
    picture = grid(images, columns=3)
    assert picture.shape == (2 + 2 + 2, 3 * 3 + 2 * 2, 1)
    np.testing.assert_array_equal(picture[0, [0, 5, 10], 0], [0, 1, 2])
    np.testing.assert_array_equal(picture[4, [0, 5], 0], [3, 4])
    assert picture[4, 10, 0] == 255


def test_small_images_are_enlarged_by_whole_factors():
    image = np.array([[0, 9], [200, 255]], np.uint8).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(
        grid(image, min_side=3)[..., 0], np.kron(image[0, ..., 0], np.ones((2, 2)))
    )


def test_a_grid_takes_bytes_only():
    with pytest.raises(ValueError, match="expected uint8 images"):
        grid(np.zeros((1, 2, 2, 1), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_bytes(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels), np.uint8)
    save_pngs(tmp_path / "a", images, [7, 12])
    save_png(tmp_path / "one.png", images[0])
    read = np.asarray(Image.open(tmp_path / "a" / "000012.png")).reshape(4, 5, channels)
    np.testing.assert_array_equal(read, images[1])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"000007.png", "000012.png"}
