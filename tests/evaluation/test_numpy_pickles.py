"""Pickled dictionaries of arrays read without running them.

Sound files are numpy's own pickles; hostile ones are pickled from objects that reduce to what a
file should not hold.
"""

import _codecs
import contextlib
import os
import pickle
import struct

import numpy as np
import pytest

from tests.evaluation.pickle_writer import PROTOCOLS, Reduced, of_numpy_1
from warm_diffusion.evaluation import numpy_pickles


def forged(*state, subtype=np.ndarray):
    """An array as numpy pickles it, with a state of one's choice."""
    function, arguments, _ = np.zeros(1).__reduce__()
    return Reduced(function, (subtype, *arguments[1:]), state)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "weights.pickle"
        path.write_bytes(content)
        return path

    return write


def _example():
    """Arrays of many types and orders: nested, and by the names they are to have."""
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5
    named = {
        "stem.conv.kernel": a,
        "stem.conv.reversed": a.T,
        "stem.conv.turned": a.transpose(1, 0, 2),  # neither C nor Fortran order
        "stem.part": a[:, ::2, 1],
        "stem.scalar": np.array(0.25),
        "list.0": np.array([250, 3], np.uint8),
        "list.1": np.array([True, False]),
        "list.2": np.zeros((0, 5), np.float16),
        "big": np.array([1, -2], ">i8"),
    }
    stem = {key.removeprefix("stem.conv."): named[key] for key in list(named)[:3]}
    nested = {
        "stem": {"conv": stem, "part": named["stem.part"], "scalar": named["stem.scalar"]},
        "list": (named["list.0"], named["list.1"], named["list.2"]),
        "big": named["big"],
        "about": ["text", 3, 0.5, None, True],
    }
    return nested, named


@pytest.mark.parametrize("names", [bytes, of_numpy_1], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_come_back_by_their_keys(protocol, names, write):
    nested, named = _example()
    content = names(pickle.dumps(nested, protocol))
    assert (b"numpy._core" in content) == (names is bytes)
    found = numpy_pickles.read_arrays(write(content))
    assert found.keys() == named.keys()
    for name, array in named.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert not found[name].flags.writeable


def test_an_array_may_stand_under_several_names(write):
    a = np.arange(1000.0)
    found = numpy_pickles.read_arrays(write(pickle.dumps({str(i): a for i in range(50)})))
    assert len(found) == 50
    assert all(array is found["0"] for array in found.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "place",
    [
        lambda evil: evil,
        lambda evil: {"a": np.ones(3), "b": evil},
        lambda evil: {"a": [evil]},
        lambda evil: {"a": forged(1, evil, np.dtype("f4"), False, b"1234")},
        lambda evil: {"a": forged(1, (1,), evil, False, b"1234")},
    ],
    ids=["alone", "beside an array", "in a list", "as a shape", "as a type"],
)
def test_a_file_that_would_run_a_command_is_refused_by_name_and_runs_nothing(
    place, protocol, write, tmp_path
):
    mark = tmp_path / "mark"
    content = pickle.dumps(place(Reduced(os.system, (f"touch {mark}",))), protocol)
    with pytest.raises(ValueError, match=r"posix\.system', which a dictionary of numpy arrays"):
        numpy_pickles.read_arrays(write(content))
    assert not mark.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(content)  # the same file does run it where nothing is refused
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "numpy load",
        "numpy._core.multiarray scalar",
        "numpy.core.multiarray frombuffer",
        "numpy._core.numeric fromfunction",
        "numpy.matrixlib.defmatrix matrix",
        "_codecs decode",
        "jax._src.array _reconstruct_array",
        "torch FloatStorage",
    ],
)
def test_any_name_that_arrays_do_not_need_is_refused(name, write):
    module, attribute = name.split()
    content = b"\x80\x03}X\x01\x00\x00\x00a" + f"c{module}\n{attribute}\n".encode() + b"s."
    with pytest.raises(ValueError, match=name.replace(" ", r"\.")):
        numpy_pickles.read_arrays(write(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.array([1, "x", None], object), "'O8'"),
        (np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]), "'V12'"),
        (np.array(["text"]), "'U4'"),
        (np.array(["2020-01-01"], "M8[D]"), "'M8'"),
        (np.array([1j]), "'c16'"),
    ],
    ids=["object", "structured", "text", "time", "complex"],
)
def test_arrays_of_anything_but_numbers_are_refused(array, shown, protocol, write):
    with pytest.raises(ValueError, match=f"array 'a': it is of type {shown}, not of numbers"):
        numpy_pickles.read_arrays(write(pickle.dumps({"a": array}, protocol)))


