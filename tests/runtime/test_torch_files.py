"""torch's files and EDM's networks are read without torch, and nothing in them is run.

The files are written opcode by opcode (`torch_writer`).
"""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from tests.runtime.torch_writer import (
    EMPTY,
    LAYOUTS,
    REBUILD,
    STORAGES,
    dictionary,
    global_name,
    module,
    network_file,
    opcodes,
    packed_tensor,
    tensor,
    torch_file,
)
from warm_diffusion.runtime.torch_files import read_network, read_tensors

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
MATRIX = np.array([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]], np.float32)


def example(layout, **changes):
    """Six numbers seen as a matrix, its transpose, its last row and one of them; an integer."""
    matrix = {"offset": 0, "shape": (2, 3), "strides": (3, 1)} | changes
    views = {
        "matrix": tuple(matrix.values()),
        "transposed": (0, (3, 2), (1, 3)),
        "row": (3, (3,), (1,)),
        "scalar": (4, (), ()),
    }
    items = {name: tensor(layout, "0", "<f4", 6, *view) for name, view in views.items()}
    items["steps"] = tensor(layout, "1", "<i8", 1, 0, (), ())
    storages = {"0": np.arange(6, dtype="<f4") + 0.5, "1": np.array([7], "<i8")}
    return torch_file(layout, dictionary(items), storages)


def around(layout, content):
    """A file of the layout with these opcodes inside: in a network as a parameter."""
    if layout == "network":
        return network_file(module("EDMPrecond", {"x": content}))
    return torch_file(layout, content, {})


def read(layout, path):
    return read_network(path) if layout == "network" else read_tensors(path)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return path

    return write


# --- what is read --------------------------------------------------------------------------------


@each_layout
def test_tensors_come_back_with_their_strides_and_offsets(layout, write):
    tensors = read_tensors(write(example(layout)))
    expected = {"matrix": MATRIX, "transposed": MATRIX.T, "row": MATRIX[1], "scalar": MATRIX[1, 1]}
    expected["steps"] = np.int64(7)
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array, strict=True)


@each_layout
def test_every_type_of_number_and_an_empty_tensor_are_read(layout, write):
    arrays = {dtype: np.array([0, 1, 250], dtype) for dtype in STORAGES}
    items = {dtype: tensor(layout, dtype, dtype, 3, 0, (3,), (1,)) for dtype in arrays}
    items["empty"] = tensor(layout, "<f4", "<f4", 3, 0, (0, 5), (5, 1))
    tensors = read_tensors(write(torch_file(layout, dictionary(items), arrays)))
    assert tensors.pop("empty").shape == (0, 5)
    for dtype, array in arrays.items():
        np.testing.assert_array_equal(tensors[dtype], array, strict=True)


def test_a_networks_arrays_have_dotted_names_and_its_attributes_are_plain(write):
    inner = module("Linear", {"weight": packed_tensor(MATRIX), "bias": None})
    outer = module("EDMPrecond", {}, {"enc": inner}, sigma_data=0.25, gone=None)
    name, attributes, arrays = read_network(write(network_file(outer)))
    assert (name, attributes) == ("EDMPrecond", {"sigma_data": 0.25})
    assert list(arrays) == ["enc.weight"]
    np.testing.assert_array_equal(arrays["enc.weight"], MATRIX, strict=True)


# --- what is refused -----------------------------------------------------------------------------

each = pytest.mark.parametrize("layout", [*LAYOUTS, "network"])


