"""Checkpoints: orbax, asynchronous and atomic, with a checksum of what they hold.

A checkpoint is written under a temporary name and renamed when complete, so a kill at any time
leaves the ones before. Orbax restores flipped bits without complaint; therefore each checkpoint
carries the SHA-256 of its arrays, and restoring verifies it. A damaged one is moved aside, never
deleted, and the one before is used.
"""

import hashlib
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from warm_diffusion.training.state import TrainState

_FORMAT = 1


def _arrays(state: TrainState) -> dict:
    return {
        "step": state.step,
        "params": state.params,
        "ema": state.ema,
        "opt_state": state.opt_state,
        "nonfinite_total": state.nonfinite_total,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
    }


def _checksum(arrays: dict) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


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
        self._path = (pathlib.Path(workdir) / "checkpoints").absolute()
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(keep_latest)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(policies),
                # A reader may look on while the training run writes.
                cleanup_tmp_directories=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, about: dict) -> None:
        """Starts saving a state; returns when the state may be changed. Saved steps are skipped.

        Args:
          state: the state after `state.step` steps.
          about: facts to keep beside it, for `about`.
        """
        step = int(state.step)
        if step in self.steps():
            return
        arrays = _arrays(state)
        about = {**about, "format": _FORMAT, "step": step, "sha256": _checksum(arrays)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
            ),
            force=True,
        )

    def check(self) -> None:
        """Raises the error of a save that failed in the background, if one did."""
        self._manager.check_for_errors()

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes of a distributed run have been told to stop."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()

    def restore_latest(
        self, target: TrainState, report: Callable[[str], None] = print
    ) -> TrainState | None:
        """The newest sound checkpoint, or None when there is none at all.

        Args:
          target: a state of the right structure, abstract or not, with shardings.
          report: is told of every damaged checkpoint that was passed over.

        Raises:
          ValueError: there are checkpoints, but none is sound.
        """
        steps, damaged = self.steps(), []
        for step in reversed(steps):
            try:
                state = self.restore(step, target)
            # Orbax reports damage by bare Exception, ValueError, KeyError, JSON and OS errors.
            except Exception as error:
                damaged.append(step)
                report(f"checkpoint {step} cannot be restored: {_first_line(error)}")
                continue
            self._move_aside(damaged)
            return state
        if steps:
            raise ValueError(f"no checkpoint in {self._path} can be restored: tried {steps}")
        return None

    def about(self, step: int) -> dict:
        """The facts kept with a checkpoint.

        Raises:
          ValueError: there is no such checkpoint, or it cannot be read.
        """
        if step not in self.steps():
            raise ValueError(
                f"no checkpoint of step {step} in {self._path}: there are {self.steps()}"
            )
        try:
            arguments = ocp.args.Composite(about=ocp.args.JsonRestore())
            return self._manager.restore(step, args=arguments).about
        except Exception as error:  # see restore_latest
            raise ValueError(f"checkpoint {step}: {_first_line(error)}") from error

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The checkpoint of one step, its checksum verified.

        Raises:
          ValueError: there is no such checkpoint, or it does not hold what was saved.
        """
        about = self.about(step)
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']}, this version reads format {_FORMAT}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(target))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=arguments).state
        if _checksum(arrays) != about["sha256"]:
            raise ValueError("its arrays differ from what was saved (checksum mismatch)")
        return target.replace(**arrays)

    def _move_aside(self, steps: list[int]) -> None:
        folder = self._path.parent / "damaged"
        for step in steps:
            folder.mkdir(exist_ok=True)
            target = folder / str(step)
            while target.exists():
                target = target.with_name(target.name + "+")
            (self._path / str(step)).rename(target)
        if steps:
            self._manager.reload()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
