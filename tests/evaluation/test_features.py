"""Feature extractors: names and refusals."""

import hashlib
import sys

import numpy as np
import pytest

from warm_diffusion.evaluation import features


def images(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of a user's, importable by its name."""
    path = tmp_path / "my_features.py"
    path.write_text(
        "import numpy as np\n"
        "def mean_and_max(images):\n"
        "    flat = images.reshape(len(images), -1).astype(float)\n"
        "    return np.stack([flat.mean(1), flat.max(1)], 1)\n"
        "def broken(images):\n"
        "    return np.log(mean_and_max(images) * 0)\n"
        "seven = 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield path
    sys.modules.pop("my_features", None)


def test_pixels_are_the_values_between_minus_one_and_one():
    # u / 127.5 - 1 for u = 0, 51, 102, 255: -1, -0.6, -0.2, 1
    image = np.array([[[[0], [51]], [[102], [255]]]], np.uint8)
    found = features.extractor("pixels")(image)
    np.testing.assert_allclose(found, [[-1, -0.6, -0.2, 1]], atol=1e-6)


def test_pixels_of_large_images_are_refused():
    with pytest.raises(ValueError, match=r"up to 4096 values, got \(64, 64, 3\)"):
        features.extractor("pixels")(images(1, (64, 64, 3)))


def test_a_users_function_keeps_its_name_and_the_hash_of_its_file(user_module):
    extract = features.extractor("my_features:mean_and_max")
    assert extract.name == "my_features:mean_and_max"
    assert extract.weights_hash == hashlib.sha256(user_module.read_bytes()).hexdigest()
    x = images(130)  # three batches, the last one filled up
    flat = x.reshape(130, -1).astype(float)
    expected = np.stack([flat.mean(1), flat.max(1)], 1)
    np.testing.assert_allclose(extract(x), expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_features_that_are_not_finite_are_refused(user_module):
    with pytest.raises(ValueError, match="features of my_features:broken are not finite"):
        features.extractor("my_features:broken")(images(3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "efficientnet_lite0 or MODULE:FUNCTION, got 'resnet'"),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'"),
        ("my_features:seven", "is no function, but int"),
        ("inception", "python -m warm_diffusion.public get pt_inception"),
    ],
)
def test_features_that_cannot_be_had_are_refused(user_module, name, message):
    with pytest.raises(ValueError, match=message):
        features.extractor(name)


@pytest.mark.parametrize("name", ["my_features:mean_and_max", "pixels"])
def test_a_name_that_came_with_a_checkpoint_is_refused_and_not_imported(user_module, name):
    with pytest.raises(
        ValueError, match=r"names of code count from the command line only"
    ) as error:
        features.extractor(f"?{name}")
    assert f"came with the checkpoint names code ({name}) as features" in str(error.value)
    assert f"--config.eval.features={name} if you trust it" in str(error.value)
    assert "my_features" not in sys.modules


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
)
def test_what_is_no_batch_of_uint8_images_is_refused(wrong):
    with pytest.raises(ValueError, match="expected uint8 images"):
        features.extractor("pixels")(wrong)
