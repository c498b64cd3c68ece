"""The cache: the recipe to the bit, tiles, bad images by name, nothing half-written or damaged."""

import errno
import hashlib
import resource
import tempfile

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import cache


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "c").iterdir()]


def generated(count, height, width):
    """Images of integers alone, the same on every machine: a slope, waves, and hard noise."""
    n, i, j, c = np.ogrid[:count, :height, :width, :3]
    waves = (i * i * 3 + j * j * 5 + i * j * (c + 1)) // 64
    noise = ((i * 7919 + j * 104_729 + c * 1_299_709 + n * 15_485_863) % 65_537) % 97
    return ((waves + i * (n + 1) // 4 + 2 * noise + 40 * c) % 256).astype(np.uint8)


def write_array(path, images):
    np.save(path, images)
    return f"npy:{path}"


# --- resizing, by its definition -----------------------------------------------------------------


def weights_of(kernel, support, size_in, size_out):
    """PIL's resampling matrix [size_out, size_in], in units of 2^-22: see its Resample.c.

    The kernel is stretched by the ratio of the sizes (which antialiases), sampled at pixel
    centres, normalised, and rounded to whole numbers, halves away from zero.
    """
    ratio = size_in / size_out
    matrix = np.zeros((size_out, size_in), np.int64)
    for row in range(size_out):
        centre = (row + 0.5) * ratio
        first = max(int(centre - support * ratio + 0.5), 0)
        last = min(int(centre + support * ratio + 0.5), size_in)
        values = np.array([kernel((x - centre + 0.5) / ratio) for x in range(first, last)])
        values = values / values.sum() * 2**22
        matrix[row, first:last] = np.trunc(values + np.copysign(0.5, values))
    return matrix


def shrink(image, kernel, support, size):
    """The recipe: largest centred square, then columns, then rows, each pass rounded to uint8."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side].astype(np.int64)
    matrix = weights_of(kernel, support, side, size)
    for axes in ("pj,ijc->ipc", "pi,ijc->pjc"):
        image = np.clip((np.einsum(axes, matrix, image) + 2**21) >> 22, 0, 255)
    return image.astype(np.uint8)


def lanczos(image, size):
    return shrink(image, lambda x: np.sinc(x) * np.sinc(x / 3) if -3 <= x < 3 else 0.0, 3, size)


def box(image, size):
    return shrink(image, lambda x: float(-0.5 < x <= 0.5), 0.5, size)


# SHA-256 of the prepared bytes of two generated images, from `lanczos` and `box` of this file, not
# from PIL. A PIL whose pixels differ (these hold for 11.0 and 13.0) must come with a new version of
# the recipe, or the same configuration would mean two data sets.
GOLDEN = [
    (45, 62, 17, lanczos, None),
    (62, 45, 17, box, None),
    # ffhq64 from thumbnails, lsun_church128
    (128, 128, 64, lanczos, "9a4fc5aa2faf9ea1377a563597f8ff50de41a1fc639ab93f17386032700c7268"),
    (128, 128, 64, box, "202e04687d6c998cd311caeab42161431e9045d61fcb76fe2982a46095e2547b"),
    (256, 341, 128, lanczos, "891980754d0c7262e721040993e693ed7ce45ba160add89e94d11c2c5e55bac4"),
    (256, 341, 128, box, "3473673816c9dba11412f87e70816572f3213a57ad5ee80cc736c7b593bcc902"),
]


@pytest.mark.parametrize(("height", "width", "resolution", "filter_", "golden"), GOLDEN)
def test_images_are_resized_to_the_bit_and_shipped_recipes_have_golden_hashes(
    load, tmp_path, height, width, resolution, filter_, golden
):
    images = generated(2, height, width)
    digest = hashlib.sha256(b"".join(filter_(image, resolution).tobytes() for image in images))
    assert digest.hexdigest() == (golden or digest.hexdigest())
    source = write_array(tmp_path / "a.npy", images)
    data = load(source, resolution=resolution, resize=filter_.__name__)
    assert data.info["content_sha256"] == digest.hexdigest()


def test_channels_convert_all_images(load, tree, images):
    data = load(f"folder:{tree}", channels=1)
    luma = images.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601, PIL's documented conversion
    np.testing.assert_allclose(data.images[..., 0], luma, atol=1)


# --- tiles ---------------------------------------------------------------------------------------


@pytest.fixture
def two_sizes(tmp_path):
    """Two classes of one image each, of other sizes: 7x10 and 9x4 (height x width)."""
    images = []
    for name, shape in (("a", (7, 10, 3)), ("b", (9, 4, 3))):
        image = np.random.default_rng(len(images)).integers(0, 256, shape, np.uint8)
        path = tmp_path / "images" / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(image).save(path)
        images.append(image)
    return f"folder:{path.parent.parent}", images


def test_tiles_are_the_whole_squares_around_the_centre_row_by_row(load, two_sizes):
    source, (first, second) = two_sizes
    data = load(source, resolution=3, tiles=True)
    # 7x10 has 2 rows of 3 squares and 0 pixels above and left; 9x4 has 3 rows of 1.
    expected = [first[i : i + 3, j : j + 3] for i in (0, 3) for j in (0, 3, 6)]
    expected += [second[i : i + 3, 0:3] for i in (0, 3, 6)]
    np.testing.assert_array_equal(data.images, expected)
    assert data.labels.tolist() == [0] * 6 + [1] * 3
    # 7x10: 1 row, 2 columns: 3 rows left, 1 of them above; 2 columns left, 1 of them on the left.
    expected = [first[1:5, 1:5], first[1:5, 5:9], second[0:4, 0:4], second[4:8, 0:4]]
    np.testing.assert_array_equal(load(source, resolution=4, tiles=True).images, expected)
    skipped = load(source, resolution=5, tiles=True, too_small="skip")
    np.testing.assert_array_equal(skipped.images, [first[1:6, 0:5], first[1:6, 5:10]])
    with pytest.raises(ValueError, match=r"smaller than data.resolution=5, .* 4x9 \(width x"):
        load(source, resolution=5, tiles=True)


# --- options and bad images ----------------------------------------------------------------------


def truncated(images):
    return images[0], slice(None, -60), "x.png: not a readable image"


def grey(images):
    return images[0, ..., 0], slice(None), r"x.png has 1 channel\(s\), but .*0.png has 3"


def another_size(images):
    return images[0, :4, :5], slice(None), r"x.png is 5x4 .*set data.resolution to crop"


def transparent(images):
    rgba = np.concatenate([images[0], images[0, ..., :1]], axis=-1)
    return rgba, slice(None), "x.png has mode RGBA, expected .*set data.channels=1 or 3"


def deep(images):
    return images[0, ..., 0].astype(np.uint16) * 256, slice(None), "mode I;16, .*convert the file"


@pytest.mark.parametrize("damage", [truncated, grey, another_size, transparent, deep])
def test_a_bad_image_is_named_with_a_way_out_and_nothing_stays_in_the_cache(
    load, tmp_path, tree, encoded, images, damage
):
    array, kept, message = damage(images)
    (tree / "class1" / "x.png").write_bytes(encoded(array)[kept])
    with pytest.raises(ValueError, match=message):
        load(f"folder:{tree}")
    assert leftovers(tmp_path) == []


def test_images_smaller_than_the_target_are_refused_left_out_or_enlarged(
    load, tmp_path, tree, encoded, images, capsys
):
    large = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    (tree / "class2" / "6.png").write_bytes(encoded(large[:, :5]))
    (tree / "class0" / "1.png").write_bytes(encoded(large[:3]))
    message = "2 of 9 images are smaller than data.resolution=6, .*1.png, 8x3 .*too_small=skip"
    with pytest.raises(ValueError, match=message):
        load(f"folder:{tree}", resolution=6)
    with pytest.raises(ValueError, match=r"all 9 images of .* are smaller than data.resolution=7"):
        load(f"folder:{tree}", resolution=7, too_small="skip")
    assert leftovers(tmp_path) == []
    data = load(f"folder:{tree}", resolution=6, too_small="skip")
    np.testing.assert_array_equal(data.images, images[[0, 2, 3, 4, 5, 7, 8]])
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1, 1, 2, 2])
    assert "2 of 9 images are smaller" in capsys.readouterr().out
    # By a whole factor the box filter repeats pixels.
    source = write_array(tmp_path / "a.npy", images)
    data = load(source, resolution=12, resize="box", too_small="enlarge")
    np.testing.assert_array_equal(data.images, images.repeat(2, axis=1).repeat(2, axis=2))


# --- the cache -----------------------------------------------------------------------------------


def test_a_second_start_reads_the_cache_and_not_the_source(load, tree, images, monkeypatch):
    first = load(f"folder:{tree}")
    assert first.info["content_sha256"] == hashlib.sha256(images).hexdigest()
    assert isinstance(first.images, np.memmap)
    monkeypatch.setattr(cache, "_prepare", None)
    cache._open.cache_clear()  # as a new process has it
    second = load(f"folder:{tree}")
    assert second.path == first.path
    np.testing.assert_array_equal(second.images, images)


def test_another_recipe_or_a_changed_source_gets_a_cache_of_its_own(load, tree, encoded, images):
    options = ({}, {"resolution": 3}, {"resolution": 3, "resize": "box"}, {"channels": 1})
    options = (*options, {"resolution": 3, "tiles": True})
    paths = {load(f"folder:{tree}", **each).path for each in options}
    assert len(paths) == 5
    (tree / "class2" / "8.png").write_bytes(encoded(images[0]))
    changed = load(f"folder:{tree}")
    assert changed.path not in paths
    np.testing.assert_array_equal(changed.images[8], images[0])


def flipped_pixels(path):
    with (path / "images.npy").open("r+b") as file:
        file.seek(-500, 2)
        file.write(bytes(500))


def flipped_labels(path):
    np.save(path / "labels.npy", np.zeros(9, np.int32))


def a_list(path):
    (path / "dataset.json").write_text("[]")


@pytest.mark.parametrize("damage", [flipped_pixels, flipped_labels, a_list])
def test_a_damaged_cache_is_named_with_a_way_out(load, tree, damage):
    path = load(f"folder:{tree}").path
    cache._open.cache_clear()  # as a new process has it
    damage(path)
    with pytest.raises(ValueError, match=r"is damaged .*delete that folder"):
        load(f"folder:{tree}")


def test_a_cache_folder_that_cannot_be_made_is_named_with_its_key(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file/c: Not a directory; set data\.cache_dir"):
        cache.load_dataset("digits", cache_dir=str(tmp_path / "file" / "c"))


def test_a_cache_folder_that_may_not_be_written_is_named_with_its_key(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"Permission denied; set data\.cache_dir"):
        cache.load_dataset("digits", cache_dir=str(tmp_path / "c"))


def test_a_cache_that_cannot_be_read_now_is_not_called_damaged(load, tree, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error", "images.npy")

    load(f"folder:{tree}")
    cache._open.cache_clear()
    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(OSError, match=r"Input/output error: 'images\.npy'"):
        load(f"folder:{tree}")


def test_a_full_disk_ends_preparing_by_an_error_and_leaves_nothing(tmp_path, images, load):
    """Not by SIGBUS, as a memory-mapped array would; files may not grow for a moment."""
    source = write_array(tmp_path / "a.npy", images.repeat(100, axis=0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            load(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(tmp_path) == []
