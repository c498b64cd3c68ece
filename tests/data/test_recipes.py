"""Preparation to the bit: the resize recipe against PIL's definition retyped, and equal batches."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from warm_diffusion.data import batch_indices, load_dataset


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_dataset(source, cache_dir=str(tmp_path / "c"), **options)


def generated(count, height, width):
    """Images of integers alone, the same on every machine: a slope, waves, and hard noise."""
    n, i, j, c = np.ogrid[:count, :height, :width, :3]
    waves = (i * i * 3 + j * j * 5 + i * j * (c + 1)) // 64
    noise = ((i * 7919 + j * 104_729 + c * 1_299_709 + n * 15_485_863) % 65_537) % 97
    return ((waves + i * (n + 1) // 4 + 2 * noise + 40 * c) % 256).astype(np.uint8)


def write_folder(folder, images):
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05d}.png")
    return f"folder:{folder}"


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


def block_means(image, factor):
    """The mean over columns, then over rows, of each block; halves are rounded up."""
    image = image.astype(np.int64)
    height, width, channels = image.shape
    image = image.reshape(height, width // factor, factor, channels).sum(axis=2)
    image = (image + factor // 2) // factor
    image = image.reshape(height // factor, factor, width // factor, channels).sum(axis=1)
    return ((image + factor // 2) // factor).astype(np.uint8)


@pytest.mark.parametrize(("side", "resolution"), [(1024, 64), (128, 64), (256, 128)])
def test_a_box_filter_by_a_whole_factor_takes_the_rounded_means_of_blocks(load, tmp_path, side,
                                                                          resolution):  # fmt: skip
    images = generated(2, side, side)
    data = load(write_folder(tmp_path / "i", images), resolution=resolution, resize="box")
    expected = [block_means(image, side // resolution) for image in images]
    np.testing.assert_array_equal(data.images, expected)


@pytest.mark.parametrize("size", [(60, 60), (45, 62), (62, 45), (33, 40)])
@pytest.mark.parametrize("filter_", [lanczos, box])
def test_every_size_is_cropped_and_resized_to_the_bit(load, tmp_path, size, filter_):
    images = generated(2, *size)
    data = load(write_folder(tmp_path / "i", images), resolution=17, resize=filter_.__name__)
    np.testing.assert_array_equal(data.images, [filter_(image, 17) for image in images])


# SHA-256 of the prepared bytes of two generated images, from `lanczos` and `box` of this file, not
# from PIL. A PIL whose pixels differ (these hold for 11.0 and 13.0) must come with a new version of
# the recipe, or the same configuration would mean two data sets.
GOLDEN = {
    "ffhq64 from 1024, lanczos": (
        (1024, 1024),
        64,
        lanczos,
        "ae4637a0b594944bf0377a8b7afd45f1d6cc81486eb377271e7bf1ffec8403a5",
    ),
    "ffhq64 from 1024, box": (
        (1024, 1024),
        64,
        box,
        "010a50a95a17e587d4520466f6ba071ad4e8b20ce5e423fb245746d4dbc1bc8a",
    ),
    "ffhq64 from thumbnails, lanczos": (
        (128, 128),
        64,
        lanczos,
        "9a4fc5aa2faf9ea1377a563597f8ff50de41a1fc639ab93f17386032700c7268",
    ),
    "ffhq64 from thumbnails, box": (
        (128, 128),
        64,
        box,
        "202e04687d6c998cd311caeab42161431e9045d61fcb76fe2982a46095e2547b",
    ),
    "lsun_church128, lanczos": (
        (256, 341),
        128,
        lanczos,
        "891980754d0c7262e721040993e693ed7ce45ba160add89e94d11c2c5e55bac4",
    ),
    "lsun_church128, box": (
        (256, 341),
        128,
        box,
        "3473673816c9dba11412f87e70816572f3213a57ad5ee80cc736c7b593bcc902",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_recipes_of_the_shipped_configurations_have_golden_hashes(load, tmp_path, name):
    size, resolution, filter_, golden = GOLDEN[name]
    images = generated(2, *size)
    digest = hashlib.sha256(b"".join(filter_(image, resolution).tobytes() for image in images))
    assert digest.hexdigest() == golden
    data = load(
        write_folder(tmp_path / "i", images), resolution=resolution, resize=filter_.__name__
    )
    assert data.info["content_sha256"] == golden


# --- the same images from every source -----------------------------------------------------------

CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
]  # fmt: skip


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """40 generated images, prepared by TensorFlow Datasets' own builder of CIFAR-10.

    Returns (data_dir, images, labels), in the order in which it numbers them.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    images, labels = generated(40, 32, 32), np.arange(40) % 7
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n")

    def examples(self, prefix, files):
        """In place of reading the original's files, for which it would import TensorFlow."""
        for index in range(40 if prefix == "train_" else 3):
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "PNG")
            png.seek(0)
            yield index, {"id": f"{prefix}{index:05d}", "image": png, "label": int(labels[index])}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda *_: tmp_path)
    monkeypatch.setattr(tfds.image_classification.cifar.Cifar10, "_generate_examples", examples)
    builder = tfds.builder("cifar10", data_dir=tmp_path / "tfds", file_format="array_record",
                           try_gcs=False)  # fmt: skip
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    # It shuffles as it writes; `id` is train_00000 and so on.
    order = [int(record["id"][-5:]) for record in builder.as_data_source("train")]
    assert sorted(order) == list(range(40))
    return str(tmp_path / "tfds"), images[order], labels[order]


def test_tfds_folder_and_npy_of_the_same_images_give_the_same_batches(load, tmp_path, cifar10):
    data_dir, images, labels = cifar10
    np.save(tmp_path / "cifar10.npy", images)
    sources = {
        "tfds": load("tfds:cifar10", data_dir=data_dir),
        "folder": load(write_folder(tmp_path / "png", images)),
        "npy": load(f"npy:{tmp_path / 'cifar10.npy'}"),
    }
    for step in range(3):  # 48 images: into the second epoch
        expected = images[batch_indices(3, step, 16, 40)]
        for name, data in sources.items():
            batch = data.images[batch_indices(3, step, 16, len(data.images))]
            np.testing.assert_array_equal(batch, expected, err_msg=name)
    np.testing.assert_array_equal(sources["tfds"].labels, labels)
    assert sources["tfds"].info["class_names"] == CLASSES


def test_a_folder_of_classes_has_the_labels_of_tfds(load, tmp_path, cifar10):
    data_dir, images, labels = cifar10
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "tree" / CLASSES[label] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    tree, prepared = load(f"folder:{tmp_path / 'tree'}"), load("tfds:cifar10", data_dir=data_dir)
    pairs = [
        sorted(
            (im.tobytes(), d.info["class_names"][k])
            for im, k in zip(d.images, d.labels, strict=True)
        )
        for d in (tree, prepared)
    ]
    assert pairs[0] == pairs[1]
