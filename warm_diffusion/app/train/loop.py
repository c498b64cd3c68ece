"""The loop around the jitted step: batches, reports, grids, checkpoints, the request to stop."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion.app import Diverged, Interrupted, build
from warm_diffusion.app.drawing import Sampler
from warm_diffusion.app.train.profile import Profile
from warm_diffusion.data import Dataset, Statistics, batch_indices
from warm_diffusion.data.images import grid, save_png
from warm_diffusion.runtime import devices
from warm_diffusion.runtime.console import progress, say
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.signals import compiling, stop_requests
from warm_diffusion.training.step import Batch, TrainMetrics, TrainState, choose_average, is_finite
from warm_diffusion.training.writer import Writer

_AHEAD = 2  # batches that wait for the devices
_LOOK_EVERY = 100  # steps between looks at the gradients, if not reported before
_MUCH_WAITING = 0.05  # share of the time


def loader(config: ConfigDict, data: Dataset, mesh: Mesh) -> Callable[[int], tuple]:
    """A function from the steps done to the next call's batch, on the devices."""
    options, count = config.training, len(data.images)
    everything, axis = Batch(data.images, build.labels(config, data)), options.steps_per_call > 1
    stored = devices.put_replicated(everything, mesh) if build.resident(config, data) else None

    def load(done: int) -> tuple:
        numbers = range(done, done + options.steps_per_call)
        each = [batch_indices(config.seed, n, options.batch_size, count) for n in numbers]
        indices = np.stack(each) if axis else each[0]
        if stored:
            return stored, devices.put_split(indices, mesh, axis)
        return devices.put_split(everything, mesh, axis, indices)

    return load


def batches(
    load: Callable[[int], tuple], calls: range
) -> Iterator[concurrent.futures.Future[tuple]]:
    """The batches of the calls; a thread loads the next two while one is used."""
    with concurrent.futures.ThreadPoolExecutor(1, "batches") as thread:
        pending = collections.deque()
        try:
            for done in calls:
                pending.append(thread.submit(load, done))
                if len(pending) > _AHEAD:
                    yield pending.popleft()
            yield from pending
        finally:
            thread.shutdown(cancel_futures=True)


class _Clock:
    """Speed since the last report, without the time for compiling, saving and drawing."""

    def __init__(self, step: int):
        self._step, self._start, self._waited = step, time.monotonic(), 0.0

    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def steps_per_second(self, step: int) -> float:
        """NaN where no step was counted."""
        return (step - self._step) / self.seconds() if step > self._step else math.nan

    def waited(self) -> float:
        """Share of the time that the devices waited for a batch."""
        return self._waited / self.seconds()

    @contextlib.contextmanager
    def paused(self, *, waits: bool = False) -> Iterator[None]:
        """Excludes the enclosed time from the rate; with `waits` it counts as waiting instead."""
        begin = time.monotonic()
        yield
        if waits:
            self._waited += time.monotonic() - begin
        else:
            self._start += time.monotonic() - begin


