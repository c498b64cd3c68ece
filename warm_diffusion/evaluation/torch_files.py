"""Tensors out of torch's checkpoint files, without torch and without running what they contain.

A pickle may name only what a dictionary of tensors is made of (`collections.OrderedDict`, the
storage types and torch's rebuild function), and gets inert stand-ins (`restricted_pickles`); arrays
are made after it has ended, from checked offsets. Two layouts exist:

    zip     since torch 1.6: NAME/data.pkl, and NAME/data/KEY with the bytes of each storage
    legacy  before: five pickles in a row (magic number, protocol 1001, system, object, keys), then
            for each key the number of elements as int64 and their bytes

Deliberately absent: writing, whole modules, sparse, quantised, bfloat16 and big-endian tensors.
"""

import collections
import io
import math
import os
import pathlib
import struct
import zipfile
from typing import Any, NamedTuple

import numpy as np

from warm_diffusion.evaluation import restricted_pickles
from warm_diffusion.evaluation.restricted_pickles import is_count

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


class _Unpickler(restricted_pickles.Unpickler):
    contents = "a dictionary of tensors"

    def stand_in(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # Made anew: a pickle that alters the function alters nothing but its own copy.
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            )
        return _STORAGES.get(name) if module == "torch" else None

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is not a storage")
        _, dtype, key, _, size = pid[:5]
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError("it holds a view of a storage, of a very old torch: save it anew")
        if dtype not in _STORAGES.values() or not isinstance(key, str) or not is_count(size):
            raise ValueError("it describes a storage wrongly")
        return _Storage(key, dtype, size)


def _unpickle(file: io.BytesIO) -> Any:
    """The next object in the file."""
    return restricted_pickles.load(file, _Unpickler)


def _check_tensors(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected a dictionary of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(
                f"expected a dictionary of tensors, got {type(tensor).__name__} under {name!r:.60}"
            )
        if not isinstance(tensor.storage, _Storage):
            raise ValueError(f"tensor {name!r:.60} has no storage")
    return content


def _to_array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """A read-only view of a storage's bytes, after a check that it stays inside."""
    storage = np.frombuffer(data, tensor.storage.dtype)
    _, offset, shape, strides = tensor
    if len(storage) != tensor.storage.size:
        raise ValueError(f"expected a storage of {tensor.storage.size}, got {len(storage)}")
    if len(shape) != len(strides) or not all(map(is_count, (offset, *shape, *strides))):
        raise ValueError("a tensor has no valid shape")
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # A tensor may be larger than its storage (expanded), but then any file can fill the memory.
    if last >= len(storage) or math.prod(shape) > len(storage):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)


def _read_zip(file: io.BytesIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        # torch compresses nothing: a small archive that unpacks to a large one is none of its own.
        if sum(info.file_size for info in archive.infolist()) > len(file.getbuffer()):
            raise ValueError("it is a compressed archive, which torch's are not")
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("it is an archive, but not torch's: it lacks NAME/data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        tensors = _check_tensors(_unpickle(io.BytesIO(archive.read(pickles[0]))))
        keys = {tensor.storage.key for tensor in tensors.values()}
        data = {key: archive.read(f"{root}data/{key}") for key in keys}
    return {name: _to_array(tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_legacy(file: io.BytesIO) -> dict[str, np.ndarray]:
    if _unpickle(file) != _MAGIC_NUMBER:
        raise ValueError("it is a pickle, but not torch's")
    if _unpickle(file) != _PROTOCOL:
        raise ValueError(f"expected protocol version {_PROTOCOL}, got another")
    if _unpickle(file)["little_endian"] is not True:
        raise ValueError("it was written on a big-endian machine")
    tensors = _check_tensors(_unpickle(file))
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    data = {}
    for key in _unpickle(file):
        (size,) = struct.unpack("<q", file.read(8))
        data[key] = file.read(size * np.dtype(storages[key].dtype).itemsize)
    return {name: _to_array(tensor, data[tensor.storage.key]) for name, tensor in tensors.items()}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file that `torch.save` wrote from a state dictionary.

    Args:
      path: a .pth or .pt file, in torch's zip or legacy layout.

    Returns:
      Name to read-only array in torch's layout.

    Raises:
      ValueError: the file names anything but tensors (nothing of it is called), is damaged, or is
        something else than one dictionary of tensors.
      OSError: the file cannot be read.
    """
    data = pathlib.Path(path).read_bytes()
    with restricted_pickles.one_error(path):
        if data.startswith(b"PK"):
            return _read_zip(io.BytesIO(data))
        if data.startswith(b"\x80"):
            return _read_legacy(io.BytesIO(data))
        raise ValueError("it is no file of torch.save")
