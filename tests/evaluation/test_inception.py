"""The Inception network against torch-fidelity's, and its weights file."""

import hashlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.runtime.torch_writer import dictionary, tensor, torch_file
from warm_diffusion.evaluation import features, inception


@pytest.fixture(scope="module")
def golden(shared_folder):
    with np.load(shared_folder / "golden" / "inception_features.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden_arrays):
    return inception.params_from_arrays(golden_arrays)


def test_features_are_those_of_torch_fidelity(golden_arrays, golden, tmp_path, monkeypatch):
    # Origin: torch-fidelity 0.4's FeatureExtractorInceptionV3 on the same weights and images.
    monkeypatch.setattr(features, "_BATCH", 6)
    path, expected = tmp_path / "inception.safetensors", golden["pool32"]
    safetensors.numpy.save_file(golden_arrays, path)
    extract = features.extractor("inception", weights=str(path))
    assert extract.weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    found = extract(golden["images32"])
    assert found.shape == (6, 2048)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5
    # An image's features do not depend on the others in its batch.
    others = np.random.default_rng(0).integers(0, 256, golden["images32"].shape, np.uint8)
    others[4] = golden["images32"][1]
    assert np.abs(extract(others)[4] - found[1]).max() < 1e-5 * expected.max()


def test_every_product_runs_at_full_float32_precision(params):
    # The default is bfloat16 on TPU and TF32 on recent GPUs; no test on a CPU would notice.
    images = np.zeros((2, 8, 12, 3), np.uint8)
    precisions = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                precisions.append(equation.params["precision"])
            for inner in jax.tree.leaves(list(equation.params.values())):
                if hasattr(inner, "jaxpr"):
                    visit(inner.jaxpr)

    visit(jax.make_jaxpr(inception.features)(params, images).jaxpr)
    assert len(precisions) == 94 + 2  # convolutions; two products to resize
    assert set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def _tf1_bilinear(image, size):
    """TensorFlow 1's resize_bilinear without align_corners, one axis after the other (eq. 1)."""
    for axis in (0, 1):
        source = np.arange(size) * image.shape[axis] / size
        low = source.astype(int)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        weight = (source - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = image.take(low, axis) * (1 - weight) + image.take(high, axis) * weight
    return image


def test_the_list_of_arrays_is_torch_fidelitys(golden):
    theirs = dict(zip(map(str, golden["names"]), map(str, golden["shapes"]), strict=True))
    ours = {name: ",".join(map(str, s)) for name, s in inception.array_shapes().items()}
    unused = {"fc.weight", "fc.bias"} | {
        name for name in theirs if name.endswith("num_batches_tracked")
    }
    assert ours == {name: shape for name, shape in theirs.items() if name not in unused}


@pytest.mark.parametrize("shape", [(7, 32), (310, 20)])
def test_images_are_resized_as_tensorflow_1_did(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected = (_tf1_bilinear(image.astype(float), 299) - 128) / 128
    np.testing.assert_allclose(inception._prepare(image[None])[0], expected, rtol=0, atol=2e-6)


def test_arrays_that_do_not_fit_are_named_together(golden_arrays):
    wrong = {
        **golden_arrays,
        "AuxLogits.fc.weight": np.zeros(1),
    }  # names beyond the needed are ignored
    del wrong["Mixed_5b.branch1x1.bn.running_mean"]
    wrong["Mixed_7c.branch_pool.conv.weight"] = np.zeros((1, 2048, 1, 1), np.float32)
    wrong["Conv2d_1a_3x3.bn.bias"] = np.full(32, np.nan)
    wrong["Conv2d_2a_3x3.bn.running_var"] = np.full(32, -1.0)
    with pytest.raises(ValueError, match="not the weights of the FID InceptionV3") as error:
        inception.params_from_arrays(wrong)
    for part in (
        "missing Mixed_5b.branch1x1.bn.running_mean",
        "Mixed_7c.branch_pool.conv.weight has shape (1, 2048, 1, 1), expected (192, 2048, 1, 1)",
        "Conv2d_1a_3x3.bn.bias has numbers that are not finite",
        "Conv2d_2a_3x3.bn.running_var has negative variances",
    ):
        assert part in str(error.value)
    assert "AuxLogits" not in str(error.value)


def test_torchs_file_and_a_safetensors_one_hold_the_same_weights(golden_arrays, tmp_path, capsys):
    items, storages = {}, {}
    for name, array in golden_arrays.items():
        strides = tuple(stride // 4 for stride in array.strides)
        items[name] = tensor("zip", name, "<f4", array.size, 0, array.shape, strides)
        storages[name] = array.ravel()
    content = torch_file("zip", dictionary(items), storages)
    (tmp_path / "a.pth").write_bytes(content)
    safetensors.numpy.save_file(golden_arrays, tmp_path / "a.safetensors")
    one, two = (inception.load(tmp_path / f"a.{ending}") for ending in ("pth", "safetensors"))
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])
    assert one[1] == hashlib.sha256(content).hexdigest()
    assert "is not the published file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}q\x00.", "cannot read .*weights"),
        (b"PK\x03\x04 an archive", "cannot read .*weights"),
        (b"\x00" * 20, "neither torch's file nor a safetensors one, or damaged"),
    ],
)
def test_a_damaged_weights_file_is_refused(tmp_path, content, message):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        inception.load(tmp_path / "weights")
