"""Fixtures of the tests of data: a cache of their own, images as files."""

import io

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import load_dataset


@pytest.fixture
def load(tmp_path):
    """`load_dataset` with a cache of this test's own."""
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


@pytest.fixture
def images():
    """Nine images [9, 6, 6, 3]."""
    return np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), np.uint8)


@pytest.fixture
def encoded():
    """An array as an image file's bytes."""

    def encode(array, kind="PNG", **options):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, kind, **options)
        return stream.getvalue()

    return encode


@pytest.fixture
def tree(tmp_path, images, encoded):
    """The nine images in folders class0 to class2, beside files that are no images."""
    folder = tmp_path / "images"
    for index, image in enumerate(images):
        path = folder / f"class{index // 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"not an image either")
    return folder
