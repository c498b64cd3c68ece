"""Google Cloud Storage through gcsfs, which fails here as a disk does.

gcsfs raises a dozen types of errors: some are no OSError, some have no number, and fsspec takes
some for "there is no such folder". One place decides what each of them means, for the calls of this
project, of etils.epath and of orbax, which all use the file system that `connect` registers.

    404, 412                  FileNotFoundError, FileExistsError
    401, 403                  PermissionError, which names the permission
    408, 429, 5xx, lost       the call is made again for five minutes, then OSError (EIO)
    other answers             OSError (EINVAL)

TensorStore, which orbax writes arrays with, has a client of its own that makes its calls again for
fifteen minutes; `storage.explain` reads its errors.
"""

import asyncio
import contextlib
import errno
import functools
import inspect
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping

os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is there epath prefers it
# Otherwise gcsfs asks for the kind of each bucket by another protocol, with warnings.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import aiohttp
import fsspec
import gcsfs
import requests
from gcsfs.retry import ChecksumError, HttpError
from google.auth import exceptions as auth

from warm_diffusion.runtime.console import say

_PATIENCE_SECONDS, _FIRST_PAUSE, _LONGEST_PAUSE = 300.0, 1.0, 32.0
_NOTE_AFTER, _NOTE_EVERY = 5.0, 60.0  # seconds
# Without gcsfs's own repetitions, which end after half a minute and log a traceback.
_REQUEST = inspect.unwrap(gcsfs.GCSFileSystem._request)
_DOWNLOAD = inspect.unwrap(gcsfs.GCSFileSystem._get_file_request)
_LOST = (
    aiohttp.ClientError, asyncio.TimeoutError, ConnectionError, requests.RequestException,
    ChecksumError, auth.TransportError,
)  # fmt: skip
_PERMISSION = re.compile(r"storage\.[a-zA-Z]+\.[a-zA-Z]+")
_IN_URL = re.compile(r"/b/([^/?]+)(?:/o/([^/?]+)|.*[?&]name=([^&]+))?")
_IN_UPLOAD = re.compile(rb'"name": "([^"]+)"')  # whose URL names the bucket alone


class FileSystem(gcsfs.GCSFileSystem):
    """gcsfs's, with the errors of a disk."""

    async def _request(self, method, path, *args, **options):
        call = functools.partial(_REQUEST, self, method, path, *args, **options)
        where = _name(self._format_path(path, args), options)
        return await _patiently(call, where)

    async def _get_file_request(self, rpath, *args, **options):
        call = functools.partial(_DOWNLOAD, self, rpath, *args, **options)
        return await _patiently(call, self.unstrip_protocol(rpath))

    async def _isdir(self, path):
        """Whether there are objects below; gcsfs takes an error for none."""
        with contextlib.suppress(FileNotFoundError):
            return (await self._info(path))["type"] == "directory"
        return False

    async def _delete_files(self, files, batchsize):
        """Deletes each by a request of its own: in gcsfs's batches errors are only texts."""
        done = []
        for first in range(0, len(files), batchsize):
            calls = map(self._rm_file, files[first : first + batchsize])
            done += await asyncio.gather(*calls, return_exceptions=True)
        return done


def connect() -> FileSystem:
    """The file system of everything on gs:// in this process."""
    # Listings are kept for ever otherwise: what other processes write would not be seen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    fsspec.register_implementation("gcs", FileSystem, clobber=True)
    logging.getLogger("fsspec.prefetcher").setLevel(logging.CRITICAL)  # it raises them as well
    return fsspec.filesystem("gcs")


def _name(url: str, options: Mapping) -> str:
    """The object that a request is about, or where it looks for objects."""
    found, data = _IN_URL.search(url), options.get("data")
    if not found:
        return url
    bucket, *names = found.groups()
    names = [urllib.parse.unquote(name) for name in names if name] or [options.get("prefix") or ""]
    if not names[0] and isinstance(data, bytes) and (uploaded := _IN_UPLOAD.search(data)):
        names = [uploaded[1].decode(errors="replace")]
    return f"gs://{bucket}/{names[0]}"


_noted = -float("inf")


async def _patiently(call: Callable[[], Awaitable], where: str):
    """The result of a call, which is made again while its error may pass by itself."""
    global _noted
    began, pause, minutes = time.monotonic(), _FIRST_PAUSE, _PATIENCE_SECONDS / 60
    expired = False  # a token: the first 401 makes gcsfs fetch another
    while True:
        try:
            return await call()
        except Exception as error:
            words = " ".join(str(error).split())[:200] or type(error).__name__
            if str(getattr(error, "code", "")) == "401" and not expired:
                expired = True
            elif not _passes(error):
                raise _as_of_a_disk(error, words, where) from error
            now = time.monotonic()
            if now - began > _PATIENCE_SECONDS:
                message = f"no answer in {minutes:.0f} minutes ({words})"
                raise OSError(errno.EIO, message, where) from error
            if now - began > _NOTE_AFTER and now - _noted > _NOTE_EVERY:
                _noted = now
                say(f"note     {where}: {words}; tried again for {minutes:.0f} minutes")
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _passes(error: Exception) -> bool:
    code = str(getattr(error, "code", ""))
    return (
        code in ("408", "429")
        or re.fullmatch("5..", code) is not None
        or isinstance(error, _LOST)
        or isinstance(error.__cause__, auth.TransportError)
        or getattr(error, "retryable", False)
    )


def _as_of_a_disk(error: Exception, words: str, where: str) -> Exception:
    """Returns the error that a disk would raise; the same error if it is not the store's."""
    code = str(getattr(error, "code", ""))
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")
    if forbidden or code == "401" or isinstance(error, auth.GoogleAuthError):
        missing = _PERMISSION.search(words)
        what = f"permission {missing[0]} is missing" if missing else f"permission denied ({words})"
        message = f"{what}: grant it, or give other credentials"
        return PermissionError(errno.EACCES, message, where)
    for kind, number in ((FileNotFoundError, errno.ENOENT), (FileExistsError, errno.EEXIST)):
        if isinstance(error, kind):
            return kind(number, os.strerror(number), where)
    # 416: gcsfs itself takes it for the end of an object.
    if isinstance(error, HttpError) and code != "416":
        return OSError(errno.EINVAL, words, where)
    return error
