"""Every read and write of a workdir, on local disk and on gs://; files appear whole or not at all.

A place is a `pathlib.Path`, or on gs:// an `etils.epath.Path`, which has the same methods:
annotations say the former. Methods that only look (`exists`, `glob`, `iterdir`) are called
on it; all that reads, writes, moves or deletes is here. Of several processes the first does it,
the others do nothing. On an object store one object appears at once, but nothing is appended or
renamed, and a folder is no more than the start of a name.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from warm_diffusion.runtime.console import say

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_MOST_JSON = 2**24  # bytes: a configuration has ten thousand
_PUT_SECONDS = 1.0  # Google's limit on how often one object is written


def path(where: str | os.PathLike) -> pathlib.Path:
    """The place that a user names: an absolute local path, or one on gs://.

    Raises:
      ValueError: another scheme, gs:// without gcsfs or credentials, or a bucket that is not there.
    """
    text = os.fspath(where)
    if not _SCHEME.match(text):
        return _expanded(text)
    bucket, _, inside = text.removeprefix("gs://").partition("/")
    if text.startswith("gs:/") and not text.startswith("gs://"):
        raise ValueError(
            f"{text} has lost a slash: give gs://BUCKET/FOLDER as a string or as etils.epath.Path, "
            "not as pathlib.Path"
        )
    if not text.startswith("gs://") or not bucket:
        raise ValueError(f"expected a local path or gs://BUCKET/FOLDER, got {text}")
    if set("*?[]") & set(text) or ".." in inside.split("/"):
        raise ValueError(f"a gs:// path must not contain * ? [ ] or .., got {text}")
    _check_bucket(bucket)
    return epath.Path(text)


def local(where: str | os.PathLike, name: str) -> pathlib.Path:
    """An absolute local path of what cannot lie elsewhere, which a ValueError calls `name`."""
    if _SCHEME.match(os.fspath(where)):
        raise ValueError(f"{name} must be a local path, got {os.fspath(where)}: copy it here first")
    return _expanded(os.fspath(where))


def _expanded(text: str) -> pathlib.Path:
    """A local path, absolute, with ~ and ~USER replaced."""
    first, *rest = pathlib.Path(text).parts or ("",)
    if first == "~":
        return _home().joinpath(*rest)
    try:
        return pathlib.Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"there is no user {first[1:]}, got {text}: give the folder") from error


def _home() -> pathlib.Path:
    """The user's home folder, or where a container's user has none, a temporary one.

    Compiled programs are kept there, so it must be nobody else's.
    """
    with contextlib.suppress(RuntimeError):
        return pathlib.Path.home()
    folder = pathlib.Path(tempfile.gettempdir()) / f"warm_diffusion-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or not stat.S_ISDIR(folder.lstat().st_mode):
        raise ValueError(f"{folder} is another user's: set HOME to a folder")
    say(f"note     there is no home folder (HOME is not set): caches are kept in {folder}")
    os.environ["HOME"] = str(folder)  # matplotlib and others would complain at length
    return folder


def is_local(place: pathlib.Path) -> bool:
    """Returns whether a place is on this machine's file system."""
    return isinstance(place, pathlib.Path)


def check_for_checkpoints(workdir: pathlib.Path) -> None:
    """Raises ValueError for a workdir that orbax, which takes paths for patterns, cannot read."""
    for text in (str(workdir), os.path.realpath(workdir)) if is_local(workdir) else ():
        if set("*?[]\\") & set(text) or text != text.encode(errors="ignore").decode():
            shown = text.encode(errors="backslashreplace").decode()
            raise ValueError(
                "--workdir must be UTF-8 without * ? [ ] \\, else its checkpoints could not be "
                f"read, got {shown}"
            )


