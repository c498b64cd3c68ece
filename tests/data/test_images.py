"""Pixels in and out."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data.images import decode, from_uint8, grid, save_png, save_pngs, to_uint8


def test_every_byte_survives_the_way_to_float_and_back():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(jnp.asarray(every))), every)


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


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_bytes(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels), np.uint8)
    save_pngs(tmp_path / "a", images, [7, 12])
    save_png(tmp_path / "one.png", images[0])
    read = np.asarray(Image.open(tmp_path / "a" / "000012.png")).reshape(4, 5, channels)
    np.testing.assert_array_equal(read, images[1])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"000007.png", "000012.png"}


# --- image files ---------------------------------------------------------------------------------

# What a viewer shows for each EXIF orientation, by its definition: where row 0 and column 0 of the
# stored pixels are (top left, top right, bottom right, bottom left; then the same transposed).
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
STORED = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_as_its_exif_orientation_says(encoded, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(io.BytesIO(encoded(STORED, exif=exif)), "x")
    np.testing.assert_array_equal(image, TURNED[orientation](STORED))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "JPEG"])
def test_a_format_is_known_by_its_content(encoded, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = np.asarray(decode(io.BytesIO(encoded(STORED, kind, **options)), "x"))
    assert image.shape == STORED.shape
    if kind != "JPEG":
        np.testing.assert_array_equal(image, STORED)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b""])
def test_what_is_no_image_is_refused_and_postscript_is_not_run(content):
    with pytest.raises(ValueError, match=r"x\.png: not a readable image \(none of PNG, JPEG"):
        decode(io.BytesIO(content), "x.png")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("exif", [
    b"Exif\x00\x00garbage",
    # XResolution as text; an orientation of 9, which does not exist
    b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x1a\x00\x02\x00\x00\x00\x04abc\x00\x00\x00\x00\x00",
    b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x09\x00\x00\x00\x00\x00\x00",
])  # fmt: skip
def test_broken_metadata_does_not_make_a_sound_image_unreadable(encoded, kind, exif):
    content = encoded(STORED, kind) if kind == "TIFF" else encoded(STORED, kind, exif=exif)
    if kind == "TIFF":  # its metadata are those tags themselves: break the resolution's type
        content = content.replace(b"\x1a\x01\x05\x00", b"\x1a\x01\x02\x00")
    assert decode(io.BytesIO(content), "x").size == (5, 4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_several_frames_are_refused(encoded, kind):
    more = [Image.fromarray(STORED[::-1])]
    content = encoded(STORED, kind, save_all=True, append_images=more)
    with pytest.raises(ValueError, match="x: holds 2 frames or pages, expected one"):
        decode(io.BytesIO(content), "x")
