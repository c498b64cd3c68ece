"""What a run reports: `metrics.jsonl`, and the same numbers and grids as TensorBoard events.

Events are written by this thread, so that an error is the run's: one in the thread that
tensorboardX would start ends that, and the run then waits for ever. On gs:// they are kept on this
machine and copied there, whole, from time to time.
"""

import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from warm_diffusion import storage

_EVENTS_SECONDS = 120  # between writes of events, on gs:// of the whole file


class Writer:
    """Writes scalars and images; only the first process should have one."""

    def __init__(self, workdir: pathlib.Path, first_step: int | None = 0):
        """Opens the files; lines of later steps than `first_step` (a run cut off) are dropped.

        None keeps all lines: evaluations come in any order.
        """
        keep = None if first_step is None else lambda line: _step_of(line) <= first_step
        self._lines = storage.Lines(workdir / "metrics.jsonl", keep)
        self._workdir, self._put_at = workdir, time.monotonic()
        self._local = None if storage.is_local(workdir) else tempfile.TemporaryDirectory()
        # Two writers opened in one second would share a file name, and the second empty the first.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        folder = pathlib.Path(self._local.name if self._local else workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), suffix)
        if first_step:  # TensorBoard forgets what it has read of later steps
            start = SessionLog(status=SessionLog.START)
            self._event(first_step + 1, session_log=start)
            self._events.flush()

    def _event(self, step: int, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers; one that is not finite becomes null, since JSON has no NaN."""
        for name, value in values.items():
            if math.isfinite(value):
                self._event(step, summary=summary.scalar(name, value))
        row = {"step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        self._lines.append(json.dumps(row))
        if time.monotonic() - self._put_at > _EVENTS_SECONDS:
            self._put_events()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 image [H, W, C]."""
        self._event(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """Writes out the lines so far, which a checkpoint of their step must find."""
        self._lines.flush()

    def _put_events(self) -> None:
        """Writes out the events; to gs:// whole, where a reader sees the file grow."""
        self._put_at = time.monotonic()
        self._events.flush()
        if self._local:
            for file in pathlib.Path(self._local.name).iterdir():
                storage.write_bytes(self._workdir / file.name, file.read_bytes())

    def close(self) -> None:
        """Writes out what is buffered."""
        try:
            self._lines.close()
            self._put_events()
        finally:
            self._events.close()
            if self._local:
                self._local.cleanup()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # cut off in the middle of a line, or another's
