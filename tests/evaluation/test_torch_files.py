"""torch's files read without torch.

The files are written opcode by opcode (`torch_writer`).
"""

import io
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import pytest

from tests.evaluation.torch_writer import (
    EMPTY,
    LAYOUTS,
    REBUILD,
    STORAGES,
    dictionary,
    global_name,
    opcodes,
    tensor,
    torch_file,
)
from warm_diffusion.evaluation import torch_files


def _example(layout, **changes):
    """Six numbers seen as a matrix, its transpose, its last row and one of them."""
    numbers = np.arange(6, dtype="<f4") + 0.5
    matrix = {"offset": 0, "shape": (2, 3), "strides": (3, 1)} | changes
    views = {
        "matrix": tuple(matrix.values()),
        "transposed": (0, (3, 2), (1, 3)),
        "row": (3, (3,), (1,)),
        "scalar": (4, (), ()),
    }
    items = {name: tensor(layout, "0", "<f4", 6, *view) for name, view in views.items()}
    items["steps"] = tensor(layout, "1", "<i8", 1, 0, (), ())
    return torch_file(layout, dictionary(items), {"0": numbers, "1": np.array([7], "<i8")})


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return path

    return write


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_come_back_with_their_strides_and_offsets(layout, write):
    tensors = torch_files.read_tensors(write(_example(layout)))
    matrix = np.array([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]], np.float32)
    expected = {"matrix": matrix, "transposed": matrix.T, "row": matrix[1], "scalar": matrix[1, 1]}
    expected["steps"] = np.int64(7)
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_type_of_number_is_read(layout, dtype, write):
    array = np.array([0, 1, 250], dtype)
    content = dictionary({"x": tensor(layout, "k", dtype, 3, 0, (3,), (1,))})
    tensors = torch_files.read_tensors(write(torch_file(layout, content, {"k": array})))
    np.testing.assert_array_equal(tensors["x"], array, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_without_elements_is_read(layout, write):
    content = dictionary({"x": tensor(layout, "k", "<f4", 0, 0, (0, 5), (5, 1))})
    tensors = torch_files.read_tensors(
        write(torch_file(layout, content, {"k": np.zeros(0, "<f4")}))
    )
    assert tensors["x"].shape == (0, 5)


def _call(command):
    """Opcodes that call os.system(command), as its __reduce__ would be pickled."""
    return global_name("posix", "system") + opcodes((command,)) + b"R"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_would_run_a_command_is_refused_by_name_and_runs_nothing(
    layout, write, tmp_path
):
    mark = tmp_path / "mark"
    # Beside a sound tensor, as the value of another name.
    items = {"x": tensor(layout, "0", "<f4", 1, 0, (), ()), "y": _call(f"touch {mark}")}
    path = write(torch_file(layout, dictionary(items), {"0": np.ones(1, "<f4")}))
    with pytest.raises(ValueError, match=r"posix\.system"):
        torch_files.read_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize("position", range(5))
def test_a_command_in_any_pickle_of_a_legacy_file_is_refused(position, write, tmp_path):
    mark = tmp_path / "mark"
    storage = np.ones(1, "<f4")
    content = dictionary({"x": tensor("legacy", "0", "<f4", 1, 0, (), ())})
    stream = io.BytesIO(torch_file("legacy", content, {"0": storage}))
    ends = [0]
    for _ in range(5):
        _skip(stream)
        ends.append(stream.tell())
    data = stream.getvalue()
    hostile = b"\x80\x02" + _call(f"touch {mark}") + b"."
    with pytest.raises(ValueError, match=r"posix\.system"):
        torch_files.read_tensors(
            write(data[: ends[position]] + hostile + data[ends[position + 1] :])
        )
    assert not mark.exists()


def _skip(stream):
    """Moves past one pickle: pickletools only parses."""
    for _ in pickletools.genops(stream):
        pass


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["builtins eval", "torch._utils _rebuild_parameter", "torch.nn Linear", "os getcwd"]
)
def test_any_name_that_tensors_do_not_need_is_refused(layout, name, write):
    content = dictionary({"x": global_name(*name.split())})
    with pytest.raises(ValueError, match=name.replace(" ", r"\.")):
        torch_files.read_tensors(write(torch_file(layout, content, {})))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (3, 3)},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"shape": (1 << 40, 1), "strides": (0, 0)},  # expanded: one number, a terabyte as a copy
        {"shape": (6,)},
        {"shape": ("2", 3)},
        {"shape": "23"},
        {"shape": 6},
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(layout, changes, write):
    with pytest.raises(ValueError, match="cannot read"):
        torch_files.read_tensors(write(_example(layout, **changes)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_storage_of_another_size_than_announced_is_refused(layout, write):
    content = dictionary({"x": tensor(layout, "0", "<f4", 2, 0, (2,), (1,))})
    with pytest.raises(ValueError, match="expected a storage of 2, got 3"):
        torch_files.read_tensors(write(torch_file(layout, content, {"0": np.ones(3, "<f4")})))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(3, 2)[2:-1],
        dictionary({"x": pickle.dumps(3, 2)[2:-1]}),
        EMPTY,
        dictionary({"x": REBUILD + opcodes((1, 0, (), ())) + b"R"}),
        dictionary({"x": opcodes(("module", "0")) + b"Q"}),
    ],
    ids=["number", "dictionary of numbers", "nothing", "tensor without storage", "module"],
)
def test_anything_but_a_dictionary_of_tensors_is_refused(layout, content, write):
    with pytest.raises(ValueError, match="cannot read"):
        torch_files.read_tensors(write(torch_file(layout, content, {})))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        # LONG_BINPUT to place 2^32 - 1: the unpickler would make room for 2^33 pointers, 64 GB.
        (EMPTY + b"r" + struct.pack("<I", (1 << 32) - 1), "memo of 4294967295 places"),
        (EMPTY + b"p4294967295\n", "memo of 4294967295 places"),  # PUT
        # A key of nested tuples: their hash would overflow the stack and end the process.
        (b"})" + b"\x85" * 1_000_000 + b"Ns", "more than 20000 tuples"),
        (b"})" + b"\x85" * 20_001 + b"Ns", "more than 20000 tuples"),
    ],
    ids=["long_binput", "put", "deep tuple", "one tuple too many"],
)
def test_a_pickle_that_would_fill_memory_or_stack_is_refused(layout, content, message, write):
    with pytest.raises(ValueError, match=message):
        torch_files.read_tensors(write(torch_file(layout, content, {})))


def test_a_compressed_archive_is_refused(write):
    # A megabyte of zeros in a kilobyte: torch stores its archives uncompressed.
    content = dictionary({"x": tensor("zip", "0", "<f4", 1 << 18, 0, (1 << 18,), (1,))})
    storages = {"0": np.zeros(1 << 18, "<f4")}
    with pytest.raises(ValueError, match="compressed"):
        torch_files.read_tensors(write(torch_file("zip", content, storages, zipfile.ZIP_DEFLATED)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_refused(layout, write):
    whole = _example(layout)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="cannot read"):
            torch_files.read_tensors(write(whole[:length]))


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_with_damaged_bytes_raises_nothing_but_valueerror(layout, write):
    whole = _example(layout)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            torch_files.read_tensors(write(damaged))
        except ValueError:
            refused += 1
    assert refused > 100
