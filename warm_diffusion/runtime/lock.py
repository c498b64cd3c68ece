"""One writer per workdir: a lock, with WORKDIR/lock.json to say who holds it.

On disk it is the kernel's (`filelock`), so it ends with its holder, however that ends; NFS asks its
server. Mounts that keep locks to one machine (most of object stores) do not show a second writer on
another one.

On gs:// it is an object that is made only where there is none (if-generation-match) and renewed
every 20 seconds. One that nobody renews for 90 seconds is taken over, at once if its holder was a
process of this machine that has ended; a holder that was cut off for so long finds out before it
writes a checkpoint.
"""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

import filelock
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
        place.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: it stays, and filelock empties it.
        lock = filelock.FileLock(place.with_name(".lock"), timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise _refusal(place) from None
        except (NotImplementedError, OSError) as error:  # the former is filelock's for ENOSYS
            if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                raise
            say(f"note     {place.parent} has no locks ({error}): a second run would not be seen")
        try:
            storage.write_bytes(place, _who())
            yield lambda: None
        finally:
            try:
                place.unlink(missing_ok=True)  # before it is let go: nobody else's is deleted
            finally:
                lock.release()
    else:
        lease = _Lease(place)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.let_go()


def _who() -> bytes:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    return json.dumps(who | {"id": secrets.token_hex(4)}).encode()


def _refusal(place: pathlib.Path) -> ValueError:
    try:
        who = storage.read_json(place)
        holder = f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "another process"
    return ValueError(
        f"{place.parent} is being written by {holder}: wait for it or end it, or give another "
        f"--workdir (the lock is {place})"
    )


def _has_ended(place: pathlib.Path) -> bool:
    """Returns whether the holder was a process of this machine that has ended."""
    try:
        who = storage.read_json(place)
        if who["host"] == socket.gethostname():
            os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return False


class _Lease:
    """The lock on gs://."""

    def __init__(self, place: pathlib.Path):
        self._place, self._store = place, storage.object_store()
        self._bucket, _, self._key = str(place).removeprefix("gs://").partition("/")
        self._generation, self._lost, self._ended = "", False, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> None:
        """Waits for one that is left to become stale; raises ValueError where it is renewed."""
        self._check_permission()
        first, since, own = None, time.monotonic(), _who()
        while True:
            with contextlib.suppress(FileExistsError):
                self._store.pipe_file(str(self._place), own, mode="create")
                break
            if (found := self._found()) is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if self._place.read_bytes() == own:
                    break  # it was made by a call whose answer was lost
            if _has_ended(self._place):
                self._delete(found["generation"])
                continue
            if first is None:
                first = found
                say(f"wait     {_refusal(self._place)}; taken over unless it is renewed")
            if any(found.get(key) != first.get(key) for key in ("generation", "metadata")):
                raise _refusal(self._place)
            if time.monotonic() - since > _STALE_SECONDS:
                self._delete(found["generation"])
            else:
                time.sleep(_POLL_SECONDS)
        self._generation = self._found()["generation"]
        self._thread.start()

    def check(self) -> None:
        """Raises ValueError where the lock is another's by now."""
        if self._lost:
            raise ValueError(
                f"{self._place} was taken over by another process while this one could not renew "
                "it: nothing more is written"
            )

    def let_go(self) -> None:
        self._ended.set()
        self._thread.join()
        self._delete(self._generation)

    def _check_permission(self) -> None:
        """Raises PermissionError for a role that may not delete, before anything is written."""
        with contextlib.suppress(FileNotFoundError):
            self._store.call("DELETE", "b/{}/o/{}", self._bucket, f"{self._key}.probe")

    def _found(self) -> dict | None:
        with contextlib.suppress(FileNotFoundError):
            return self._store.info(str(self._place))

    def _call(self, method: str, **options):
        return self._store.call(method, "b/{}/o/{}", self._bucket, self._key, **options)

    def _delete(self, generation: str) -> None:
        """Deletes the object if it is still the one of this generation."""
        found = self._found()
        if found and found["generation"] == generation:
            with contextlib.suppress(FileNotFoundError):
                self._call("DELETE", generation=generation)

    def _renew(self) -> None:
        count = 0
        while not self._lost and not self._ended.wait(_RENEW_SECONDS):
            count += 1
            try:
                renewed = self._call(
                    "PATCH", json_out=True, ifGenerationMatch=self._generation,
                    json={"metadata": {"renewed": str(count)}},
                )  # fmt: skip
                self._lost = renewed["generation"] != self._generation
            except (FileNotFoundError, FileExistsError):  # 404, 412
                self._lost = True
            except OSError as error:  # no network, credentials that run out: the next try may do
                say(f"note     {self._place} could not be renewed ({error})")
