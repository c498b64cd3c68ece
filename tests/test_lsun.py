"""The converter of LSUN's databases: the same images as a zip file, in the order of their keys."""

import importlib.util
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import load_dataset

lmdb = pytest.importorskip("lmdb")
SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "examples" / "lsun.py"


def test_a_database_becomes_a_zip_of_the_same_images(tmp_path):
    spec = importlib.util.spec_from_file_location("lsun", SCRIPT)
    lsun = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lsun)
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8)
    folder = tmp_path / "church_lmdb"
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as writer:
        for key, image in zip((b"c", b"a", b"b"), images, strict=True):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "WEBP", lossless=True)  # LSUN's format
            writer.put(key, stream.getvalue())
    (folder / "lock.mdb").unlink()
    assert lsun.convert(folder, tmp_path / "church.zip") == 3
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]  # never written to
    data = load_dataset(f"zip:{tmp_path / 'church.zip'}", cache_dir=str(tmp_path / "c"))
    np.testing.assert_array_equal(data.images, images[[1, 2, 0]])
    assert data.labels is None

    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as writer:
        writer.put(b"d", b"no image")
    with pytest.raises(ValueError, match="the value of d is no image"):
        lsun.convert(folder, tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()
