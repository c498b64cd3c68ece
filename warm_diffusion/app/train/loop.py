"""The loop around the jitted step: reports, grids, checkpoints, the request to stop."""

import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion.app import Diverged, Interrupted
from warm_diffusion.app.train.feed import Feed
from warm_diffusion.app.train.profile import Profile
from warm_diffusion.data import Dataset, Statistics
from warm_diffusion.data.images import grid, save_png
from warm_diffusion.drawing import Sampler
from warm_diffusion.runtime import devices
from warm_diffusion.runtime.console import progress, say
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.signals import stop_requests
from warm_diffusion.training.state import TrainMetrics, TrainState, choose_average, is_finite
from warm_diffusion.training.writer import Writer

_LOOK_EVERY = 100  # steps between looks at the gradients, if not reported before
_MUCH_WAITING = 0.05  # share of the time


class _Clock:
    """Speed since the last report, without the time for compiling, saving and drawing."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start, self._waited = step, time.monotonic(), 0.0

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def steps_per_second(self, step: int) -> float:
        return (step - self._step) / max(self.seconds(), 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def waited(self) -> float:
        """Share of the time that the devices waited for a batch."""
        return self._waited / max(self.seconds(), 1e-9)


class Loop:
    """The loop and what happens between its steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        saved: Checkpoints,
        grids: Sampler,
        data: Dataset,
        statistics: Statistics,
        origins: dict,
        mesh: Mesh,
        check_lock: Callable[[], None],
    ):
        """`statistics` and `origins` are kept with each checkpoint; `check_lock` goes before it."""
        self._config, self._options = config, config.training
        self._workdir, self._saved, self._grids, self._data = workdir, saved, grids, data
        self._statistics, self._origins = statistics, origins
        self._check_lock = check_lock
        self._is_finite = jax.jit(is_finite)
        self._no_metrics = jax.jit(TrainMetrics.empty, out_shardings=devices.replicated(mesh))
        self._writer, self._warned = None, False

    def run(self, state: TrainState, feed: Feed) -> TrainState:
        start, num_steps = int(state.step), self._options.num_steps
        if start >= num_steps:
            say(f"run      nothing to do: {start:,} steps of {num_steps:,} are done")
            return state
        if jax.process_index() == 0:
            configuration = self._config.to_dict()
            self._writer = Writer(self._workdir, start, self._options.writers, configuration)
        try:
            profile = Profile(self._workdir, self._options.profile_steps)
            with (
                progress(num_steps, "training", " steps", initial=start) as bar,
                stop_requests() as stop_request,
                contextlib.closing(profile),
                contextlib.closing(feed.batches(start, num_steps)) as batches,
            ):
                return self._steps(state, feed, batches, profile, bar, stop_request)
        finally:
            if self._writer:
                self._writer.close()

    def _steps(
        self,
        state: TrainState,
        feed: Feed,
        batches: Iterator[concurrent.futures.Future],
        profile: Profile,
        bar,
        stop_request: Callable[[], str],
    ) -> TrainState:
        options, start, metrics = self._options, int(state.step), self._no_metrics()
        clock = _Clock(start)
        # Counted on the host: reading state.step would wait for the device at every step.
        for step, batch in zip(
            range(start + feed.steps, options.num_steps + 1, feed.steps), batches, strict=True
        ):
            profile.look(step - feed.steps, feed.steps, state)
            if not batch.done():
                jax.block_until_ready(state)  # until then the devices have something to do
                with clock.waiting():
                    concurrent.futures.wait([batch])
            state, metrics = feed.advance(state, metrics, batch.result())
            bar.update(feed.steps)
            if step == start + feed.steps:
                jax.block_until_ready(state)
                say(f"compile  first step after {clock.seconds():.1f} s")
                clock.restart(step)
            stop = stop_request()
            last = bool(stop) or step == options.num_steps
            if last or _due(step, options.log_every):
                self._report(step, state, metrics, clock)
                metrics = self._no_metrics()
                clock.restart(step)
            elif step // _LOOK_EVERY > (step - feed.steps) // _LOOK_EVERY:
                self._look(step, metrics)
            save, draw = (
                last or _due(step, options.checkpoint_every),
                _due(step, options.sample_every),
            )
            if save or draw:
                jax.block_until_ready(state)
                with clock.paused():
                    if save:
                        self._save(step, state)
                    if draw:
                        self._draw(step, state)
            if stop:
                raise Interrupted(
                    f"{stop}: stopped after step {step:,} and saved in {self._workdir}; the same "
                    "command continues"
                )
        return state

    def _report(self, step: int, state: TrainState, metrics: TrainMetrics, clock: _Clock) -> None:
        options = self._options
        values = {name: float(value) for name, value in metrics.compute().items()}
        values.pop("streak")
        skipped = int(state.nonfinite_total)
        rate = clock.steps_per_second(step) * options.batch_size
        remaining = (options.num_steps - step) * options.batch_size / rate if rate else 0.0
        images, waited = step * options.batch_size, clock.waited()
        much = waited > _MUCH_WAITING
        say(
            f"step {step:,}/{options.num_steps:,} | {images:,} images | loss {values['loss']:.4f} "
            f"(denoise {values['denoise']:.4f}, deblur {values['deblur']:.4f}) | "
            f"consistency {values['consistency']:.2e} | grad {values['grad_norm']:.3g} | "
            f"{rate:,.0f} images/s | ETA {_duration(remaining)}"
            + (f" | {skipped} steps skipped, not finite" if skipped else "")
            + (f" | {waited:.0%} of the time waiting for images" if much else "")
        )
        if much and not self._warned:
            self._warned = True
            say(
                "note     the devices wait for images: put the data on a faster disk, raise "
                "training.device_megabytes so that they live on the device or, if they do, "
                "training.steps_per_call"
            )
        if self._writer:
            extra = {"images": images, "images_per_second": rate, "nonfinite_total": skipped}
            self._writer.scalars(step, values | extra | {"input_wait": waited})
        self._look(step, metrics)

    def _look(self, step: int, metrics: TrainMetrics) -> None:
        """Ends the run after too many gradients in a row that were not finite."""
        streak = int(metrics.streak.compute())
        if streak >= self._options.max_nonfinite:
            raise Diverged(
                f"the gradient was not finite in {streak} steps in a row, up to step {step:,} or "
                "before: stopped. These steps changed no weights and no averages; lower "
                "optimizer.learning_rate, or look at the data and model.dtype"
            )

    def _save(self, step: int, state: TrainState) -> None:
        self._check_lock()
        self._saved.check()
        if not bool(self._is_finite(state)):
            raise Diverged(
                f"the state at step {step:,} is not finite and was not saved; the "
                f"checkpoints in {self._workdir} are from before"
            )
        if self._writer:
            self._writer.flush()
        images = {"images_seen": step * self._options.batch_size}
        self._saved.save(state, self._statistics._asdict(), self._origins | images)

    def _draw(self, step: int, state: TrainState) -> None:
        """Writes the grid of the fixed seeds 0, 1, ... at this step."""
        params = choose_average(state, self._config.sampling.ema)
        seeds = np.arange(self._grids.batch_size)
        images = np.concatenate(list(self._grids.generate(params, seeds, self._data.images)))
        picture = grid(images, min_side=32)
        if self._writer:
            save_png(self._workdir / "samples" / f"step_{step:08d}.png", picture)
            self._writer.image(step, "samples", picture)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
