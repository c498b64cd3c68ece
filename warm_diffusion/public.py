"""Public data and weights by name: where they are, how large they are, and how they are checked.

    python -m warm_diffusion.public list
    python -m warm_diffusion.public get NAME... --to=FOLDER

A file is looked for in the cache folder, then, only where `download` allows it, fetched from
WARM_DIFFUSION_MIRROR (a folder or a URL that holds the same file names), else from its origin. It
appears under its name when its SHA-256 is right, and not before. If several processes want a file,
one fetches it while the others wait.

Absent are those files of EDM's whose hash nobody has published (FFHQ, AFHQv2, ImageNet): fetch them
yourself, and give their path.
"""

import argparse
import dataclasses
import difflib
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say

_MIRROR = "WARM_DIFFUSION_MIRROR"
_SECONDS = (10, 30)  # to connect, and without a byte
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm"
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_MANY = "many independent projects"


@dataclasses.dataclass(frozen=True)
class Public:
    """A public file."""

    url: str  # its origin, whose last part is the file's name
    size: int | None  # bytes; None where nobody has published it
    sha256: str  # of its content
    licence: str  # on which terms it may be used
    confirmed: str  # who published the hash

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]

    @property
    def megabytes(self) -> str:
        """The size for people."""
        return f"{self.size / 1e6:,.1f} MB" if self.size else "size unknown"


_CIFAR = "no licence stated; cite Krizhevsky 2009, Learning Multiple Layers of Features"
_NVIDIA = "CC BY-NC-SA 4.0"
FILES: dict[str, Public] = {
    "cifar-10-binary.tar.gz": Public(
        f"{_TORONTO}/cifar-10-binary.tar.gz", 170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", _CIFAR, _MANY),
    "cifar-10-python.tar.gz": Public(
        f"{_TORONTO}/cifar-10-python.tar.gz", 170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", _CIFAR, _MANY),
    "pt_inception-2015-12-05-6726825d.pth": Public(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth", 95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "Apache-2.0 (pytorch-fid, from TensorFlow's network)", _MANY),
    "edm:cifar10-32x32-uncond-vp": Public(
        f"{_EDM}/pretrained/edm-cifar10-32x32-uncond-vp.pkl", None,
        "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
        _NVIDIA, "one source, not beyond doubt"),
    "edm:cifar10-32x32-cond-vp": Public(
        f"{_EDM}/pretrained/edm-cifar10-32x32-cond-vp.pkl", 223_183_453,
        "b27385e4f2f8d4d1e2e2c03864c5a9574a0c58ba81eb11625ae6d15c401f4796",
        _NVIDIA, "one source"),
    "edm:cifar10-32x32": Public(
        f"{_EDM}/fid-refs/cifar10-32x32.npz", None,
        "4ada108cdfd8e43409ed427f5f76631beac9b9617cdcaf416d41b1e161d85969",
        _NVIDIA, "one source"),
}  # fmt: skip


def default_folder() -> pathlib.Path:
    """Returns the folder where files are kept by default."""
    return storage.default_cache_dir() / "public"


def obtain(
    name: str, folder: str | os.PathLike | None = None, *, download: bool = False
) -> pathlib.Path:
    """The path of a public file, a key of `FILES`; it is fetched first if need be.

    It is kept in `folder`, or in the user's cache.

    Raises:
      ValueError: an unknown name, a file that is not there and may not be fetched, a transfer that
        failed, or content of another hash.
    """
    if name not in FILES:
        near = difflib.get_close_matches(name, FILES, 1, 0.3)
        raise ValueError(
            f"no public file is called {name!r}"
            + (f"; did you mean {near[0]}?" if near else f", only {', '.join(FILES)}")
        )
    public = FILES[name]
    folder = default_folder() if folder is None else storage.local(folder, "the folder of files")
    target = folder / public.file
    if _is_sound(target, public):
        return target
    if not download:
        state = f"{target} is damaged" if target.exists() else f"{name} is not there"
        raise ValueError(
            f"{state}: fetch it with --download ({public.megabytes}, {public.licence}), or put "
            f"{public.url} at {target}"
        )
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f".{public.file}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"fetch    {public.file}: another process fetches it; waiting")
        lock.acquire()
    try:
        if not _is_sound(target, public):
            _fetch(name, public, target)
    finally:
        lock.release()
    return target


def _is_sound(path: pathlib.Path, public: Public) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == public.sha256


def _fetch(name: str, public: Public, target: pathlib.Path) -> None:
    import pooch
    import requests

    place, http = public.url, ("http://", "https://")
    if mirror := os.environ.get(_MIRROR, "").rstrip("/"):
        held = f"{mirror}/{public.file}"
        if held.startswith(http) or pathlib.Path(held).is_file():
            place = held
        else:
            say(f"fetch    {mirror} ({_MIRROR}) does not hold {public.file}")
    say(f"fetch    {place}, {public.megabytes}, to {target}; licence: {public.licence}")
    pooch.get_logger().setLevel("ERROR")  # the line above says it
    by_http = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=2**20,
        timeout=_SECONDS,
        headers={"Accept-Encoding": "identity"},  # or a .gz might be unpacked on the way
    )
    copy = lambda source, partial, _: shutil.copyfile(source, partial)  # noqa: E731
    try:
        pooch.retrieve(
            place,
            f"sha256:{public.sha256}",
            fname=target.name,
            path=target.parent,
            downloader=by_http if place.startswith(http) else copy,
        )
    except requests.RequestException as error:
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(
            f"{name} cannot be fetched from {place} ({reason}); try again, or put the file at "
            f"{target}"
        ) from error
    except ValueError as error:  # pooch's, of another hash
        raise ValueError(
            f"{place} has another SHA-256 than {public.sha256}: it was cut off or changed on the "
            f"way, or is another file; nothing was kept (hash confirmed by: {public.confirmed})"
        ) from error
    target.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> None:
    """Lists or fetches public files."""
    parser = argparse.ArgumentParser(prog="python -m warm_diffusion.public")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="What there is, from where, on which terms.")
    get = commands.add_parser("get", help="Fetch files, such as for a machine without a network.")
    get.add_argument("names", nargs="+", metavar="NAME")
    get.add_argument("--to", default=None, metavar="FOLDER", help=f"[{default_folder()}]")
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, public in FILES.items():
            print(f"{name}\n    {public.url}\n    {public.megabytes}; {public.licence}")
            print(f"    SHA-256 {public.sha256}, confirmed by {public.confirmed}")
        return
    try:
        for name in options.names:
            print(obtain(name, options.to, download=True))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        status, reason = storage.explain(error) or (1, str(error))
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
