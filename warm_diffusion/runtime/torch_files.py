"""Arrays out of torch's files and of EDM's networks, without torch and without running anything.

A pickle is a program that may call anything. Here the few names that these files need get stand-ins
that do nothing, every other name is refused, and arrays are made after the pickle has ended, from
checked offsets. There are three layouts:

    zip      a state dictionary since torch 1.6: NAME/data.pkl, and NAME/data/KEY with the bytes of
             each storage
    legacy   the same before: five pickles in a row (magic number, protocol 1001, system, object,
             keys), then for each key the number of elements as int64 and their bytes
    network  EDM's .pkl: modules by their class name and state, under "ema"; each storage is a
             legacy file of its own. Their source code (`module_src`) is not looked at.

A pickle may also be small and fill the memory or the stack, so its instructions are looked at
first, without being followed:

    memo     one place an instruction; the unpickler would make room for one far beyond
    tuples   nested deeply, their hash overflows the stack and ends the process

Deliberately absent: writing; sparse, quantised, bfloat16 and big-endian tensors.
"""

import collections
import contextlib
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from warm_diffusion.runtime import storage

_MAGIC_NUMBER, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1",
    "BoolStorage": "<?",
}  # fmt: skip
# Modules of which every name is passed over: what they make is neither a weight nor looked at.
_PASSED_OVER = ("torch.nn.modules.container", "numpy", "numpy.core.multiarray",
                "numpy._core.multiarray")  # fmt: skip
# Text instructions (INST) and those with a mark (OBJ) call a stand-in, which may be a tuple.
_NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INST", "OBJ")
_MAX_NESTING = 20_000  # weights have four a tensor; 100,000 nested ones still fit 8 MB of stack
# What a damaged or hostile file makes the unpickler, its stand-ins or zipfile raise.
_BROKEN = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AttributeError, LookupError,
    TypeError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip


class Network(NamedTuple):
    """A network of EDM's: the name of its class, its plain attributes, arrays by dotted name."""

    class_name: str
    attributes: dict[str, Any]
    arrays: dict[str, np.ndarray]


# Tuples: a pickle may try to set the state of what it is given, and these cannot change.
class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage | bytes  # the latter: a legacy file that holds one
    offset: int  # elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Keeps the state that a pickle gives it, and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, allowed: Mapping, **options: str) -> None:
        super().__init__(file, **options)
        self._allowed = allowed
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        # Classes and functions are made each time: a pickle that alters one alters its own copy.
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "dnnlib.util" | "dnnlib", "EasyDict":
                return type(name, (dict,), {})
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda storage, offset, shape, strides, *_: _Tensor(
                    storage, offset, shape, strides
                )
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case ("torch.storage", "_load_from_bytes") | (
                "torch_utils.persistence", "_reconstruct_persistent_obj"
            ):  # fmt: skip
                return lambda content: content
            case "torch", _ if name in _STORAGES:
                return _STORAGES[name]
        if module in _PASSED_OVER:
            return type("inert", (_Inert,), {})
        raise ValueError(f"it names {f'{module}.{name}'!r:.100}, which is never run")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError("it refers to something that is not a storage")
        _, dtype, key, _, size, *view = pid
        if any(view):
            raise ValueError("it holds a view of a storage, of a very old torch: save it again")
        if dtype not in _STORAGES.values() or not isinstance(key, str) or not _is_count(size):
            raise ValueError("it describes a storage wrongly")
        self.storages[key] = _Storage(key, dtype, size)
        return self.storages[key]


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def unpickle(
    file: io.BytesIO, allowed: Mapping[tuple[str, str], Any] = {}, **options: str
) -> tuple[Any, dict[str, _Storage]]:
    """The next object in the file, made of stand-ins, and the storages that it names.

    `allowed` is what else it may name, by (module, name); `options` are those of pickle's.
    """
    start, nesting = file.tell(), 0
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > position:
            raise ValueError(f"its pickle asks for a memo of {argument} places")
        nesting += opcode.name in _NESTING
        if nesting > _MAX_NESTING:
            raise ValueError(f"its pickle makes more than {_MAX_NESTING} tuples")
    file.seek(start)
    unpickler = _Unpickler(file, allowed, **options)
    return unpickler.load(), unpickler.storages