@dataclasses.dataclass
class Loop:
    """The steps of a run and what happens between them."""

    config: ConfigDict
    workdir: pathlib.Path  # of reports, grids and profiles
    step: Callable  # `training.step.jitted`
    load: Callable[[int], tuple]  # see `loader`
    saved: Checkpoints
    grids: Sampler
    data: Dataset  # which some paths start from
    statistics: Statistics  # kept with each checkpoint, as are
    origins: dict
    check_lock: Callable[[], None]  # before each checkpoint
    mesh: Mesh

    def __post_init__(self):
        self._options, self._writer, self._warned = self.config.training, None, False
        self._skipped = 0
        everywhere = devices.replicated(self.mesh)
        self._no_metrics = jax.jit(TrainMetrics.empty, out_shardings=everywhere)
        # On the devices: the host would send it again at every step.
        self._seed = devices.put_replicated(np.uint32(self.config.seed), self.mesh)

    def run(self, state: TrainState) -> TrainState:
        """Trains to the end, or until a signal asks to stop."""
        options, start = self._options, int(state.step)
        if start >= options.num_steps:
            say(f"run      nothing to do: {start:,} steps of {options.num_steps:,} are done")
            return state
        if jax.process_index() == 0:
            self._writer = Writer(self.workdir, start, options.writers, self.config.to_dict())
        calls = range(start, options.num_steps, options.steps_per_call)
        with contextlib.ExitStack() as stack:
            if self._writer:
                stack.callback(self._writer.close)
            bar = stack.enter_context(
                progress(options.num_steps, "training", " steps", initial=start)
            )
            stop_request = stack.enter_context(stop_requests())
            profile = Profile(self.workdir, options.profile_steps)
            stack.callback(profile.close)
            futures = stack.enter_context(contextlib.closing(batches(self.load, calls)))
            return self._steps(state, calls, futures, profile, bar, stop_request)

    def _steps(self, state, calls, futures, profile, bar, stop_request) -> TrainState:
        options, metrics, clock = self._options, self._no_metrics(), _Clock(calls.start)
        # Counted on the host: reading state.step would wait for the device at every step.
        for done, batch in zip(calls, futures, strict=True):
            profile.look(done, options.steps_per_call, state)
            if not batch.done():
                jax.block_until_ready(state)  # until then the devices have something to do
                with clock.paused(waits=True):
                    concurrent.futures.wait([batch])
            first = done == calls.start
            with compiling("the training step") if first else contextlib.nullcontext():
                state, metrics = self.step(state, metrics, batch.result(), self._seed)
            step = done + options.steps_per_call
            bar.update(options.steps_per_call)
            if first:
                jax.block_until_ready(state)
                say(f"compile  done: the first step took {clock.seconds():.1f} s")
                clock = _Clock(step)
            stop = stop_request()
            last = bool(stop) or step == options.num_steps
            if last or _due(step, options.log_every):
                self._report(step, state, metrics, clock)
                metrics, clock = self._no_metrics(), _Clock(step)
            elif step // _LOOK_EVERY > done // _LOOK_EVERY:
                self._look(step, metrics)
            save = last or _due(step, options.checkpoint_every)
            draw = _due(step, options.sample_every)
            if save or draw:
                jax.block_until_ready(state)
                with clock.paused():
                    if draw:
                        self._draw(step, state)
                    if save:  # last, for what is before a checkpoint is not done again
                        self._save(step, state)
            if stop:
                raise Interrupted(
                    f"{stop}: stopped after step {step:,} and saved in {self.workdir}; the same "
                    "command continues"
                )
        return state

    def _report(self, step: int, state: TrainState, metrics: TrainMetrics, clock: _Clock) -> None:
        options = self._options
        values = {name: float(value) for name, value in metrics.compute().items()}
        values.pop("longest_row")
        skipped = int(state.nonfinite_total)
        rate = clock.steps_per_second(step) * options.batch_size
        remaining = (options.num_steps - step) * options.batch_size / rate
        images, waited = step * options.batch_size, clock.waited()
        much = waited > _MUCH_WAITING
        say(
            f"step {step:,}/{options.num_steps:,} | loss {values['loss']:.4f} "
            f"(denoise {values['denoise']:.4f}, deblur {values['deblur']:.4f})"
            + (f" | {rate:,.0f} images/s" if rate > 0 else "")
            + (f" | ETA {_duration(remaining)}" if remaining > 0 else "")
        )
        if skipped > self._skipped:
            say(f"note     {skipped:,} steps skipped so far, for gradients that were not finite")
        self._skipped = skipped
        if much and not self._warned:
            self._warned = True
            say(f"note     the devices wait for images, {waited:.0%} of the time: use a faster")
            say("         disk, a larger training.device_megabytes or training.steps_per_call")
        if self._writer:
            extra = {"images": images, "images_per_second": rate, "nonfinite_total": skipped}
            self._writer.scalars(step, values | extra | {"input_wait": waited})
        self._look(step, metrics)

    def _look(self, step: int, metrics: TrainMetrics) -> None:
        """Ends the run after too many gradients in a row that were not finite."""
        row = int(metrics.longest_row.compute())
        if row >= self._options.max_nonfinite_steps:
            raise Diverged(
                f"the gradient was not finite in {row} steps in a row, up to step {step:,} or "
                "before: stopped. These steps changed no weights and no averages; lower "
                "optimizer.learning_rate, or look at the data and model.dtype"
            )

    def _save(self, step: int, state: TrainState) -> None:
        self.check_lock()
        self.saved.check()
        if not is_finite(state):
            raise Diverged(
                f"the state at step {step:,} is not finite and was not saved; the "
                f"checkpoints in {self.workdir} are from before"
            )
        if self._writer:
            self._writer.flush()
        images = {"images_seen": step * self._options.batch_size}
        self.saved.save(state, self.statistics._asdict(), self.origins | images)

    def _draw(self, step: int, state: TrainState) -> None:
        """Writes the grid of the fixed seeds 0, 1, ... at this step."""
        params = choose_average(state, self.config.sampling.ema)
        seeds = np.arange(self.grids.batch_size)
        images = np.concatenate(list(self.grids.generate(params, seeds, self.data.images)))
        picture = grid(images, min_side=32)
        if self._writer:
            save_png(self.workdir / "samples" / f"step_{step:08d}.png", picture)
            self._writer.image(step, "samples", picture)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{round(seconds) % 60:02}s"
