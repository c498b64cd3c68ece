"""Tensors out of torch's checkpoint files, without torch and without running what they contain.

A pickle is a program that may call anything. This reader lets it name only what a dictionary of
tensors is made of (`collections.OrderedDict`, the storage types and torch's rebuild function) and
answers those names with inert stand-ins. Arrays are made after the pickle has ended, from checked
offsets. Two layouts exist; the serialization notes of torch's documentation describe both:

    zip     since torch 1.6: NAME/data.pkl, and NAME/data/KEY with the bytes of each storage
    legacy  before: five pickles in a row (magic number, protocol 1001, system, object, keys), then
            for each key the element count as int64 and the bytes

Deliberately absent: writing, whole modules, sparse, quantised and bfloat16 tensors, big-endian files.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "<?",
}
# Whatever a damaged or hostile pickle makes the unpickler or the stand-ins raise.
_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    UnicodeDecodeError,
)


# Tuples: a pickle may try to set the state of what it is given, and these cannot change.
class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RestrictedUnpickler(pickle.Unpickler):
    """Names resolve to the stand-ins of this module or raise ValueError."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # Made anew, so that a pickle that alters the function alters nothing but its own copy.
            return lambda storage, offset, size, stride, *unused: _Tensor(
                storage, offset, size, stride
            )
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ValueError(f"it names {module}.{name}, which no dictionary of tensors needs; refused")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is not a storage")
        _, dtype, key, _, size = pid[:5]
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("it holds a view of a storage (torch before 0.4): save it again")
        if dtype not in _STORAGES.values() or not isinstance(key, str) or not _is_count(size):
            raise ValueError("it describes a storage wrongly")
        return _Storage(key, dtype, size)


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _unpickle(file: io.BufferedIOBase) -> Any:
    try:
        return _RestrictedUnpickler(file).load()
    except _BROKEN as error:
        raise ValueError(f"its pickle is damaged ({error})") from error


def _to_array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    """A read-only view of the storage, after a check that it stays inside."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    last = tensor.offset
    if all(map(_is_count, numbers)) and len(tensor.shape) == len(tensor.strides):
        last += sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        size = math.prod(tensor.shape)
        # A tensor larger than its storage (expanded) may be huge once it is copied.
        if size == 0:
            return np.zeros(tensor.shape, storage.dtype)
        if last < len(storage) and size <= len(storage):
            strides = [s * storage.itemsize for s in tensor.strides]
            start = storage[tensor.offset :]
            return np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)
    raise ValueError("a tensor reaches beyond its storage")


def _named_tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected a dictionary of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        tuples = isinstance(tensor, _Tensor) and isinstance(tensor.storage, _Storage)
        if not tuples or not isinstance(tensor.shape, tuple) or not isinstance(tensor.strides, tuple):
            raise ValueError(f"expected a dictionary of tensors, got {type(tensor).__name__} {name}")
    return content
