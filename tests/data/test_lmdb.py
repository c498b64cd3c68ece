"""LSUN's databases: read in the order of their keys, never written to, damage named."""

import hashlib
import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import load_dataset
from warm_diffusion.data.sources import open_source

lmdb = pytest.importorskip("lmdb")


def encode(array, kind="WEBP", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def write(folder, entries):
    """A database as LSUN ships them: data.mdb and, until it is removed, a lock file."""
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as writer:
        for key, value in entries.items():
            writer.put(key, value)
    (folder / "lock.mdb").unlink()
    return folder


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), np.uint8)


@pytest.fixture
def database(tmp_path, images):
    """Lossless WebP under keys as LSUN's, written in another order than the keys'."""
    keys = [hashlib.sha1(bytes([index])).hexdigest().encode() for index in range(len(images))]
    entries = {k: encode(i, lossless=True) for k, i in zip(keys, images, strict=True)}
    return write(tmp_path / "church_lmdb", entries), keys


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


def test_images_come_in_the_order_of_their_keys_without_labels(load, database, images):
    folder, keys = database
    data = load(f"lmdb:{folder}")
    np.testing.assert_array_equal(data.images, images[np.argsort(keys)])
    assert data.labels is None


def test_the_same_images_from_a_folder_give_the_same_data(load, tmp_path, database, images):
    folder, keys = database
    (tmp_path / "png").mkdir()
    for key, image in zip(keys, images, strict=True):
        Image.fromarray(image).save(tmp_path / "png" / f"{key.decode()}.png")
    one, two = (load(s, resolution=4) for s in (f"lmdb:{folder}", f"folder:{tmp_path / 'png'}"))
    assert one.images.shape == (9, 4, 4, 3)
    assert one.info["content_sha256"] == two.info["content_sha256"]


def test_jpeg_values_are_read_as_pil_reads_them(load, tmp_path, images):
    value = encode(images[0], "JPEG")
    data = load(f"lmdb:{write(tmp_path / 'jpeg', {b'a': value})}")
    np.testing.assert_array_equal(data.images[0], Image.open(io.BytesIO(value)))


def test_the_database_is_never_written_to(load, database):
    folder, _ = database
    content, changed = (folder / "data.mdb").read_bytes(), folder.stat().st_mtime_ns
    load(f"lmdb:{folder}")
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]
    assert (folder / "data.mdb").read_bytes() == content
    assert folder.stat().st_mtime_ns == changed  # not even a file that was removed again


def test_a_database_that_may_not_be_written_to_is_read(load, database):
    folder, _ = database
    os.chmod(folder / "data.mdb", 0o444)
    os.chmod(folder, 0o555)
    try:
        assert len(load(f"lmdb:{folder}").images) == 9
    finally:
        os.chmod(folder, 0o755)


def test_two_sources_of_one_database_live_side_by_side(database, images):
    folder, keys = database
    one, two = open_source(f"lmdb:{folder}"), open_source(f"lmdb:{folder}")
    for source in (one, two):
        np.testing.assert_array_equal(source.load(3)[0], images[np.argsort(keys)[3]])
    del one
    np.testing.assert_array_equal(two.load(0)[0], images[np.argsort(keys)[0]])


def test_a_changed_database_gets_a_cache_of_its_own(load, database, images):
    folder, _ = database
    before = load(f"lmdb:{folder}")
    write(folder, {b"zzz": encode(images[0], lossless=True)})
    after = load(f"lmdb:{folder}")
    assert after.path != before.path
    np.testing.assert_array_equal(after.images[9], images[0])


def test_a_value_that_is_no_image_is_named_by_its_key(load, tmp_path, images):
    entries = {b"0": encode(images[0]), b"broken": encode(images[1])[:40], b"z": encode(images[2])}
    folder = write(tmp_path / "bad", entries)
    with pytest.raises(ValueError, match=r"bad\[broken\]: not a readable image"):
        load(f"lmdb:{folder}")
    assert list((tmp_path / "c").iterdir()) == []


def no_database(folder):
    (folder / "notes.txt").write_text("hello")
    return "no data.mdb in it"


def empty(folder):
    write(folder, {})
    return "no image in it"


def damaged(folder):
    (folder / "data.mdb").write_bytes(b"x" * 10_000)
    return "not a readable LMDB"


@pytest.mark.parametrize("damage", [no_database, empty, damaged])
def test_a_folder_without_a_database_of_images_is_refused(load, tmp_path, damage):
    folder = tmp_path / "folder"
    folder.mkdir()
    message = damage(folder)
    with pytest.raises(ValueError, match=f"lmdb:.*folder: {message}"):
        load(f"lmdb:{folder}")


def test_a_missing_folder_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        load(f"lmdb:{tmp_path / 'nowhere'}")


def test_without_the_package_the_way_to_install_it_is_told(load, database, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)  # what makes `import lmdb` fail
    with pytest.raises(ValueError, match=r"needs lmdb: pip install lmdb$"):
        load(f"lmdb:{database[0]}")
