"""Sources and cache: the same images from every source, errors by name, nothing half-written."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import load_dataset
from warm_diffusion.data.sources import open_source
from warm_diffusion.runtime import storage


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def images():
    """Nine images 6x6 in three classes: [9, 6, 6, 3]."""
    return np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), np.uint8)


@pytest.fixture
def tree(tmp_path, images):
    folder = tmp_path / "images"
    for index, image in enumerate(images):
        path = folder / f"class{index // 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"not an image either")
    return folder


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "c").iterdir()]


def make_zip(path, tree, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*.png")):
            archive.write(file, prefix + str(file.relative_to(tree)))
    return path


# --- reading ------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_spread_over_0_to_255(load):
    from sklearn.datasets import load_digits  # independent: the package's own arrays

    digits = load_digits()
    data = load("digits")
    assert data.images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(data.images[..., 0] * (16 / 255), digits.images, atol=0.04)
    np.testing.assert_array_equal(data.labels, digits.target)


def test_folder_zip_and_npy_of_the_same_images_give_the_same_arrays(load, tmp_path, tree, images):
    np.save(tmp_path / "images.npy", images)
    zipped = make_zip(tmp_path / "images.zip", tree)
    for source in (f"folder:{tree}", f"zip:{zipped}", f"npy:{tmp_path / 'images.npy'}"):
        data = load(source)
        np.testing.assert_array_equal(data.images, images)
        assert isinstance(data.images, np.memmap)


def test_zip_and_npy_files_may_lie_on_gs(load, store, tmp_path, tree, images):
    np.save(tmp_path / "images.npy", images)
    make_zip(tmp_path / "images.zip", tree)
    for name in ("images.npy", "images.zip"):
        source = f"{name[-3:]}:gs://bucket/sources/{name}"
        storage.write_bytes(f"gs://bucket/sources/{name}", (tmp_path / name).read_bytes())
        np.testing.assert_array_equal(load(source).images, images)
        assert load(source).info["source"] == source
    np.save(tmp_path / "other.npy", images[::-1])
    storage.write_bytes("gs://bucket/sources/images.npy", (tmp_path / "other.npy").read_bytes())
    np.testing.assert_array_equal(load("npy:gs://bucket/sources/images.npy").images, images[::-1])


@pytest.mark.parametrize("kind", ["folder"])
def test_folders_on_gs_are_refused(load, store, kind):
    with pytest.raises(ValueError, match=f"{kind}:DIR must be a local path, got gs://bucket/x"):
        load(f"{kind}:gs://bucket/x")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_subfolders_are_class_labels(load, tmp_path, tree, kind):
    source = tree if kind == "folder" else make_zip(tmp_path / "images.zip", tree)
    data = load(f"{kind}:{source}")
    np.testing.assert_array_equal(data.labels, np.repeat([0, 1, 2], 3))
    assert data.info["class_names"] == ["class0", "class1", "class2"]


def test_an_image_outside_any_subfolder_means_no_labels(load, tree, images):
    (tree / "zz.png").write_bytes(png(images[0]))
    data = load(f"folder:{tree}")
    assert data.labels is None
    assert len(data.images) == 10


def test_tensorflow_datasets_are_read_without_tensorflow(load, tmp_path, images):
    tfds = pytest.importorskip("tensorflow_datasets")
    from etils import epath

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(tmp_path)

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(6, 6, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(0, 9), "test": self._generate_examples(0, 4)}

        def _generate_examples(self, first, last):
            for index in range(first, last):
                yield index, {"image": io.BytesIO(png(images[index])), "label": index // 3}

    builder = TinyImages(data_dir=tmp_path / "tfds", file_format="array_record")
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=offline)
    data = load("tfds:tiny_images", data_dir=str(tmp_path / "tfds"))
    # tfds shuffles when it prepares: the same set of (image, label)
    expected = sorted((image.tobytes(), i // 3) for i, image in enumerate(images))
    got = sorted((im.tobytes(), int(k)) for im, k in zip(data.images, data.labels, strict=True))
    assert got == expected
    assert len(load("tfds:tiny_images:test", data_dir=str(tmp_path / "tfds")).images) == 4


def test_a_set_that_is_not_prepared_is_refused_at_once_and_not_downloaded(load, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match=r"not prepared in array_record.*--download"):
        load("tfds:cifar10", data_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no data set is called 'cifar1O'"):
        load("tfds:cifar1O", data_dir=str(tmp_path / "none"))


# --- the resize recipe --------------------------------------------------------------------------


def test_resizing_crops_the_centre_then_averages_areas(load, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (12, 8, 3), np.uint8)
    np.save(tmp_path / "a.npy", image[None])
    data = load(f"npy:{tmp_path / 'a.npy'}", resolution=4, resize="box")
    # rows 2..9 are the centred square; a box filter to half the size is the mean of 2x2 pixels
    mean = image[2:10].astype(float).reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(data.images[0], mean, atol=1.0)  # two passes, each rounded


def test_lanczos_is_the_default_and_antialiases(load, tmp_path):
    # Stripes one pixel wide average to grey; without antialiasing they would stay black or white.
    stripes = np.zeros((1, 32, 32), np.uint8)
    stripes[:, ::2] = 255
    np.save(tmp_path / "a.npy", stripes)
    data = load(f"npy:{tmp_path / 'a.npy'}", resolution=8)
    assert np.all(np.abs(data.images[0, 2:-2].astype(int) - 127) < 16)
    assert "lanczos" in data.info["resize"]


def test_an_image_of_the_right_size_is_left_as_it_is(load, tree, images):
    np.testing.assert_array_equal(load(f"folder:{tree}", resolution=6).images, images)


def test_channels_convert_all_images(load, tree, images):
    data = load(f"folder:{tree}", channels=1)
    luma = images.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601, PIL's documented conversion
    np.testing.assert_allclose(data.images[..., 0], luma, atol=1)


# --- bad input ----------------------------------------------------------------------------------


def truncated(tree, images):
    path = tree / "class1" / "broken.png"
    path.write_bytes(png(images[0])[:-60])
    return "broken.png: not a readable image"


def wrong_channels(tree, images):
    (tree / "class1" / "grey.png").write_bytes(png(images[0, ..., 0]))
    return r"grey.png has 1 channel\(s\), but .*0.png has 3; set data.channels=1 or 3"


def wrong_size(tree, images):
    (tree / "class1" / "small.png").write_bytes(png(images[0, :4, :5]))
    return r"small.png is 5x4 .*set data.resolution to crop and resize"


def transparent(tree, images):
    rgba = np.concatenate([images[0], images[0, ..., :1]], axis=-1)
    (tree / "class1" / "clear.png").write_bytes(png(rgba))
    return "clear.png has mode RGBA, expected .*set data.channels=1 or 3"


def deep(tree, images):
    (tree / "class1" / "deep.png").write_bytes(png(images[0, ..., 0].astype(np.uint16) * 256))
    return "deep.png has mode I;16, expected .*convert the file"


@pytest.mark.parametrize("damage", [truncated, wrong_channels, wrong_size, transparent, deep])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_bad_image_is_named_with_a_way_out_and_nothing_stays_in_the_cache(
    load, tmp_path, tree, images, damage, kind
):
    message = damage(tree, images)
    source = tree if kind == "folder" else make_zip(tmp_path / "images.zip", tree)
    with pytest.raises(ValueError, match=message):
        load(f"{kind}:{source}")
    assert leftovers(tmp_path) == []


def test_images_smaller_than_the_target_are_counted_and_refused(load, tmp_path, tree, images):
    (tree / "class0" / "0.png").write_bytes(png(np.zeros((9, 8, 3), np.uint8)))
    message = "8 of 9 images are smaller than data.resolution=7, .*1.png, 6x6 .*too_small=skip"
    with pytest.raises(ValueError, match=message):
        load(f"folder:{tree}", resolution=7)
    assert leftovers(tmp_path) == []


def test_images_smaller_than_the_target_are_left_out_if_asked(load, tree, images, capsys):
    large = np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)
    (tree / "class2" / "6.png").write_bytes(png(large[:, :5]))
    (tree / "class0" / "1.png").write_bytes(png(large[:3]))
    data = load(f"folder:{tree}", resolution=6, too_small="skip")
    np.testing.assert_array_equal(data.images, images[[0, 2, 3, 4, 5, 7, 8]])
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1, 1, 2, 2])
    assert data.info["count"] == 7
    assert "2 of 9 images are smaller" in capsys.readouterr().out


def test_images_smaller_than_the_target_are_enlarged_if_asked(load, tmp_path, images):
    """By a whole factor the box filter repeats pixels."""
    np.save(tmp_path / "a.npy", images)
    data = load(f"npy:{tmp_path}/a.npy", resolution=12, resize="box", too_small="enlarge")
    np.testing.assert_array_equal(data.images, images.repeat(2, axis=1).repeat(2, axis=2))


def test_where_all_images_are_too_small_none_is_left(load, tmp_path, tree):
    with pytest.raises(ValueError, match=r"all 9 images of .* are smaller than data.resolution=7"):
        load(f"folder:{tree}", resolution=7, too_small="skip")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "data.source must be digits, photos, folder:DIR"),
        ("folder:", "data.source must be"),
        ("folder:/nowhere/at/all", "there is no folder"),
        ("npy:/nowhere.npy", "there is no file"),
    ],
)
def test_an_unknown_source_is_refused(load, source, message):
    with pytest.raises(ValueError, match=message):
        load(source)


def test_an_empty_folder_is_refused(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in it"):
        load(f"folder:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"expected uint8 .* got float32 \(2, 4, 4, 3\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no image in it"),
    ],
)
def test_an_array_of_the_wrong_kind_is_refused(load, tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        load(f"npy:{tmp_path / 'a.npy'}")


def test_a_pickle_in_an_npy_file_is_never_loaded(load, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "a.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        load(f"npy:{tmp_path / 'a.npy'}")
    assert not (tmp_path / "exploded").exists()


def test_zip_members_are_read_and_never_written_to_their_paths(load, tmp_path, images):
    path = tmp_path / "sub" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.png", png(images[0]))
        archive.writestr("/tmp_evil/evil.png", png(images[1]))
    assert len(load(f"zip:{path}").images) == 2
    assert not list(tmp_path.rglob("evil.png"))


def test_a_damaged_zip_member_is_named(load, tmp_path, tree):
    path = make_zip(tmp_path / "images.zip", tree)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF  # stored, not compressed: its CRC no longer fits
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images.zip:class0/0.png: .*archive"):
        load(f"zip:{path}")


def test_a_file_that_is_no_zip_is_refused(load, tmp_path):
    (tmp_path / "a.zip").write_text("hello")
    with pytest.raises(ValueError, match="not a zip file"):
        load(f"zip:{tmp_path / 'a.zip'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "cubic"}, "data.resize must be one of lanczos, box"),
        ({"channels": 2}, "data.channels must be"),
        ({"resolution": -1}, "data.resolution must be"),
    ],
)
def test_bad_options_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load("digits", **options)


# --- the cache ----------------------------------------------------------------------------------


def test_a_second_start_reads_the_cache_and_not_the_source(load, tree):
    first = load(f"folder:{tree}")
    before = (first.path / "images.npy").stat().st_mtime_ns
    second = load(f"folder:{tree}")
    assert second.path == first.path
    assert (second.path / "images.npy").stat().st_mtime_ns == before


def test_another_recipe_or_a_changed_source_gets_a_cache_of_its_own(load, tree, images):
    paths = {load(f"folder:{tree}").path, load(f"folder:{tree}", resolution=3).path}
    paths.add(load(f"folder:{tree}", resolution=3, resize="box").path)
    paths.add(load(f"folder:{tree}", channels=1).path)
    (tree / "class2" / "8.png").write_bytes(png(images[0]))
    changed = load(f"folder:{tree}")
    assert changed.path not in paths
    assert len(paths) == 4
    np.testing.assert_array_equal(changed.images[8], images[0])


def test_the_content_hash_is_that_of_the_images(load, tree, images):
    import hashlib

    assert load(f"folder:{tree}").info["content_sha256"] == hashlib.sha256(images).hexdigest()


def test_a_damaged_cache_is_named_with_a_way_out(load, tree):
    path = load(f"folder:{tree}").path
    info = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**info, "shape": [1, 2, 3, 4]}))
    with pytest.raises(ValueError, match=r"is damaged .*delete that folder"):
        load(f"folder:{tree}")


def test_a_source_decodes_any_image_alone(tree, images):
    source = open_source(f"folder:{tree}")
    image, label = source.load(7)
    np.testing.assert_array_equal(image, images[7])
    assert label == 2


def test_cifar10_as_jpeg_is_read_whole(load, tmp_path, shared_folder):
    """Real input: 10,000 JPEG files in ten class folders; sizes from the data set's own README."""
    import tarfile

    with tarfile.open(shared_folder / "data" / "cifar10_jpeg.tar.xz") as archive:
        members = [m for m in archive if m.name.lstrip("./").startswith("test/")]
        archive.extractall(tmp_path, members, filter="data")
    data = load(f"folder:{tmp_path / 'test'}")
    assert data.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(10, 1000))
    assert data.info["class_names"][0] == "airplane"
    first = sorted((tmp_path / "test" / "airplane").iterdir())[0]
    np.testing.assert_array_equal(data.images[0], np.asarray(Image.open(first)))