def default_cache_dir() -> pathlib.Path:
    """The user's cache folder for this project ($XDG_CACHE_HOME or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return pathlib.Path(base) / "warm_diffusion"


@functools.cache
def object_store():
    """gcsfs's file system, made once, see `gcs`; ImportError without gcsfs."""
    from warm_diffusion.runtime import gcs

    return gcs.connect()


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Raises ValueError unless the objects of a bucket can be listed; asks once in a process."""
    try:
        object_store().call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except ImportError as error:
        raise ValueError(
            f"gs://{bucket} needs gcsfs ({error}): pip install '.[gcs]' in a checkout"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no bucket gs://{bucket}: correct the path, or make it by gcloud storage "
            f"buckets create gs://{bucket}"
        ) from error
    # Credentials that are missing, wrong, or a file that cannot be read, for which google.auth has
    # many types.
    except Exception as error:
        if getattr(error, "errno", None) == errno.EIO:
            raise
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"gs://{bucket} cannot be read ({words}): it needs credentials, such as by gcloud auth "
            "application-default login, or GOOGLE_APPLICATION_CREDENTIALS=FILE"
        ) from error


def write_bytes(where: str | os.PathLike, content: bytes) -> None:
    """Writes a file, and the folders above: readers see the old one or the new one."""
    write_files({path(where): content})


def write_files(files: Mapping[pathlib.Path, bytes]) -> None:
    """Writes several files, each as `write_bytes` does; on gs:// many at a time."""
    if jax.process_index():
        return
    remote = {str(place): content for place, content in files.items() if not is_local(place)}
    if remote:
        # Not open("wb"): an exception inside it publishes the part that is written.
        object_store().pipe(remote)
    for place in filter(is_local, files):
        with _whole(place) as partial, naming(place):
            partial.write_bytes(files[place])


@contextlib.contextmanager
def naming(where: str | os.PathLike) -> Iterator[None]:
    """Names the file in an OSError that does not, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = os.fspath(where)
        raise


@contextlib.contextmanager
def _whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name to write a local file under, which becomes the target when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(where: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file, see `to_json`."""
    write_bytes(where, to_json(content))


def to_json(content: Any) -> bytes:
    """A JSON file; numpy's numbers become plain, those that are not finite are refused."""
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda number: number.item())
    return (text + "\n").encode()


def read_bytes(where: str | os.PathLike, most: int = -1) -> bytes:
    """What a regular file holds; ValueError for a pipe or a device, which might never end, and for
    more than `most` bytes, where that is given."""
    place = path(where)
    if is_local(place) and place.exists() and not (place.is_file() or place.is_dir()):
        raise ValueError(f"{place} is not a regular file: remove it")
    with naming(place), place.open("rb") as file:
        content = file.read(most + 1 if most >= 0 else -1)
    if 0 <= most < len(content):
        raise ValueError(f"{place} has more than the {most:,} bytes that such a file may have")
    return content


def read_json(where: str | os.PathLike) -> Any:
    """Returns the content of a JSON file; OSError, or ValueError if it is not JSON."""
    content = read_bytes(where, _MOST_JSON)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON ({error})") from error