@each
@pytest.mark.parametrize(
    "name", ["posix system", "builtins getattr", "builtins eval", "torch.nn Linear", "numpy.f2py x"]
)
def test_any_name_that_weights_do_not_need_is_refused_and_nothing_is_run(
    layout, name, write, tmp_path
):
    mark = tmp_path / "mark"
    call = global_name(*name.split()) + opcodes((f"touch {mark}",)) + b"R"
    content = call if layout == "network" else dictionary({"x": call})
    with pytest.raises(ValueError, match=name.replace(" ", r"\.")) as caught:
        read(layout, write(around(layout, content)))
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_command_in_the_storage_of_a_network_is_refused(write, tmp_path):
    """A storage is a file of its own, with five pickles."""
    call = global_name("posix", "system") + opcodes((f"touch {tmp_path / 'mark'}",)) + b"R"
    storage = torch_file("legacy", call, {})
    outer = module("EDMPrecond", {"x": packed_tensor(MATRIX, storage)})
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_network(write(network_file(outer)))
    assert not (tmp_path / "mark").exists()


@each
@pytest.mark.parametrize(
    ("content", "message"),
    [
        # LONG_BINPUT to place 2^32 - 1: the unpickler would make room for 2^33 pointers, 64 GB.
        (EMPTY + b"r" + struct.pack("<I", (1 << 32) - 1), "memo of 4294967295 places"),
        # A key of nested tuples: their hash would overflow the stack and end the process.
        (b"})" + b"\x85" * 1_000_000 + b"Ns", "more than 20000 tuples"),
        (b"\x8e" + struct.pack("<Q", 1 << 40), "cannot read"),  # BINBYTES8 of a terabyte
        (pickle.dumps(3, 2)[2:-1], "cannot read"),
        (REBUILD + opcodes((1, 0, (), ())) + b"R", "cannot read"),
    ],
    ids=["memo", "deep tuple", "huge bytes", "number", "no storage"],
)
def test_what_would_fill_memory_or_stack_or_is_no_tensor_is_refused(
    layout, content, message, write
):
    with pytest.raises(ValueError, match=message):
        read(layout, write(around(layout, content)))


@pytest.mark.parametrize("depth", [2, 100_000])
def test_a_network_within_itself_and_a_bottomless_one_are_refused(depth, write):
    if depth == 2:  # put into the memo, and met again inside
        program = b"}q\x00" + opcodes("state") + b"}"
        program += opcodes("_modules") + b"}" + opcodes("x") + b"h\x00ss"
        program += opcodes("_parameters") + b"}s" + opcodes("_buffers") + b"}ss"
        program += opcodes("class_name") + opcodes("EDMPrecond") + b"s"
    else:
        start = b"}" + opcodes("class_name") + opcodes("x") + b"s" + opcodes("state") + b"}"
        start += opcodes("_parameters") + b"}s" + opcodes("_buffers") + b"}s"
        start += opcodes("_modules") + b"}" + opcodes("x")
        program = start * 3_000 + b"N" + b"sss" * 3_000
    with pytest.raises(ValueError, match="a module twice" if depth == 2 else "Recursion"):
        read_network(write(network_file(program)))


@each_layout
@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"shape": (1 << 40, 1), "strides": (0, 0)},  # expanded: one number, a terabyte as a copy
        {"shape": (6,)},
        {"shape": "23"},
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(layout, changes, write):
    with pytest.raises(ValueError, match="cannot read"):
        read_tensors(write(example(layout, **changes)))


def test_a_compressed_archive_is_refused(write):
    # A megabyte of zeros in a kilobyte: torch stores its archives uncompressed.
    content = dictionary({"x": tensor("zip", "0", "<f4", 1 << 18, 0, (1 << 18,), (1,))})
    storages = {"0": np.zeros(1 << 18, "<f4")}
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(write(torch_file("zip", content, storages, zipfile.ZIP_DEFLATED)))


@each
@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_damage_anywhere_is_a_valueerror_or_harmless(layout, write):
    if layout == "network":
        whole = network_file(module("EDMPrecond", {"weight": packed_tensor(MATRIX)}))
    else:
        whole = example(layout)
    rng = np.random.default_rng(0)
    for length in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="cannot read"):
            read(layout, write(whole[:length]))
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            read(layout, write(damaged))
        except ValueError:
            refused += 1
    assert refused > 75
