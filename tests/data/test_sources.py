"""Sources: the same images and the right classes from every layout; errors by name."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import files
from warm_diffusion.data.cifar10 import _CLASSES
from warm_diffusion.data.sources import open_source
from warm_diffusion.runtime import storage

PIXEL = np.zeros((4, 4), np.uint8)


def write_tree(root, content):
    for name, value in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    return f"folder:{root}"


def write_zip(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return f"zip:{path}"


def write_tar(path, content, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    return f"tar:{path}"


def trees(tmp_path, content):
    """The same files as a folder, a zip file and a tar file."""
    yield write_tree(tmp_path / "tree", content)
    yield write_zip(tmp_path / "tree.zip", content)
    yield write_tar(tmp_path / "tree.tar", content)


# --- the same images from everywhere -------------------------------------------------------------


def test_digits_are_scikit_learns_spread_over_0_to_255(load):
    from sklearn.datasets import load_digits  # independent: the package's own arrays

    digits = load_digits()
    data = load("digits")
    assert data.images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(data.images[..., 0] * (16 / 255), digits.images, atol=0.04)
    np.testing.assert_array_equal(data.labels, digits.target)


def test_trees_and_arrays_of_the_same_images_give_the_same_arrays(load, tmp_path, encoded, images):
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(9)[:, None] % 4)
    np.savez(tmp_path / "b.npz", images)
    arrays = [f"npy:{tmp_path / 'a.npy'}", f"npz:{tmp_path / 'a.npz'}", f"npz:{tmp_path / 'b.npz'}"]
    content = {f"{index}.png": encoded(image) for index, image in enumerate(images)}
    for source in (*arrays, *trees(tmp_path, content)):
        data = load(source)
        np.testing.assert_array_equal(data.images, images)
        assert (data.labels is not None) == ("a.npz" in source)
    np.testing.assert_array_equal(load(arrays[1]).labels, np.arange(9) % 4)


def test_archives_and_arrays_may_lie_on_gs_and_folders_may_not(load, store, tmp_path, images):
    for version in (images, images[::-1]):
        np.save(tmp_path / "a.npy", version)
        storage.write_bytes("gs://bucket/sources/a.npy", (tmp_path / "a.npy").read_bytes())
        np.testing.assert_array_equal(load("npy:gs://bucket/sources/a.npy").images, version)
    with pytest.raises(ValueError, match="folder:DIR must be a local path, got gs://bucket/x"):
        load("folder:gs://bucket/x")


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
    np.save(tmp_path / "c.npy", second + 1)
    assert load(f"{one}+{two}+{one}").images[3:5].max() == 3  # a change in one part is noticed


@pytest.mark.long
def test_cifar10_as_jpeg_is_read_whole(load, tmp_path, shared_folder):
    """Real input: 10,000 JPEG files in ten class folders; sizes from the data set's own README."""
    with tarfile.open(shared_folder / "data" / "cifar10_jpeg.tar.xz") as archive:
        members = [m for m in archive if m.name.lstrip("./").startswith("test/")]
        archive.extractall(tmp_path, members, filter="data")
    data = load(f"folder:{tmp_path / 'test'}")
    assert data.images.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(data.labels), np.full(10, 1000))
    assert data.info["class_names"] == list(_CLASSES)
    first = sorted((tmp_path / "test" / "airplane").iterdir())[0]
    np.testing.assert_array_equal(data.images[0], np.asarray(Image.open(first)))


# --- classes -------------------------------------------------------------------------------------


def listing(labels):
    return json.dumps({"labels": labels}).encode()


