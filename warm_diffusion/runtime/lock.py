"""One writer per workdir: a lock that says who holds it, WORKDIR/lock.json.

On disk the kernel keeps it (flock), so it ends with its holder, however that ends; NFS asks its
server. Where a file system has no locks, or keeps them to one machine (most mounts of object
stores), a second writer is not seen; the former is said.

On gs:// it is an object that is made only where there is none (if-generation-match) and renewed
every 20 seconds. One that nobody renews for 90 seconds is taken over, at once if its holder was a
process of this machine that has ended; a holder that was cut off for so long finds out before it
writes a checkpoint.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import jax

from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say

_RENEW_SECONDS, _STALE_SECONDS, _POLL_SECONDS = 20.0, 90.0, 2.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Holds the lock of a workdir; of several processes of one run the first does.

    Yields:
      A function that raises ValueError where the lock was lost to another process.

    Raises:
      ValueError: another process holds it; the message says which, and since when.
    """
    place = storage.path(workdir) / "lock.json"
    if jax.process_index():
        yield lambda: None
    elif storage.is_local(place):
        with _held_file(place):
            yield lambda: None
    else:
        with _Lease(place) as lease:
            yield lease.check


def _who() -> str:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n"


def _refusal(place: pathlib.Path, text: str) -> ValueError:
    try:
        who = json.loads(text)
        told = f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        told = "another process"
    return ValueError(
        f"{place.parent} is being written by {told}: wait for it or end it, or give another "
        f"--workdir (the lock is {place})"
    )


@contextlib.contextmanager
def _held_file(path: pathlib.Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(path)
    try:
        file.truncate(0)
        file.write(_who())
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: nobody else's file is deleted
        file.close()


def _locked(path: pathlib.Path):
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise _refusal(path, file.read()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            say(f"note     {path.parent} has no locks ({error}): a second run would not be seen")
            return file
        # The one before may have deleted it between the two lines above.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


class _Lease:
    """The lock on gs://."""

    def __init__(self, place: pathlib.Path):
        self._place, self._store = place, storage.object_store()
        self._bucket, _, self._key = str(place).removeprefix("gs://").partition("/")
        self._generation, self._lost, self._ended = "", False, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> "_Lease":
        self._take()
        self._generation = self._found()["generation"]
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self._delete(self._generation)

    def check(self) -> None:
        """Raises ValueError where the lock is another's by now."""
        if self._lost:
            raise ValueError(
                f"{self._place} was taken over by another process while this one could not renew "
                "it: nothing more is written"
            )

    def _take(self) -> None:
        first, since = None, time.monotonic()
        while True:
            with contextlib.suppress(FileExistsError):
                self._store.pipe_file(str(self._place), _who().encode(), mode="create")
                return
            found = self._found()
            if found is None:
                continue
            if first is None:
                first, who = found, self._store.cat_file(str(self._place)).decode()
                if _has_ended(who):
                    self._delete(found["generation"])
                    first = None
                    continue
                say(f"wait     {_refusal(self._place, who)}; taken over unless it shows life")
            if _version(found) != _version(first):
                raise _refusal(self._place, self._store.cat_file(str(self._place)).decode())
            if time.monotonic() - since > _STALE_SECONDS:
                self._delete(found["generation"])
                continue
            time.sleep(_POLL_SECONDS)

    def _found(self) -> dict | None:
        try:
            return self._store.info(str(self._place))
        except FileNotFoundError:
            return None

    def _delete(self, generation: str) -> None:
        """Deletes the object if it is still the one of this generation."""
        found = self._found()
        if found and found["generation"] == generation:
            with contextlib.suppress(FileNotFoundError):
                self._store.call(
                    "DELETE", "b/{}/o/{}", self._bucket, self._key, generation=generation
                )

    def _renew(self) -> None:
        count = 0
        while not self._ended.wait(_RENEW_SECONDS):
            count += 1
            try:
                renewed = self._store.call(
                    "PATCH", "b/{}/o/{}", self._bucket, self._key, json_out=True,
                    ifGenerationMatch=self._generation, json={"metadata": {"renewed": str(count)}},
                )  # fmt: skip
                self._lost = renewed["generation"] != self._generation
            except (FileNotFoundError, FileExistsError):  # 404, 412
                self._lost = True
            # No network, credentials that run out: their types are many, and the next try may do.
            except Exception as error:
                say(f"note     {self._place} could not be renewed ({error})")
            if self._lost:
                return


def _has_ended(text: str) -> bool:
    """Whether a holder was a process of this machine that is no more."""
    try:
        who = json.loads(text)
        if who["host"] != socket.gethostname():
            return False
        os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return False


def _version(found: dict) -> tuple:
    return found["generation"], found.get("metadata")
