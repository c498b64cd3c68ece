"""The convert command on the weights of JAX packages: the file that torch's give, or one line."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.pickle_writer import PROTOCOLS, Reduced, of_numpy_1
from tests.evaluation.torch_writer import dictionary, tensor, torch_file
from warm_diffusion.evaluation import inception, numpy_pickles

_JAX = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "weights.pickle"
        path.write_bytes(content)
        return path

    return write


def _as_jax(arrays):
    """Torch's arrays as jax-fid nests and lays them out: HWIO kernels."""
    nested = {}
    for name, array in arrays.items():
        *layers, operation, kind = name.split(".")
        place = nested
        for layer in layers:
            place = place.setdefault(layer, {})
        if operation == "conv":
            place["conv"] = {"kernel": np.moveaxis(array, (0, 1), (3, 2))}
        elif operation == "bn":
            place.setdefault("bn", {})[_JAX[kind]] = array
    return nested | {"AuxLogits": {"conv0": {"conv": {"kernel": np.ones((1, 1, 2, 3))}}}}


def _as_torch(arrays):
    items, storages = {}, {}
    for name, array in arrays.items():
        strides = tuple(stride // 4 for stride in array.strides)
        items[name] = tensor("zip", name, "<f4", array.size, 0, array.shape, strides)
        storages[name] = array.ravel()
    return torch_file("zip", dictionary(items), storages)


def test_the_jax_pickle_becomes_the_file_that_the_torch_one_becomes(golden_arrays, tmp_path):
    nested = _as_jax(golden_arrays)
    assert nested["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"].shape == (1, 7, 128, 128)
    # As jax-fid's file is: numpy 1's module names.
    (tmp_path / "weights.pickle").write_bytes(of_numpy_1(pickle.dumps(nested, 3)))
    (tmp_path / "weights.pth").write_bytes(_as_torch(golden_arrays))
    converted = []
    for name in ("weights.pickle", "weights.pth"):
        destination = tmp_path / f"{name}.safetensors"
        inception.convert(tmp_path / name, destination)
        converted.append(destination.read_bytes())
        (tmp_path / name).unlink()
        destination.unlink()
    assert converted[0] == converted[1]
    assert len(converted[0]) > 4 * sum(array.size for array in golden_arrays.values())


def test_convert_names_the_arrays_that_a_jax_pickle_lacks(write, tmp_path, capsys):
    content = {
        "Conv2d_1a_3x3": {
            "conv": {"kernel": np.zeros((3, 3, 3, 32), np.float32)},
            "bn": {"scale": np.ones(31)},
        },
    }
    source = write(pickle.dumps(content))
    assert inception.main(["convert", str(source), str(tmp_path / "out.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "Conv2d_1a_3x3.bn.weight has shape (31,), expected (32,)" in error
    assert "missing Conv2d_1a_3x3.bn.bias" in error
    assert "Conv2d_1a_3x3.conv.weight" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_convert_tells_a_torch_file_of_any_protocol_from_a_jax_pickle(protocol, write, tmp_path):
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}):
        pickle.dump(value, stream, protocol)
    with pytest.raises(ValueError, match="big-endian"):  # which only torch's reader looks at
        inception.convert(write(stream.getvalue()), tmp_path / "out.safetensors")


def test_convert_of_a_hostile_pickle_ends_with_one_line_and_status_2(write, tmp_path):
    mark = tmp_path / "mark"
    path = write(pickle.dumps({"fc": Reduced(os.system, (f"touch {mark}",))}))
    command = [sys.executable, "-m", "warm_diffusion.evaluation.inception", "convert"]
    run = subprocess.run(
        [*command, path, tmp_path / "out.safetensors"],
        cwd=Path(numpy_pickles.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith(f"error: cannot read {path}: it names 'posix.system'")
    assert run.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("digest", "warned"), [("PUBLISHED_SHA256", 0), ("JAX_SHA256", 0), (None, 1)]
)
def test_either_published_file_is_converted_without_a_warning(
    digest, warned, monkeypatch, inception_weights, capsys
):
    found = getattr(inception, digest) if digest else "0" * 64
    monkeypatch.setattr(inception, "convert", lambda *_: found)
    assert inception.main(["convert", "published", str(inception_weights)]) == 0
    assert capsys.readouterr().err.count("warning") == warned
