"""Arrays out of a pickle of nested dictionaries, without running what it contains.

JAX projects publish weights as pickle.dump of dictionaries of numpy arrays. numpy's own names in
such a file, of protocols 2 to 5, get stand-ins (`restricted_pickles`):

    numpy.core.multiarray._reconstruct   an array, whose state follows:
                                         (version, shape, dtype, Fortran order?, bytes)
    numpy.core.numeric._frombuffer       an array, protocol 5: (bytes, dtype, shape, order, axes)
    numpy.ndarray, numpy.dtype           its type; the dtype's state follows: (version, order, ...)
    _codecs.encode, __builtin__.bytes    bytes, protocol 2: (text, "latin1"), or () for none

numpy 2 calls its first module numpy._core; both are known.

Deliberately absent: object, structured and other arrays than of numbers, numpy's scalars, and jax's
own arrays.
"""

import io
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from warm_diffusion.evaluation import restricted_pickles

_NUMBERS = re.compile(r"[fiu][248]|[iu]1|b1")
_ORDERS = ("<", ">", "|")
_NDARRAY = object()  # its name only says that an array is no subclass of ndarray
_MAX_DEPTH, _MAX_ENTRIES, _MAX_NAME, _MAX_AXES = 16, 20_000, 200, 32


class _Encoded(NamedTuple):
    """Bytes as protocol 2 has them; encoded at the end, so that repeating them costs nothing."""

    text: str
    encoding: str


class _Stated:
    """What a pickle makes first and fills in later, by a state."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(_Stated):
    __slots__ = ("code",)

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.code = code


class _Array(_Stated):
    __slots__ = ("axes",)

    def __init__(self) -> None:
        super().__init__()
        self.axes: Any = None


def _reconstruct(subtype: Any, *_: Any) -> _Array:
    if subtype is not _NDARRAY:
        raise ValueError("it holds a subclass of numpy's array")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    if order == "K":  # neither C nor Fortran order: the axes of a C array in another one
        array.axes = axes
    return array


class _Unpickler(restricted_pickles.Unpickler):
    contents = "a dictionary of numpy arrays"

    def stand_in(self, module: str, name: str) -> Any:
        # Functions are made anew: a pickle that alters one alters nothing but its own copy.
        match module.replace("numpy._core.", "numpy.core."), name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *arguments: _reconstruct(*arguments)
            case "numpy.core.numeric", "_frombuffer":
                return lambda *arguments: _from_buffer(*arguments)
            case "numpy", "dtype":
                return lambda code, *_: _Dtype(code)
            case "numpy", "ndarray":
                return _NDARRAY
            case "_codecs", "encode":
                return lambda text, encoding: _Encoded(text, encoding)
            case "__builtin__", "bytes":
                return lambda: b""
        return None


def _flatten(content: Any) -> dict[str, _Array]:
    """Arrays by their keys, joined by dots; lists count as dictionaries of their positions."""
    if type(content) is not dict:
        raise ValueError(f"expected a dictionary of arrays, got {_kind(content)}")
    found: dict[str, _Array] = {}
    waiting, entries = [((), content)], 0
    while waiting:
        keys, value = waiting.pop()
        name = ".".join(keys)
        if type(value) is _Array:
            if name in found:
                raise ValueError(f"two of its arrays are called {name!r:.60}")
            found[name] = value
        elif type(value) in (dict, list, tuple):
            items = value.items() if type(value) is dict else enumerate(value)
            # The same dictionary in many places, or in itself, would be walked for ever.
            entries += len(value)
            if entries > _MAX_ENTRIES or len(keys) >= _MAX_DEPTH:
                raise ValueError(
                    f"it is nested beyond {_MAX_DEPTH} levels or {_MAX_ENTRIES} entries"
                )
            for key, inner in items:
                if type(key) not in (str, int) or len(str(key)) > _MAX_NAME:
                    raise ValueError(
                        f"a key under {name!r:.60} is no text or number of up to {_MAX_NAME} "
                        "characters"
                    )
                waiting.append(((*keys, str(key)), inner))
        elif value is not None and type(value) not in (str, int, float, bool):
            raise ValueError(f"expected arrays alone, got {_kind(value)} under {name!r:.60}")
    if not found:
        raise ValueError("it holds no arrays")
    return found


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


def _dtype(given: Any) -> np.dtype:
    if type(given) is not _Dtype or type(given.code) is not str:
        raise ValueError("it has no type of numbers")
    if not _NUMBERS.fullmatch(given.code):
        raise ValueError(f"it is of type {given.code!r:.40}, not of numbers")
    _, order, *_ = given.state
    if order not in _ORDERS:
        raise ValueError(f"its byte order is {order!r:.40}")
    return np.dtype(order + given.code)


def _is_size(number: Any) -> bool:
    return restricted_pickles.is_count(number) and number.bit_length() <= 48


def _to_array(array: _Array, room: int) -> np.ndarray:
    """The array, read-only, after a check that its bytes are there: at most `room`."""
    if type(array.state) is not tuple or len(array.state) != 5:
        raise ValueError("it was never filled in")
    _, shape, given, fortran, data = array.state
    dtype = _dtype(given)
    # Products of thousands of sizes, or of very long ones, would take for ever.
    if type(shape) is not tuple or len(shape) > _MAX_AXES or not all(map(_is_size, shape)):
        raise ValueError("it has no valid shape")
    if type(data) is _Encoded:
        text, encoding = data
        if type(text) is not str or encoding != "latin1":
            raise ValueError("its bytes are not encoded in latin1")
        data = text.encode("latin1")
    if type(data) not in (bytes, bytearray):
        raise ValueError(f"its bytes are {_kind(data)}")
    if len(data) > room or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"its shape {shape!s:.60} and {dtype.str} do not fit its bytes")
    made = np.ndarray(shape, dtype, buffer=data, order="F" if fortran else "C")
    made = made if array.axes is None else made.transpose(array.axes)
    made.flags.writeable = False
    return made


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that `pickle.dump` wrote from nested dictionaries.

    Args:
      path: a pickle of protocol 2 or later; dictionaries, lists and tuples of arrays of numbers.
        Text and plain numbers between them are passed over.

    Returns:
      Keys joined by dots (of lists: positions) to read-only array.

    Raises:
      ValueError: the file names anything but numpy's arrays (nothing of it is called), is damaged,
        or is something else than nested dictionaries of arrays of numbers.
      OSError: the file cannot be read.
    """
    data = pathlib.Path(path).read_bytes()
    with restricted_pickles.one_error(path):
        if not data.startswith(b"\x80"):
            raise ValueError("it is no pickle of protocol 2 or later")
        found = _flatten(restricted_pickles.load(io.BytesIO(data), _Unpickler))
        arrays: dict[str, np.ndarray] = {}
        made: dict[int, np.ndarray] = {}  # of stand-ins under several names
        room = len(data)
        for name, array in found.items():
            if id(array) not in made:
                try:
                    made[id(array)] = _to_array(array, room)
                except ValueError as error:
                    raise ValueError(f"array {name!r:.60}: {error}") from error
                room -= made[id(array)].nbytes
            arrays[name] = made[id(array)]
    return arrays