F4 = np.dtype("<f4")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (forged(1, (3,), F4, False, b"12345678"), r"\(3,\) and <f4 do not fit its bytes"),
        (forged(1, (1,), F4, False, b"12345678"), "do not fit"),
        (forged(1, (1 << 40,), F4, False, b"12345678"), "do not fit"),
        (forged(1, (1 << 30, 1 << 34), F4, False, b""), "do not fit"),
        (forged(1, (1 << 60, 0), F4, False, b""), "no valid shape"),
        (forged(1, (1,) * 33, F4, False, b"1234"), "no valid shape"),
        (forged(1, (-1, -2), F4, False, b"12345678"), "no valid shape"),
        (forged(1, (True, 2), F4, False, b"12345678"), "no valid shape"),
        (forged(1, "23", F4, False, b"12345678"), "no valid shape"),
        (forged(1, 2, F4, False, b"12345678"), "no valid shape"),
        (forged(1, (2,), "<f4", False, b"12345678"), "no type of numbers"),
        (forged(1, (2,), F4, False, [1, 2]), "its bytes are list"),
        (forged(1, (2,), F4, False, "12345678"), "its bytes are str"),
        (forged(1, (2,), F4, False, np.arange(8, dtype=np.uint8)), "its bytes are array"),
        (forged((2,), F4), "never filled in"),
        (Reduced(*forged().reduced[:2]), "never filled in"),
        (forged(1, (2,), F4, False, b"12345678", subtype=np.dtype), "a subclass"),
    ],
)
def test_an_array_that_its_bytes_do_not_make_is_refused(array, message, write):
    with pytest.raises(ValueError, match=message) as error:
        numpy_pickles.read_arrays(write(pickle.dumps({"a": array}, 4)))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("protocol", "data"), [(2, Reduced(_codecs.encode, ("x" * 2**20, "latin1"))), (4, bytes(2**20))]
)
def test_bytes_that_many_arrays_share_do_not_make_more_than_the_file_holds(protocol, data, write):
    # Kilobytes of arrays of the same megabyte, each of which would be a copy sooner or later.
    arrays = {str(i): forged(1, (2**20,), np.dtype("u1"), False, data) for i in range(100)}
    content = pickle.dumps(arrays, protocol)
    assert len(content) < 2**21
    with pytest.raises(ValueError, match="do not fit its bytes"):
        numpy_pickles.read_arrays(write(content))


def test_sixteen_levels_are_read(write):
    assert list(numpy_pickles.read_arrays(write(pickle.dumps(_chain(16))))) == [".".join("a" * 16)]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".",
        b"\x80\x02}p4294967295\n.",
    ],
    ids=["LONG_BINPUT", "PUT"],
)
def test_a_memo_that_would_fill_the_memory_is_refused(content, write):
    with pytest.raises(ValueError, match="memo of 4294967295 places"):
        numpy_pickles.read_arrays(write(content))


def test_tuples_that_would_overflow_the_stack_are_refused(write):
    with pytest.raises(ValueError, match="more than 20000 tuples"):
        numpy_pickles.read_arrays(write(b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns."))


def test_bytes_longer_than_the_file_are_refused(write):
    content = b"\x80\x05}X\x01\x00\x00\x00a\x8e" + struct.pack("<Q", 1 << 40) + b"1234s."
    with pytest.raises(ValueError, match="cannot read"):
        numpy_pickles.read_arrays(write(content))


def _doubled(levels):
    content = {"a": np.ones(1)}
    for _ in range(levels):
        content = {"a": content, "b": content}
    return content


def _chain(levels):
    content = np.ones(1)
    for _ in range(levels):
        content = {"a": content}
    return content


def _itself():
    content = {}
    content["a"] = content
    return content


@pytest.mark.parametrize("content", [_doubled(14), _doubled(40), _chain(17), _itself()])
def test_dictionaries_that_would_be_walked_for_ever_are_refused(content, write):
    with pytest.raises(ValueError, match="nested beyond 16 levels or 20000 entries"):
        numpy_pickles.read_arrays(write(pickle.dumps(content)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "expected a dictionary of arrays, got int"),
        (np.ones(3), "expected a dictionary of arrays, got array"),
        ({}, "holds no arrays"),
        ({"a": {"b": "text"}}, "holds no arrays"),
        ({"a": np.ones(1), "b": np.dtype("f4")}, "got dtype under 'b'"),
        ({"a": b"bytes"}, "got bytes under 'a'"),
        ({"a": {1, 2}}, "got set under 'a'"),
        ({"a": {(1, 2): np.ones(1)}}, "a key under 'a' is no text or number"),
        ({"x" * 201: np.ones(1)}, "a key under '' is no text or number of up to 200"),
        ({"a": {"b": np.ones(1)}, "a.b": np.ones(2)}, "two of its arrays are called 'a.b'"),
    ],
)
def test_anything_but_nested_dictionaries_of_arrays_is_refused(content, message, write):
    with pytest.raises(ValueError, match=message):
        numpy_pickles.read_arrays(write(pickle.dumps(content)))


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04", pickle.dumps({}, 0)])
def test_a_file_that_is_no_pickle_of_our_time_is_refused(content, write):
    with pytest.raises(ValueError, match="no pickle of protocol 2 or later"):
        numpy_pickles.read_arrays(write(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_cut_anywhere_is_refused(protocol, write):
    whole = pickle.dumps(
        {"a": np.ones(3, np.float32), "b": [np.arange(6).reshape(2, 3).T]}, protocol
    )
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="cannot read"):
            numpy_pickles.read_arrays(write(whole[:length]))


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_with_damaged_bytes_raises_nothing_but_valueerror(protocol, write):
    whole = pickle.dumps(
        {"a": np.ones(3, np.float32), "b": [np.arange(6).reshape(2, 3).T]}, protocol
    )
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            numpy_pickles.read_arrays(write(damaged))
        except ValueError:
            refused += 1
    assert refused > 100
