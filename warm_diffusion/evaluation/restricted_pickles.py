"""Unpicklers that run nothing: what the readers of other projects' files have in common.

A pickle is a program that may call anything. A reader's unpickler answers the few names that its
files need with inert stand-ins and refuses all others; whatever the pickle builds from them is
checked, and made into arrays, after it has ended.

A pickle may also be small and fill the memory or the stack. Its instructions are looked at first,
without being followed:

    memo       one place an instruction; a place far beyond would be made room for
    strings    those that are longer than the file (`pickletools` refuses them)
    tuples     nested deeply, their hash overflows the stack and ends the process
"""

import contextlib
import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, ClassVar

# Whatever a damaged or hostile file makes the unpickler, its stand-ins or zipfile raise.
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    OverflowError,
    MemoryError,
    RuntimeError,
)
# Text instructions (INST) and those with a mark (OBJ) call a stand-in, which may be a tuple.
_NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "INST", "OBJ")
_MAX_NESTING = 20_000  # weights have four a tensor; 100,000 nested ones still fit 8 MB of stack


class Unpickler(pickle.Unpickler):
    """Resolves the names that a subclass stands in for; any other is a ValueError.

    Attributes:
      contents: what its files hold, for the message.
    """

    contents: ClassVar[str]

    def stand_in(self, module: str, name: str) -> Any:
        """The inert object that a name of the pickle gets, or None for one to be refused."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        found = self.stand_in(module, name)
        if found is None:
            shown = f"{module}.{name}"
            raise ValueError(f"it names {shown!r:.100}, which {self.contents} never does")
        return found


def load(file: io.BytesIO, unpickler: type[Unpickler]) -> Any:
    """The next object in the file, made of stand-ins.

    Raises:
      ValueError: a name that is none of the unpickler's, or instructions that no sound file has.
      Exception: many types for damage; see `one_error`.
    """
    start, nesting = file.tell(), 0
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > position:
            raise ValueError(f"its pickle asks for a memo of {argument} places")
        nesting += opcode.name in _NESTING
        if nesting > _MAX_NESTING:
            raise ValueError(f"its pickle makes more than {_MAX_NESTING} tuples")
    file.seek(start)
    return unpickler(file).load()


@contextlib.contextmanager
def one_error(path: Any) -> Iterator[None]:
    """Whatever goes wrong with the file inside, as a ValueError of one line that names it."""
    try:
        yield
    except _BROKEN as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ValueError(f"cannot read {path}: it is damaged ({reason})") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def is_count(number: Any) -> bool:
    """Whether it is an integer of at least 0, and no bool."""
    return type(number) is int and number >= 0
