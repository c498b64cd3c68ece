"""Profiles some steps of a run for TensorBoard (`config.training.profile_steps`)."""

import pathlib
import tempfile

import jax

from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say


class Profile:
    """Traces from before one step to after another; TensorBoard's plugin `profile` shows it."""

    def __init__(self, workdir: pathlib.Path, window: tuple[int, ...]):
        """`window`: the first and the last step, numbered from 1; empty: none."""
        self._workdir, self._window, self._local = workdir, tuple(window), None

    def look(self, done: int, steps: int, state) -> None:
        """To be called after `done` steps, before a call of `steps` more."""
        if not self._window:
            return
        first, last = self._window
        if self._local:
            if done >= last:
                jax.block_until_ready(state)
                self.close()
        elif done < first <= done + steps:
            jax.block_until_ready(state)
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)

    def close(self) -> None:
        """Ends the trace, if one is running, and writes it to the workdir."""
        if not self._local:
            return
        local, self._local, self._window = self._local, None, ()  # it has ended, even if this fails
        with local as name:
            jax.profiler.stop_trace()
            folder = pathlib.Path(name)
            for file in folder.rglob("*"):  # on gs:// as well, which the profiler does not know
                if file.is_file():
                    storage.write_bytes(self._workdir / file.relative_to(folder), file.read_bytes())
        say(f"profile  in {self._workdir / 'plugins'}: pip install tensorboard-plugin-profile")