# files besides images -> the labels of the images in the order of their names, the classes' names
LAYOUTS = {
    "flat": (["a.png", "b.png"], {}, None, []),
    "class folders": (["a/0.png", "b/0.jpg", "b/x/1.PNG"], {}, [0, 1, 1], ["a", "b"]),
    "one image outside": (["a/0.png", "b/0.png", "c.png"], {}, None, []),
    "class folders below one folder": (["x/a/0.png", "x/b/0.png"], {}, [0, 1], ["a", "b"]),
    "MNIST's digits": (["0/a.png", "1/a.png"], {}, [0, 1], ["0", "1"]),
    "FFHQ's shards": (["00000/0.png", "01000/0.png"], {}, None, []),
    "hidden": (["a.png", "b.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png"], {}, None, []),
    "EDM's tool": (
        ["00000/img0.png", "00000/img1.png", "00001/img2.png"],
        {"dataset.json": listing([["00000/img1.png", 2], ["00001/img2.png", 0],
                                  ["00000/img0.png", 1]])},
        [1, 2, 0],
        ["0", "1", "2"],
    ),
    "EDM's tool without classes": (
        ["a/0.png", "b/0.png"], {"dataset.json": listing(None)}, None, []
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_its_classes_in_folder_zip_and_tar(load, tmp_path, encoded, layout):
    names, others, labels, class_names = LAYOUTS[layout]
    content = {name: encoded(PIXEL) for name in names} | others | {"notes.txt": b"no image"}
    for source in trees(tmp_path, content):
        data = load(source)
        assert (data.labels if data.labels is None else data.labels.tolist()) == labels
        assert data.info["class_names"] == class_names


def test_the_shards_of_webdataset_have_their_labels_also_where_keys_repeat(load, tmp_path, encoded):
    for shard, labels in enumerate(((3, 0), (1, 2))):
        content = {}
        for key, label in enumerate(labels):
            content[f"{key:04d}.jpg"] = encoded(PIXEL + 60 * label, "JPEG")
            content[f"{key:04d}.cls"] = str(label).encode()
        write_tar(tmp_path / f"set-{shard}.tar", content)
    for source in (f"tar:{tmp_path}", f"tar:{tmp_path}/set-*.tar"):
        data = load(source)
        np.testing.assert_array_equal(data.images[:, 0, 0, 0], 60 * data.labels)
        assert sorted(data.labels) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("names", "others", "message"),
    [
        (["train/a/0.png", "test/a/0.png"], {}, "parts of a set, not classes; name one"),
        (["a.png"], {"dataset.json": listing([["b.png", 1]])}, "1 images have no label.* a.png"),
        (["a.png"], {"dataset.json": b"\xff"}, "dataset.json must hold"),
        (["a.png"], {"dataset.json": listing([["a.png", -1]])}, "labels must lie between 0"),
        (["a.txt"], {}, "no image in it"),
    ],
)
def test_a_layout_that_says_nothing_certain_is_refused(tmp_path, encoded, names, others, message):
    for source in trees(tmp_path, {name: encoded(PIXEL) for name in names} | others):
        with pytest.raises(ValueError, match=message):
            open_source(source)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "data.source must be digits, photos, cifar10.* tfds:digit"),
        ("cifar100", "got 'cifar100': a set of TensorFlow Datasets is tfds:cifar100"),
        ("{tmp_path}/a.zip", "did you mean zip:{tmp_path}/a.zip?"),
        ("foto+digits", "got 'foto'"),
        ("folder:/nowhere/at/all", "there is no folder"),
        ("tar:{tmp_path}", "no \\*.tar file there"),
        ("cifar10:val", "its splits are train and test"),
    ],
)
def test_an_unknown_source_is_refused_with_what_was_meant(tmp_path, spec, message):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=message.format(tmp_path=tmp_path)):
        open_source(spec.format(tmp_path=tmp_path))


# --- CIFAR-10 ------------------------------------------------------------------------------------


def python_2_pickle(pixels, labels):
    """The original's bytes: protocol 2, numpy 1's names, an array's content as text."""
    batch = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
    encoded = b"c_codecs\nencode\n"
    assert encoded in batch  # Python 3 writes bytes so, which Python 2 did not have
    return batch.replace(b"numpy._core", b"numpy.core")