def write_npz(where: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays by name, as numpy.savez does; `open_npz` reads them."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes(where, content.getvalue())


def open_npz(where: str | os.PathLike) -> np.lib.npyio.NpzFile:
    """An .npz file, without pickles; damage shows as numpy shows it."""
    return np.load(io.BytesIO(read_bytes(where)), allow_pickle=False)


class Lines:
    """A text file that grows by lines, written by one process.

    On gs:// the whole text is put: as lines come, but not more than once a second, and at `flush`.
    """

    def __init__(self, where: str | os.PathLike, keep: Callable[[str], bool] = lambda line: True):
        """Opens the file; of the lines that it has, those that `keep` does not hold of go."""
        self._path, self._put_at = path(where), -float("inf")
        found = read_bytes(self._path) if self._path.exists() else b""
        lines = found.decode(errors="replace").splitlines()
        self._text = "".join(line + "\n" for line in lines if keep(line))
        self._is_put = self._text.encode() == found
        self.flush()

    def append(self, line: str) -> None:
        """Adds a line."""
        if jax.process_index():
            return
        if is_local(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self._path), self._path.open("a") as file:
                file.write(line + "\n")
            return
        self._text, self._is_put = self._text + line + "\n", False
        if time.monotonic() - self._put_at >= _PUT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is only kept so far."""
        if not self._is_put:
            write_bytes(self._path, self._text.encode())
            self._put_at, self._is_put = time.monotonic(), True


def write_folder(where: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Writes a new folder of files by name, whole or not at all.

    On gs:// the last of them comes last: a kill before it leaves a folder without that file.
    """
    folder = path(where)
    if jax.process_index():
        return
    if is_local(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            write_files({partial / name: content for name, content in files.items()})
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            remove(partial)
        return
    *others, last = ((folder / name, content) for name, content in files.items())
    try:
        write_files(dict(others))
        write_files(dict([last]))
    except BaseException:
        remove(folder)
        raise


def move(source: pathlib.Path, target: pathlib.Path, marker: str = "") -> None:
    """Moves a file or a folder to a place that is free.

    On gs:// it is copied, then deleted. `marker` names the file without which a folder counts for
    nothing: it is deleted first, so that no part of the folder ever passes for the whole.
    """
    if jax.process_index():
        return
    if is_local(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    object_store().copy(str(source), str(target), recursive=source.is_dir())
    if marker:
        (source / marker).unlink(missing_ok=True)
    remove(source)


def remove(place: pathlib.Path) -> None:
    """Deletes a file or a folder, if it exists; on disk as much of a folder as possible."""
    if jax.process_index():
        return
    if not is_local(place):
        place.rmtree(missing_ok=True)
    elif place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def fetch(where: str | os.PathLike, cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    """A local file of the same content: a local one itself, of one on gs:// a copy, made once.

    Copies are kept in cache_dir, or the user's cache; ValueError if there is no file on gs://.
    """
    place = path(where)
    if is_local(place):
        return place
    if not place.exists() or place.is_dir():
        raise ValueError(f"there is no file {place}")
    found = object_store().info(str(place))
    key = hashlib.sha256(f"{place} {found['generation']}".encode()).hexdigest()[:16]
    target = (cache_dir or default_cache_dir()) / "fetched" / key / place.name
    if not target.exists():
        say(f"fetch    {place}, {found['size'] / 1e6:,.1f} MB, to {target}")
        with _whole(target) as partial:
            object_store().get_file(str(place), str(partial))
            os.utime(partial, (0, 0))  # a repeated copy is the same file to prepared data
    return target


# A path that cannot be is a mistake in the command; all else is the machine's state.
_MISTAKES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM,
             errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # fmt: skip
# These count even where a library, or a ValueError with a place in its message, has wrapped them.
_STATE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE,
          errno.EBUSY, errno.ENOTEMPTY, errno.EMFILE, errno.ENFILE)  # fmt: skip
# TensorStore, which orbax writes with, reports in texts; the store's passing troubles as well, when
# it has tried for fifteen minutes.
_ON_DISK = re.compile(r"os_error_code='(\d+)'")
_ON_STORE = re.compile(r"http_response_code='(\d+)'|curl_code='")
_REFUSED = {"401": errno.EACCES, "403": errno.EACCES, "404": errno.ENOENT}


def explain(error: BaseException) -> tuple[int, str] | None:
    """Exit status and words for an error of the file system's; None for others.

    An error that came from a full disk, however deep inside a library, is one.
    """
    chain, top = [], error
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for error in chain:
        number = _number(error)
        if not number or (error is not top and number not in _STATE):
            continue
        named = re.search(r'"(/[^"]*)"', str(error))
        where = getattr(error, "filename", None) or (named and named[1])
        if where:
            reason = (
                f"{os.fspath(where)}: {getattr(error, 'strerror', None) or os.strerror(number)}"
            )
        elif isinstance(error, OSError) and error.errno:
            reason = str(top) if error is not top else f"a file: {os.strerror(number)}"
        else:
            reason = str(error).partition(" [")[0]
        if number in _MISTAKES:
            return 2, reason
        sound = "What was written before is sound; when this has passed, the same command continues"
        return 74, f"{reason}. {sound}"  # EX_IOERR of sysexits.h
    return None


def _number(error: BaseException) -> int | None:
    """The number of an error of the file system's; None for others."""
    if found := _ON_DISK.search(str(error)):
        return int(found[1])
    if found := _ON_STORE.search(str(error)):
        return _REFUSED.get(found[1], errno.EIO)
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT  # fsspec gives none
    return error.errno if isinstance(error, OSError) else None


def digest(tree: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of a tree's arrays."""
    found = hashlib.sha256()
    for name, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
