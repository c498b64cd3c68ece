"""Every write, rename and deletion of a short job fails once; the same command makes up for it.

    python -m pytest -m long tests/proofs/test_faults.py -s

The k-th opening, first write, rename, mkdir, unlink and rmdir below the workdir fails, for each k,
with EIO, ENOSPC, ENOTEMPTY and ESTALE in turn. FAULTS=10 tries at most ten of each kind, evenly.
What TensorStore writes (the arrays of a checkpoint) is no call of Python's and does not fail here.
"""

import builtins
import collections
import contextlib
import errno
import io
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import TINY, App, rows

NUMBERS = (errno.EIO, errno.ENOSPC, errno.ENOTEMPTY, errno.ESTALE)
KINDS = ("open", "write", "rename", "mkdir", "unlink", "rmdir")
SLOW = 60  # seconds of a job that takes few
AT_MOST = int(os.environ.get("FAULTS", "1000000"))
_OPERATIONS = {"rename": "rename", "replace": "rename", "mkdir": "mkdir", "unlink": "unlink",
               "remove": "unlink", "rmdir": "rmdir"}  # fmt: skip


class _Failing(io.FileIO):
    """A file whose every write fails."""

    def __init__(self, path, mode, number):
        super().__init__(path, mode)
        self._number = number

    def write(self, _):
        raise OSError(self._number, os.strerror(self._number))


class Faults:
    """Counts the operations below a folder by kind, and makes one of them fail."""

    def __init__(self, folder, kind=None, call=0, number=0):
        self._folder, self._kind, self._call, self._number = str(folder), kind, call, number
        self.counts = collections.Counter()

    def _fails(self, kind, path, directory=None):
        if isinstance(path, int):
            return False
        text = os.fsdecode(path)
        if directory is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        if not text.startswith(self._folder):
            return False
        self.counts[kind] += 1
        return kind == self._kind and self.counts[kind] == self._call

    def _error(self, path):
        return OSError(self._number, os.strerror(self._number), os.fspath(path))

    @contextlib.contextmanager
    def __call__(self):
        opened = builtins.open

        def fail_to_open(file, mode="r", *rest, **options):
            if set(mode) & set("wax+") and isinstance(file, str | bytes | os.PathLike):
                if self._fails("open", file):
                    raise self._error(file)
                if self._fails("write", file):
                    raw = _Failing(file, mode.replace("b", "").replace("t", ""), self._number)
                    buffered = io.BufferedWriter(raw)
                    return buffered if "b" in mode else io.TextIOWrapper(buffered)
            return opened(file, mode, *rest, **options)

        def fail_to(kind, function):
            def operate(path, *rest, dir_fd=None, **options):
                if self._fails(kind, path, dir_fd):
                    raise self._error(path)
                if dir_fd is not None:
                    options["dir_fd"] = dir_fd
                return function(path, *rest, **options)

            return operate

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", fail_to_open)
            patch.setattr(io, "open", fail_to_open)
            for name, kind in _OPERATIONS.items():
                patch.setattr(os, name, fail_to(kind, getattr(os, name)))
            yield


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return App(tmp_path_factory.mktemp("app"))


TRAIN = ("--config.training.num_steps=4", "--config.training.checkpoint_every=2",
         "--config.training.sample_every=2", "--config.training.keep_latest=1")  # fmt: skip


@pytest.fixture(scope="module")
def jobs(app, tmp_path_factory):
    """Returns the flags of main.py in each mode, except the workdir."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "photographs").mkdir()
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = noise.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{name}.png")
    app.run(f"--workdir={folder / 'run'}", *TRAIN)
    checkpoint = f"--checkpoint={folder / 'run'}"
    return {
        "train": (*TINY, *TRAIN),
        "sample": ("--mode=sample", checkpoint, "--seeds=0-9"),
        "eval": ("--mode=eval", checkpoint, "--config.eval.num_samples=8",
                 "--config.eval.repeats=2"),
        "restore": ("--mode=restore", checkpoint, f"--input={folder / 'photographs'}",
                    "--blur=0.5", "--noise=20", "--steps=3"),
    }  # fmt: skip


def results(workdir):
    """All that a job leaves, by name: bytes, or what of it does not measure time."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = re.sub(r"events\.out.*|(?<=/d/)[0-9a-f]{16,}", "*", str(path.relative_to(workdir)))
        if path.is_dir():
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = rows(path.parent)
        elif path.suffix == ".json" and "eval" in path.parts:
            found[name] = json.loads(path.read_text()) | {"seconds": None}
        elif path.suffix in (".png", ".json"):
            found[name] = path.read_bytes()
        elif path.parts[-2:] == ("about", "metadata"):
            found[name] = json.loads(path.read_text())["digests"]  # of all arrays
        else:
            found[name] = None
    return {name: content for name, content in found.items() if name != ".lock"}


def calls(count):
    """Which calls of so many fail."""
    return sorted(set(np.linspace(1, count, min(count, AT_MOST)).astype(int).tolist()))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["train", "sample", "eval", "restore"])
def test_after_any_one_fault_the_same_command_ends_with_the_same_results(app, jobs, tmp_path, mode):
    sound = tmp_path / "sound"
    counting = Faults(sound)
    with counting():
        app.run(f"--workdir={sound}", *jobs[mode], tiny=False)
    expected, wrong, statuses = results(sound), [], collections.Counter()
    for kind in KINDS:
        for call in calls(counting.counts[kind]):
            number = NUMBERS[call % len(NUMBERS)]
            workdir = tmp_path / f"{kind}{call}"
            began = time.monotonic()
            with Faults(workdir, kind, call, number)():
                status, _, err = app._run_here([f"--workdir={workdir}", *jobs[mode]])
            seconds = time.monotonic() - began
            statuses[status] += 1
            told = status in (0, 74) and err.count("\n") == (status == 74) and "a file:" not in err
            again, _, more = app._run_here([f"--workdir={workdir}", *jobs[mode]])
            found = results(workdir)
            differ = [n for n in expected.keys() | found if found.get(n, 0) != expected.get(n, 0)]
            if not told or again or differ or seconds > SLOW:
                fault = f"{mode}: {kind} {call} with {errno.errorcode[number]}"
                wrong.append(
                    f"{fault}: {status} in {seconds:.0f} s, {err[-300:]}, then {again}, "
                    f"{more[-300:]}, {sorted(differ)[:5]}"
                )
                print(wrong[-1])
            shutil.rmtree(workdir)
    counts = dict(counting.counts)
    print(f"{mode}: {sum(statuses.values())} faults of {counts}, status {dict(statuses)}")
    assert wrong == []
