"""The modes of `main.py`, one file or folder each.

Each is loaded when it is first used: `info` needs no matplotlib, sampling no TensorBoard.
"""

import importlib

from warm_diffusion.runtime import processes, storage

_JOBS = ("train", "sample", "evaluate", "fid_stats", "analyze", "export", "info", "restore")


class Stopped(Exception):
    """A run ended before its end for a reason that is not the user's mistake."""

    status: int  # the exit status of main.py


class Interrupted(Stopped):
    """A signal asked to stop; everything is saved and the same command continues."""

    status = 75


class Diverged(Stopped):
    """Gradients or state were not finite: going on would not help."""

    status = 3


class Incomplete(Stopped):
    """Something asked for was missing or damaged; what could be done is done."""

    status = 4


def explain(error: Exception) -> tuple[int, str]:
    """The exit status and the line with which main.py ends after an error."""
    if found := processes.explain(error) or storage.explain(error):
        return found
    if isinstance(error, ValueError | Stopped):
        return getattr(error, "status", 2), str(error)
    return 1, f"{type(error).__name__}: {error}"


def __getattr__(name: str):
    if name in _JOBS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
