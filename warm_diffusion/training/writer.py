"""Writes the reports of a run to `metrics.jsonl`, and with grids to TensorBoard or wandb.

TensorBoard's events are written by this thread, so that an error ends the run with its line. In
tensorboardX's SummaryWriter another thread writes: an error ends that one alone, and what comes
later is lost, or the run waits for it for ever.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from warm_diffusion.runtime import storage

_EVENTS_SECONDS = 120  # between writes of events, on gs:// of the whole file


def check(writers: Sequence[str]) -> None:
    """Raises ValueError if a package of the writers is not there."""
    if "wandb" in writers and importlib.util.find_spec("wandb") is None:
        raise ValueError("training.writers names wandb, which is not installed: pip install wandb")


class Writer:
    """Writes scalars and images; only the first process should have one."""

    def __init__(
        self,
        workdir: pathlib.Path,
        first_step: int | None = 0,
        writers: Sequence[str] = ("tensorboard",),
        configuration: Mapping[str, Any] | None = None,
    ):
        """Opens the files; lines of later steps than `first_step` (a run cut off) are dropped.

        With None all lines stay, and none is written twice: evaluations come in any order, and one
        that is cut off comes again. `writers` (tensorboard, wandb) get the values that go to
        metrics.jsonl, and the run's configuration if they show it.
        """
        self._found = set()

        def keep(line: str) -> bool:
            if first_step is not None:
                return _step_of(line) <= first_step
            self._found.add(line)
            return True

        self._lines = storage.Lines(workdir / "metrics.jsonl", keep)
        self._others = []
        if "tensorboard" in writers:
            self._others.append(_TensorBoard(workdir, first_step))
        if "wandb" in writers:
            self._others.append(_Wandb(workdir, configuration))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers; one that is not finite becomes null, since JSON has no NaN."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for other in self._others:
            other.scalars(step, finite)
        line = json.dumps({"step": step} | {n: finite.get(n) for n in values})
        if line not in self._found:
            self._lines.append(line)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 image [H, W, C]."""
        for other in self._others:
            other.image(step, name, image)

    def flush(self) -> None:
        """Writes out all so far: where a checkpoint of its step is, none of it is written again."""
        self._lines.flush()
        for other in self._others:
            other.flush()

    def close(self) -> None:
        """Writes out what is buffered."""
        with contextlib.ExitStack() as last:  # if a part fails, the rest is still done
            for other in self._others:
                last.callback(other.close)
            self.flush()


class _TensorBoard:
    """Events in the workdir; on gs:// they are kept here, and copied there from time to time."""

    def __init__(self, workdir: pathlib.Path, first_step: int | None):
        self._workdir, self._put_at = workdir, time.monotonic()
        self._naming = functools.partial(storage.naming, workdir / "events.out.tfevents")
        self._local = None if storage.is_local(workdir) else tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._local.name if self._local else workdir)
        folder.mkdir(parents=True, exist_ok=True)
        # Two writers opened in one second would share a file name, and the second empty the first.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._events = EventsWriter(str(folder / "events"), suffix)
        if first_step:  # TensorBoard forgets what it has read of later steps
            self._event(first_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._events.flush()

    def _event(self, step: int, **content) -> None:
        with self._naming():
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))
        if time.monotonic() - self._put_at > _EVENTS_SECONDS:
            self.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._event(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        self._put_at = time.monotonic()
        with self._naming():
            self._events.flush()
        for file in pathlib.Path(self._local.name).iterdir() if self._local else ():
            storage.write_bytes(self._workdir / file.name, file.read_bytes())

    def close(self) -> None:
        try:
            with self._naming():
                self._events.close()
        finally:
            if self._local:
                self._local.cleanup()


class _Wandb:
    """A run at Weights & Biases, one per workdir, which continues when training does."""

    def __init__(self, workdir: pathlib.Path, configuration: Mapping[str, Any] | None):
        import wandb

        self._wandb, name = wandb, workdir / "wandb.json"
        if not name.exists():
            storage.write_json(name, {"id": secrets.token_hex(8)})
        try:
            self._run = wandb.init(
                project="warm_diffusion",
                name=workdir.name,
                id=storage.read_json(name)["id"],
                resume="allow",
                dir=str(workdir) if storage.is_local(workdir) else tempfile.gettempdir(),
                config=dict(configuration or {}),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"training.writers: wandb did not start ({error}); wandb login, WANDB_MODE=offline "
                "in the environment, or leave it out"
            ) from error
        # Not wandb's own step, which refuses those that a run cut off has reported before.
        self._run.define_metric("*", step_metric="training_step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"training_step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        picture = image[..., 0] if image.shape[-1] == 1 else image
        self._run.log({"training_step": step, name: self._wandb.Image(picture)})

    def flush(self) -> None:
        """Does nothing: wandb sends from its own process."""

    def close(self) -> None:
        self._run.finish()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # cut off in the middle of a line, or another's