@contextlib.contextmanager
def _one_error(path: Any) -> Iterator[None]:
    """Whatever goes wrong with the file inside, as a ValueError of one line that names it."""
    try:
        yield
    except _BROKEN as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"cannot read {path}: it is damaged ({reason})") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _to_arrays(tensors: Mapping[Any, Any], data: Mapping[str, bytes] = {}) -> dict[str, np.ndarray]:
    """Read-only views of the storages' bytes, after a check that each stays inside."""
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"expected a dictionary of tensors, got {type(tensors).__name__}")
    arrays = {}
    for name, tensor in tensors.items():
        if type(name) is not str or type(tensor) is not _Tensor:
            raise ValueError(f"expected tensors, got {type(tensor).__name__} under {name!r:.60}")
        try:
            arrays[name] = _to_array(tensor, data)
        except ValueError as error:
            raise ValueError(f"tensor {name!r:.60}: {error}") from error
    return arrays


def _to_array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    kept, offset, shape, strides = tensor
    if type(kept) is bytes:
        kept, data = _read_legacy(io.BytesIO(kept))
    if type(kept) is not _Storage:
        raise ValueError("it has no storage")
    values = np.frombuffer(data[kept.key], kept.dtype)
    if len(values) != kept.size:
        raise ValueError(f"expected a storage of {kept.size}, got {len(values)}")
    if len(shape) != len(strides) or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError("it has no valid shape")
    if 0 in shape:
        return np.zeros(shape, values.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # A tensor may be larger than its storage (expanded), but then any file can fill the memory.
    if last >= len(values) or math.prod(shape) > len(values):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    strides = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, strides, writeable=False)


def _read_zip(file: io.BytesIO) -> tuple[Any, dict[str, bytes]]:
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
        content, storages = unpickle(io.BytesIO(archive.read(pickles[0])))
        return content, {key: archive.read(f"{root}data/{key}") for key in storages}


def _read_legacy(file: io.BytesIO) -> tuple[Any, dict[str, bytes]]:
    (magic, _), (protocol, _), (system, _) = (unpickle(file) for _ in range(3))
    if (magic, protocol) != (_MAGIC_NUMBER, _PROTOCOL):
        raise ValueError("it is a pickle, but not torch's")
    if system["little_endian"] is not True:
        raise ValueError("it was written on a big-endian machine")
    (content, storages), (keys, _) = unpickle(file), unpickle(file)
    data = {}
    for key in keys:
        (size,) = struct.unpack("<q", file.read(8))
        data[key] = file.read(size * np.dtype(storages[key].dtype).itemsize)
    return content, data


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays, read-only, by name of a state dictionary that `torch.save` wrote.

    Raises:
      ValueError: the file names anything but tensors (nothing of it is called), is damaged, or is
        something else than one dictionary of tensors.
      OSError: the file cannot be read.
    """
    data = storage.read_bytes(path)
    with _one_error(path):
        read = _read_zip if data.startswith(b"PK") else _read_legacy
        return _to_arrays(*read(io.BytesIO(data)))


def read_network(path: str | os.PathLike) -> Network:
    """The averaged network in a .pkl of EDM's, such as network-snapshot-*.pkl.

    Raises:
      ValueError: the file names anything that EDM's do not (nothing of it is called), is damaged,
        or holds no network.
      OSError: the file cannot be read.
    """
    data = storage.read_bytes(path)
    with _one_error(path):
        content, _ = unpickle(io.BytesIO(data))
        if not isinstance(content, dict) or "class_name" not in content.get("ema", {}):
            raise ValueError("it is a pickle, but holds no network of EDM's under 'ema'")
        network, tensors = content["ema"], {}
        _walk(network, "", tensors, set())
        plain = {k: v for k, v in network["state"].items() if type(v) in (bool, int, float, str)}
        return Network(str(network["class_name"]), plain, _to_arrays(tensors))


def _walk(module: Any, prefix: str, tensors: dict[str, Any], seen: set[int]) -> None:
    """Collects the tensors of a module and of those inside by their dotted names."""
    if id(module) in seen:
        raise ValueError("it holds a module twice")
    seen.add(id(module))
    state = module.state if isinstance(module, _Inert) else module["state"]
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in state[kind].items():
            if type(name) is not str or len(name) > 100:
                raise ValueError(f"a part of {prefix!r:.60} has no valid name")
            if kind == "_modules" and value is not None:
                _walk(value, f"{prefix}{name}.", tensors, seen)
            elif value is not None:
                tensors[f"{prefix}{name}"] = value
