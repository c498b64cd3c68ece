"""Files of torch tensors, written opcode by opcode.

As `torch.save` of 1.4 (legacy) and 2.x (zip) writes them: pickle protocol 2 with persistent ids for
the storages.
"""

import io
import pickle
import struct
import zipfile

import numpy as np

LAYOUTS = ("zip", "legacy")
STORAGES = {"<f8": "Double", "<f4": "Float", "<f2": "Half", "<i8": "Long", "<u1": "Byte"}


def opcodes(value):
    """A value as opcodes: bytes are some already."""
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"  # MARK ... TUPLE
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()  # BINUNICODE
    if isinstance(value, bytes):
        return value
    return b"N" if value is None else pickle.dumps(value, 2)[2:-1]


def global_name(module, name):
    """The object of this name in a module."""
    return f"c{module}\n{name}\n".encode()


EMPTY = global_name("collections", "OrderedDict") + b")R"
REBUILD = global_name("torch._utils", "_rebuild_tensor_v2")


def tensor(layout, key, dtype, size, offset, shape, strides):
    """A view of the storage `key` of `size` elements."""
    kind = global_name("torch", f"{STORAGES[dtype]}Storage")
    view = (None,) if layout == "legacy" else ()
    storage = opcodes(("storage", kind, key, "cpu", size, *view)) + b"Q"  # BINPERSID
    return REBUILD + opcodes((storage, offset, shape, strides, False, EMPTY)) + b"R"


def dictionary(items):
    """A state dictionary: name to opcodes."""
    # The empty metadata of a state dictionary is set as its state: BUILD.
    body = b"".join(opcodes(name) + value for name, value in items.items())
    return EMPTY + b"(" + body + b"u" + b"}" + opcodes("_metadata") + EMPTY + b"sb"


def torch_file(layout, content, storages, compression=zipfile.ZIP_STORED):
    """A file around the opcodes `content`; storages: key to 1-d array."""
    program = b"\x80\x02" + content + b"."
    stream = io.BytesIO()
    if layout == "zip":
        with zipfile.ZipFile(stream, "w", compression) as archive:
            archive.writestr("weights/data.pkl", program)
            archive.writestr("weights/byteorder", b"little")
            for key, array in storages.items():
                archive.writestr(f"weights/data/{key}", array.tobytes())
            archive.writestr("weights/version", b"3\n")
        return stream.getvalue()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}}):
        stream.write(pickle.dumps(value, 2))
    stream.write(program)
    stream.write(pickle.dumps(sorted(storages), 2))
    for _, array in sorted(storages.items()):
        stream.write(struct.pack("<q", len(array)) + array.tobytes())
    return stream.getvalue()


# --- EDM's networks ------------------------------------------------------------------------------


def packed_tensor(array, storage=None):
    """A parameter whose storage is a legacy file of its own, as bytes."""
    array = np.ascontiguousarray(array)
    kind = global_name("torch", f"{STORAGES[array.dtype.str]}Storage")
    content = opcodes(("storage", kind, "0", "cpu", array.size, None)) + b"Q"
    storage = storage or torch_file("legacy", content, {"0": array.ravel()})
    loaded = global_name("torch.storage", "_load_from_bytes")
    loaded += b"B" + struct.pack("<I", len(storage)) + storage + b"\x85R"  # BINBYTES, TUPLE1
    strides = tuple(step // array.itemsize for step in array.strides)
    view = REBUILD + opcodes((loaded, 0, array.shape, strides, False, EMPTY)) + b"R"
    return global_name("torch._utils", "_rebuild_parameter") + opcodes((view, False, EMPTY)) + b"R"


def module(class_name, parameters, modules=(), **attributes):
    """A module as EDM's persistence pickles it: a call with its class name, source and state."""

    def written(items):
        return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in dict(items).items()) + b"u"

    state = {
        "_parameters": written(parameters),
        "_buffers": b"}",
        "_modules": written(modules),
        **attributes,
    }
    fields = {"class_name": class_name, "module_src": "raise SystemExit", "state": written(state)}
    # NEWOBJ makes the dictionary, SETITEMS fills it.
    meta = global_name("dnnlib.util", "EasyDict") + b")\x81" + written(fields)[1:]
    call = global_name("torch_utils.persistence", "_reconstruct_persistent_obj")
    return call + meta + b"\x85R"


def network_file(ema):
    """A .pkl of EDM's around the opcodes of its network."""
    return b"\x80\x04}" + opcodes("ema") + ema + b"s."
