"""Checkpoints: orbax, asynchronous and atomic, with a checksum of what they hold.

A checkpoint is written under a temporary name and renamed when complete, on gs:// it gets a marker
when complete, so a kill at any time leaves the ones before. It holds

    state        step, weights, averages, optimizer, counters
    statistics   mean image and spectrum of the training data
    about        JSON: step, description of the network, configuration, origins, checksums

so that nothing else is needed to use it. Orbax restores flipped bits without complaint; therefore
a checksum of each part (`checksums.py`) is kept and verified. A damaged checkpoint is moved aside,
never deleted, and the one before is used.
"""

import contextlib
import pathlib
import re
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from warm_diffusion.runtime import processes, storage
from warm_diffusion.runtime.console import say
from warm_diffusion.training.checksums import checksum
from warm_diffusion.training.step import TrainState

_REMOVE_SECONDS = 5.0
# Old checkpoints are deleted here and not by orbax, for that must not end a run: it fails where
# another process has one open on NFS. They are moved there first: none is seen half deleted.
_TRASH = "trash"
_MARKER = "commit_success.txt"  # on gs:// a checkpoint is whole where it has this
# Not damage: another try, or another user, reads what is there.
_PASSING = re.compile(
    "ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|"
    "UNAVAILABLE"
)


class Damaged(ValueError):
    """A checkpoint that does not hold what was saved."""

    status = 4  # the exit status of main.py


def finished_steps(workdir: pathlib.Path) -> list[int]:
    """Steps with a finished checkpoint, oldest first; looks only, so it may run beside training."""
    folder = storage.path(workdir) / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def _arrays(state: TrainState) -> dict:
    names = ("step", "params", "ema", "opt_state", "nonfinite_total", "nonfinite_in_a_row")
    return {name: getattr(state, name) for name in names}


def _checksums(arrays: dict) -> dict:
    """Checksums of the parts that are restored by themselves, and of the rest together."""
    rest = {name: tree for name, tree in arrays.items() if name not in ("params", "ema")}
    return {
        "params": checksum(arrays["params"]),
        "ema": [checksum(average) for average in arrays["ema"]],
        "rest": checksum(rest),
    }