@pytest.fixture
def cifar10():
    """Files of both versions by name; images [18, 32, 32, 3] and labels [18] as they must be."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (18, 32, 32, 3), np.uint8)
    labels = np.arange(18) % 10
    binary, python = {}, {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        part = slice(3 * number, 3 * number + 3)
        pixels = images[part].transpose(0, 3, 1, 2).reshape(3, 3072)  # red, then green, then blue
        records = np.concatenate([labels[part, None].astype(np.uint8), pixels], axis=1)
        binary[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
        python[f"cifar-10-batches-py/{name}"] = python_2_pickle(pixels, labels[part].tolist())
    return {"binary": binary, "python": python}, images, labels


@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_is_read_from_either_version_packed_or_not(load, tmp_path, cifar10, version,
                                                           packed):  # fmt: skip
    versions, images, labels = cifar10
    (tmp_path / "d").mkdir()
    if packed:
        write_tar(tmp_path / "d" / f"cifar-10-{version}.tar.gz", versions[version], "w:gz")
    else:
        write_tree(tmp_path / "d", versions[version])
    train = load("cifar10", data_dir=str(tmp_path / "d"))
    np.testing.assert_array_equal(train.images, images[:15])
    np.testing.assert_array_equal(train.labels, labels[:15])
    assert train.info["class_names"] == list(_CLASSES)
    test = load("cifar10:test", data_dir=str(tmp_path / "d"))
    np.testing.assert_array_equal(test.images, images[15:])


def test_cifar10_that_is_not_there_says_how_to_get_it(load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"fetch it with --download \(170.1 MB.*cs.toronto.edu"):
        load("cifar10", data_dir=str(tmp_path))


def test_cifar10_with_files_missing_or_damaged_is_refused_by_name(load, tmp_path, cifar10):
    versions, _, _ = cifar10
    folder = tmp_path / "cifar-10-batches-py"
    write_tree(tmp_path, versions["python"])
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="is without data_batch_3"):
        load("cifar10", data_dir=str(folder))
    for content in (b"x", pickle.dumps({"data": 3, "labels": []}), pickle.dumps([1])):
        (folder / "data_batch_3").write_bytes(content)
        with pytest.raises(ValueError, match="data_batch_3 is not CIFAR-10's"):
            load("cifar10", data_dir=str(folder))
    write_tar(tmp_path / "cifar-10-binary.tar.gz", versions["binary"], "w:gz")
    content = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "cifar-10-binary.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is damaged"):
        load("cifar10", data_dir=str(tmp_path / "d"))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return os.mkdir, (str(self.where),)


def test_nothing_in_a_pickle_is_run(load, tmp_path, cifar10):
    write_tree(tmp_path, cifar10[0]["python"])
    bomb = Bomb(tmp_path / "exploded")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": bomb}, 2))
    with pytest.raises(ValueError, match="mkdir', which is never run"):
        load("cifar10:test", data_dir=str(tmp_path))
    np.save(tmp_path / "a.npy", np.array([bomb], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        load(f"npy:{tmp_path / 'a.npy'}")
    assert not (tmp_path / "exploded").exists()


# --- tables --------------------------------------------------------------------------------------


def write_parquet(path, images, labels, label_columns=("label",), names=("a", "b", "c")):
    """Hugging Face's layout, retyped from its files: no `datasets` needed."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = {"names": list(names), "_type": "ClassLabel"}
    features = {"img": {"_type": "Image"}} | dict.fromkeys(label_columns, kind)
    rows = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
    columns = {"img": rows} | dict.fromkeys(label_columns, labels)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, path, row_group_size=4)


def test_parquet_files_of_hugging_faces_layout_have_images_and_class_names(load, tmp_path, encoded,
                                                                           images):  # fmt: skip
    pngs, labels = [encoded(image) for image in images], [n % 3 for n in range(9)]
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pngs[:6], labels[:6])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pngs[6:], labels[6:])
    data = load(f"parquet:{tmp_path}")
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    assert data.info["class_names"] == ["a", "b", "c"]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", pngs[:2], labels[:2])
    with pytest.raises(ValueError, match=r"several splits, such as test-.* and train-"):
        load(f"parquet:{tmp_path}")
    assert len(load(f"parquet:{tmp_path}/train-*.parquet").images) == 9
    assert len(load(f"parquet:{tmp_path}/test-00000-of-00001.parquet").images) == 2


def test_parquet_that_is_no_set_of_images_is_refused(load, tmp_path, encoded):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load(f"parquet:{path}")
    parquet.write_table(pyarrow.table({"x": [1, 2]}), path)
    with pytest.raises(ValueError, match="no description of its columns"):
        load(f"parquet:{path}")
    write_parquet(path, [encoded(PIXEL), None], [0, 1], ("fine", "coarse"))
    with pytest.raises(ValueError, match=r"a\.parquet\[1\]: not a readable image"):
        load(f"parquet:{path}")


