"""What a run reports: `metrics.jsonl`, and the same numbers and grids as TensorBoard events."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
import tensorboardX


class Writer:
    """Writes scalars and images; only the first process should have one."""

    def __init__(self, workdir: pathlib.Path, first_step: int | None = 0):
        """Opens the files; lines of later steps than `first_step` (a run cut off) are dropped.

        None keeps all lines: evaluations come in any order.
        """
        self._path = workdir / "metrics.jsonl"
        if first_step is not None and self._path.exists():
            self._rewind(first_step)
        # Two writers opened in one second would share a file name, and the second empty the first.
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._events = tensorboardX.SummaryWriter(
            str(workdir), filename_suffix=suffix, purge_step=first_step + 1 if first_step else None
        )

    def _rewind(self, step: int) -> None:
        lines = self._path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        partial = self._path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self._path)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers; one that is not finite becomes null, since JSON has no NaN."""
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        row = {"step": step} | {
            name: value if math.isfinite(value) else None for name, value in values.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 image [H, W, C]."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what is buffered."""
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # cut off in the middle of a line