def _is_damage(error: Exception) -> bool:
    """Returns whether an error in reading is about the file, and not about this moment."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return not isinstance(error, MemoryError) and not _PASSING.search(str(error))


class Checkpoints:
    """The checkpoints of one training run, in a folder `checkpoints` of its workdir."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        keep_latest: int = 1,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        # Orbax fails in its background thread on a relative path.
        self._path, self._writes = storage.path(workdir) / "checkpoints", not read_only
        self._cleans = self._writes and storage.is_local(self._path)  # on gs:// orbax does
        self._remove_leftovers()
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._removes_old = False  # not before the newest one is known to be sound
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                # A reader may look on while the training run writes, and makes nothing.
                create=self._writes,
                cleanup_tmp_directories=self._writes,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, statistics: Mapping[str, np.ndarray], about: dict) -> None:
        """Starts saving a state; returns when the state may be changed. Saved steps are skipped.

        `statistics` are arrays by name, of the training data; `about` are facts to keep beside.
        """
        step = int(state.step)
        if step in self.steps():
            return
        self._remove_old()
        arrays, statistics = _arrays(state), dict(statistics)
        digests = {**_checksums(arrays), "statistics": checksum(statistics)}
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            statistics=ocp.args.StandardSave(statistics),
            about=ocp.args.JsonSave({**about, "step": step, "digests": digests}),
        )
        with storage.naming(self._path):
            self._manager.save(step, args=parts, force=True)
        self._removes_old = True

    def check(self) -> None:
        """Raises the error of a save that failed in the background, if one did."""
        with storage.naming(self._path):
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save."""
        with contextlib.ExitStack() as last:  # if a part fails, the rest is still done
            last.callback(self._remove_leftovers)
            last.callback(self._remove_old)
            last.enter_context(storage.naming(self._path))
            last.callback(self._manager.close)
            self._manager.wait_until_finished()

    def _remove_old(self) -> None:
        """Deletes what need not be kept; where that fails it is tried again at the next save."""
        if not self._removes_old or jax.process_index():
            return
        storage.remove(self._path / _TRASH)
        for step in finished_steps(self._path.parent)[: -self._keep_latest]:
            if self._keep_every and step % self._keep_every == 0:
                continue
            folder = self._path / str(step)
            try:
                if storage.is_local(folder):
                    storage.move(folder, self._path / _TRASH / f"{step}-{time.time_ns()}")
                else:
                    (folder / _MARKER).unlink(missing_ok=True)
                    storage.remove(folder)
            except OSError as error:
                say(f"note     {folder} cannot be deleted now ({error})")
        storage.remove(self._path / _TRASH)

    def _remove_leftovers(self) -> None:
        """Removes the leftovers of failed saves and deletions."""
        if not self._cleans or jax.process_index():
            return
        limit = time.monotonic() + _REMOVE_SECONDS
        while left := [*self._path.glob("*.orbax-checkpoint-tmp"), *self._path.glob(_TRASH)]:
            for folder in left:
                storage.remove(folder)
            if time.monotonic() > limit:
                break
            time.sleep(0.05)  # threads of TensorStore's write on for a moment

    def restore_latest(
        self, target: TrainState, report: Callable[[str], None] = print
    ) -> TrainState | None:
        """The newest sound checkpoint, or None when there is none at all.

        Args:
          target: a state of the right structure, abstract or not, with shardings.
          report: gets a line for every damaged checkpoint that was passed over.

        Raises:
          Damaged: there are checkpoints, but none is sound.
          ValueError: the processes of the run do not find the same.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            state = None
            try:
                state = self.restore(step, target)
            except Damaged as error:
                damaged.append(step)
                report(str(error))
            # Nothing is moved that another process could read.
            processes.agree(**{f"whether checkpoint {step} is sound": state is not None})
            if state is not None:
                self._move_aside(damaged)
                self._removes_old = True
                return state
        if steps:
            raise Damaged(f"no checkpoint in {self._path} can be restored: tried {steps}")
        return None

    def about(self, step: int) -> dict:
        """The facts kept with a checkpoint; ValueError if it is not there or cannot be read."""
        if step not in self.steps():
            raise ValueError(
                f"no checkpoint of step {step} in {self._path}: there are {self.steps()}"
            )
        return self._read(step, about=ocp.args.JsonRestore()).about

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The checkpoint of one step; ValueError if it is not there or not what was saved."""
        saved = self.about(step)["digests"]
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(target))
        arrays = self._read(step, state=ocp.args.StandardRestore(abstract)).state
        found = _checksums(arrays)
        self._verify(step, found, {name: saved[name] for name in found})
        self.statistics(step)
        return target.replace(**arrays)

    def weights(self, step: int, shapes: dict, average: int) -> dict:
        """The weights of a checkpoint alone, as host arrays; ValueError as for `restore`.

        Args:
          step: of the checkpoint.
          shapes: abstract parameters.
          average: which of the averages; -1: the weights themselves.
        """
        digests = self.about(step)["digests"]
        if average < 0:
            name, wanted = "params", {"params": shapes}
        else:
            name, wanted = "ema", {"ema": [shapes] * len(digests["ema"])}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        # What is not wanted is not read.
        restore = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
        found, saved = self._read(step, state=restore).state[name], digests[name]
        if average >= 0:
            found, saved = found[average], saved[average]
        self._verify(step, checksum(found), saved)
        return found

    def statistics(self, step: int) -> dict[str, np.ndarray]:
        """The statistics of the training data, by name; ValueError as for `restore`."""
        saved = self.about(step)["digests"]["statistics"]
        found = self._read(step, statistics=ocp.args.StandardRestore()).statistics
        found = {name: np.asarray(array) for name, array in found.items()}
        self._verify(step, checksum(found), saved)
        return found

    def _read(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # Orbax reports damage by bare Exception, ValueError, KeyError, JSON and OS errors.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise (Damaged if _is_damage(error) else ValueError)(
                f"checkpoint {step} of {self._path.parent} cannot be restored: {reason}"
            ) from error

    def _verify(self, step: int, found, saved) -> None:
        if found != saved:
            raise Damaged(
                f"checkpoint {step} of {self._path.parent} is damaged: its arrays differ from what "
                "was saved (checksum mismatch)"
            )

    def _move_aside(self, steps: list[int]) -> None:
        folder = self._path.parent / "damaged"
        for step in steps:
            target = folder / str(step)
            while target.exists():
                target = target.with_name(target.name + "+")
            storage.move(self._path / str(step), target, marker=_MARKER)
        if steps:
            # No process may list the steps again before process 0 has moved them: it would wait for
            # a save of a step that it thinks is there.
            processes.agree(**{"the damaged checkpoints": steps})
            self._manager.reload()


def last_checkpoint(workdir: pathlib.Path) -> tuple[list[int], dict]:
    """The finished steps, and what the newest checkpoint that can be read says of itself."""
    steps = finished_steps(workdir)
    if not steps:
        return steps, {}
    with Checkpoints(workdir, read_only=True) as saved:
        for step in reversed(steps):
            with contextlib.suppress(Damaged):  # restoring finds out, and says so
                return steps, saved.about(step)
    return steps, {}