@pytest.fixture
def tiny_images(tmp_path, images, encoded):
    """The folder of a set that TensorFlow Datasets has prepared, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from etils import epath

    class TinyImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(tmp_path)

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(6, 6, 3)),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(9), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for index in range(count):
                yield index, {"image": io.BytesIO(encoded(images[index])), "label": index // 3}

    builder = TinyImages(data_dir=tmp_path / "tfds", file_format="array_record")
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=offline)
    return str(tmp_path / "tfds")


def test_tensorflow_datasets_are_read_without_tensorflow(load, tiny_images, images):
    data = load("tfds:tiny_images", data_dir=tiny_images)
    # tfds shuffles when it prepares: the same set of (image, label)
    expected = sorted((image.tobytes(), i // 3) for i, image in enumerate(images))
    got = sorted((im.tobytes(), int(k)) for im, k in zip(data.images, data.labels, strict=True))
    assert got == expected
    assert data.info["class_names"] == ["a", "b", "c"]
    assert len(load("tfds:tiny_images:test", data_dir=tiny_images).images) == 4


def test_a_set_that_is_not_prepared_is_refused_at_once(load, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    options = {"data_dir": str(tmp_path / "none")}
    with pytest.raises(ValueError, match=r"not prepared in array_record.*--download"):
        load("tfds:cifar10", **options)
    # Before anything is downloaded; TensorFlow is not among what this project installs.
    with pytest.raises(ValueError, match=r"preparing needs TensorFlow: pip install tensorflow-cpu"):
        load("tfds:cifar10", download=True, **options)
    with pytest.raises(ValueError, match="no data set is called 'cifar1O'"):
        load("tfds:cifar1O", **options)


# --- damage, links, strangers --------------------------------------------------------------------


def test_class_folders_may_be_links_but_not_to_a_folder_above(load, tmp_path, encoded):
    for name in ("cats", "dogs"):
        write_tree(tmp_path / "elsewhere", {f"{name}/a.png": encoded(PIXEL)})
    (tmp_path / "i").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "i" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert load(f"folder:{tmp_path / 'i'}").info["class_names"] == ["cats", "dogs"]
    (tmp_path / "elsewhere" / "cats" / "up").symlink_to(tmp_path / "i")
    with pytest.raises(ValueError, match=r"the link .*up leads to a folder that it lies in"):
        load(f"folder:{tmp_path / 'i'}")


def test_a_link_to_nothing_and_a_pipe_are_named(tmp_path):
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"x\.png: No such file.*repair the link"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "x.png").unlink()
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is not a regular file"):
        open_source(f"folder:{tmp_path}")


def test_names_that_are_no_text_are_read_and_named_in_messages(load, tmp_path, encoded):
    folder = os.fsencode(tmp_path) + b"/i/caf\xe9"
    os.makedirs(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(encoded(PIXEL))
    assert load(f"folder:{tmp_path / 'i'}").info["class_names"] == [os.fsdecode(b"caf\xe9")]
    with pytest.raises(ValueError, match="images are smaller"):
        load(f"folder:{tmp_path / 'i'}", resolution=5)


def test_zip_members_are_read_and_never_written_to_their_paths(load, tmp_path, encoded):
    (tmp_path / "sub").mkdir()
    content = {"../../evil.png": encoded(PIXEL), "/tmp_evil/evil.png": encoded(PIXEL)}
    assert len(load(write_zip(tmp_path / "sub" / "evil.zip", content)).images) == 2
    assert not list(tmp_path.rglob("evil.png"))


def test_a_damaged_member_is_named(load, tmp_path, encoded):
    source = write_zip(tmp_path / "a.zip", {"a/0.png": encoded(PIXEL)})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF  # stored, not compressed: its CRC no longer fits
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip:a/0\.png: .*archive"):
        load(source)
    source = write_tar(tmp_path / "a.tar", {"a/0.png": encoded(PIXEL)[:-30]})
    with pytest.raises(ValueError, match=r"a\.tar:a/0\.png: not a readable image"):
        load(source)


def test_a_member_that_lies_about_its_size_unpacks_to_no_more_than_it_says(tmp_path):
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**24))
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, 1000)  # its uncompressed size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: (cannot be read|not a readable)"):
        open_source(f"zip:{path}").load(0)


def test_a_file_that_is_too_large_for_an_image_is_named(tmp_path, monkeypatch, encoded):
    monkeypatch.setattr(files, "_MOST_BYTES", 10)
    for source in trees(tmp_path, {"a.png": encoded(PIXEL)}):
        with pytest.raises(ValueError, match=r"a\.png has .* bytes, expected at most 10"):
            open_source(source)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"expected uint8 .* got float32 \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no image in it"),
    ],
)
def test_an_array_of_the_wrong_kind_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array)
    for kind in ("npy", "npz"):
        with pytest.raises(ValueError, match=message):
            open_source(f"{kind}:{tmp_path}/a.{kind}")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999999, 8, 8), }",
        b"(" * 300,
    ],
)
def test_a_damaged_npy_header_is_one_line(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(192))
    with pytest.raises(ValueError, match=r"a\.npy: ") as caught:
        open_source(f"npy:{path}")
    assert "\n" not in str(caught.value)
