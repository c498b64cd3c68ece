"""Training: the loop around the jitted step, its reports, grids and checkpoints."""

import contextlib
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import factory, models, settings
from warm_diffusion.data import Dataset, batch_indices
from warm_diffusion.data.images import grid, save_png
from warm_diffusion.jobs import Diverged, Interrupted
from warm_diffusion.jobs.console import progress, say
from warm_diffusion.jobs.ratio import realise_bnr
from warm_diffusion.jobs.sample import generate
from warm_diffusion.jobs.trained import choose_weights
from warm_diffusion.training import devices
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.signals import stop_requests
from warm_diffusion.training.state import (
    Batch,
    TrainMetrics,
    TrainState,
    is_finite,
    make_train_step,
)
from warm_diffusion.training.writer import Writer

_GRID_IMAGES = 64


def train_and_evaluate(config: ConfigDict, workdir: str) -> TrainState:
    """Trains until `config.training.num_steps`, from the latest checkpoint in `workdir` if any.

    Args:
      config: see `configs/default.py`.
      workdir: gets config.json, checkpoints, metrics.jsonl, TensorBoard events and sample grids.

    Returns:
      The final state.

    Raises:
      ValueError: a configuration or data that cannot work, or another run's workdir.
      Interrupted: SIGTERM or SIGINT; the state is saved.
      Diverged: gradients or state were not finite; the checkpoints are from before.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()
    config = realise_bnr(config, workdir)
    mesh = devices.make_mesh()
    devices.check_batch_size("training.batch_size", config.training.batch_size, mesh)
    data = factory.dataset(config)
    image_shape = data.images.shape[1:]
    network = factory.model(config, image_shape)
    make_state, abstract = factory.initial_state(config, network, image_shape, mesh)
    advance = _make_advance(config, network, data, mesh)
    grids = factory.sampler(config, network, image_shape, _grid_size(mesh), mesh)
    initial = None if _has_checkpoint(workdir) else _initial_params(config, network)
    # All that can be wrong is wrong by here: nothing of the run has been written yet.
    for change in settings.write_or_compare(config, workdir / "config.json"):
        say(f"config   changed since this run began: {change}")
    _describe(config, data, abstract, mesh)

    saved = Checkpoints(
        workdir, keep_latest=config.training.keep_latest, keep_every=config.training.keep_every
    )
    try:
        state = saved.restore_latest(abstract, report=say)
        if state is None:
            state = _start_from(make_state(), initial, mesh)
            say(f"run      new, in {workdir}")
        else:
            images = int(state.step) * config.training.batch_size
            say(f"run      continues at step {int(state.step):,} ({images:,} images), in {workdir}")
        loop = _Loop(config, workdir, saved, grids, data, mesh)
        return loop.run(state, advance)
    finally:
        saved.close()


def _has_checkpoint(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("[0-9]*"))


def _initial_params(config: ConfigDict, network: models.UNet) -> dict | None:
    if not config.init_from:
        return None
    say(f"weights  from {config.init_from}")
    return models.load_initial(pathlib.Path(config.init_from).expanduser(), network)


def _start_from(state: TrainState, params: dict | None, mesh: Mesh) -> TrainState:
    """The state with other weights, in the averages too; the optimizer starts afresh."""
    if params is None:
        return state
    params = devices.put_replicated(jax.tree.map(np.asarray, params), mesh)
    # Copies: the step donates the state, and one buffer cannot be donated twice.
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in state.ema)
    return state.replace(params=params, ema=ema)


def _grid_size(mesh: Mesh) -> int:
    return max(1, _GRID_IMAGES // mesh.size) * mesh.size


def _describe(config: ConfigDict, data: Dataset, abstract: TrainState, mesh: Mesh) -> None:
    height, width, channels = data.images.shape[1:]
    parameters = clu.parameter_overview.count_parameters(abstract.params)
    batch = config.training.batch_size
    say(
        f"data     {config.data.source}: {len(data.images):,} images {height}x{width}x{channels}, "
        f"{'on the device' if _fits_device(config, data) else 'read from disk'}"
    )
    say(f"network  {config.model.name}: {parameters:,} parameters")
    say(
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"batch {batch} in all, {batch // mesh.size} a device"
    )


def _fits_device(config: ConfigDict, data: Dataset) -> bool:
    return data.images.nbytes <= config.data.device_megabytes * 2**20


Advance = Callable[[TrainState, TrainMetrics, np.ndarray], tuple[TrainState, TrainMetrics]]


def _make_advance(config: ConfigDict, network, data: Dataset, mesh: Mesh) -> Advance:
    """The jitted, donated, sharded step; takes the indices of the global batch."""
    train_step = make_train_step(
        factory.loss(config, network),
        jax.random.key(config.seed),
        batch_size=config.training.batch_size,
        ema_halflives=config.training.ema_halflife_images,
        ema_rampup=config.training.ema_rampup,
        grad_accumulation=config.training.grad_accumulation,
    )
    labels = factory.labels(config, data)
    everywhere, split = devices.replicated(mesh), devices.split(mesh)
    options = dict(donate_argnums=(0, 1), out_shardings=everywhere)
    if not _fits_device(config, data):
        step = jax.jit(train_step, in_shardings=(everywhere, everywhere, split), **options)

        def advance(state, metrics, indices):
            local = devices.process_slice(indices)
            batch = Batch(data.images[local], None if labels is None else labels[local])
            return step(state, metrics, devices.put_split(batch, mesh))

        return advance

    stored = devices.put_replicated(Batch(np.asarray(data.images), labels), mesh)
    step = jax.jit(
        lambda state, metrics, stored, indices: train_step(
            state, metrics, jax.tree.map(lambda leaf: leaf[indices], stored)
        ),
        in_shardings=(everywhere, everywhere, everywhere, split),
        **options,
    )
    return lambda state, metrics, indices: step(
        state, metrics, stored, devices.put_split(devices.process_slice(indices), mesh)
    )


class _Clock:
    """Speed since the last report, without the time for compiling, saving and drawing."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._start = step, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def steps_per_second(self, step: int) -> float:
        return (step - self._step) / max(self.seconds(), 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin


class _Loop:
    """The loop and what happens between its steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        saved: Checkpoints,
        grids: factory.Sampler,
        data: Dataset,
        mesh: Mesh,
    ):
        self._config, self._options = config, config.training
        self._workdir, self._saved, self._grids, self._data = workdir, saved, grids, data
        self._is_finite = jax.jit(is_finite)
        self._no_metrics = jax.jit(TrainMetrics.empty, out_shardings=devices.replicated(mesh))
        self._writer = None

    def run(self, state: TrainState, advance: Advance) -> TrainState:
        start, num_steps = int(state.step), self._options.num_steps
        if start >= num_steps:
            say(f"run      nothing to do: {start:,} steps of {num_steps:,} are done")
            return state
        if jax.process_index() == 0:
            self._writer = Writer(self._workdir, start)
        try:
            with (
                progress(num_steps, "training", " steps", initial=start) as bar,
                stop_requests() as stop_request,
            ):
                return self._steps(state, advance, bar, stop_request)
        finally:
            if self._writer:
                self._writer.close()

    def _steps(
        self, state: TrainState, advance: Advance, bar, stop_request: Callable[[], str]
    ) -> TrainState:
        options, start, metrics = self._options, int(state.step), self._no_metrics()
        clock = _Clock(start)
        # Counted on the host: reading state.step would wait for the device at every step.
        for step in range(start + 1, options.num_steps + 1):
            seed, count = self._config.seed, len(self._data.images)
            indices = batch_indices(seed, step - 1, options.batch_size, count)
            state, metrics = advance(state, metrics, indices)
            bar.update()
            if step == start + 1:
                jax.block_until_ready(state)
                say(f"compile  first step after {clock.seconds():.1f} s")
                clock.restart(step)
            stop = self._stop_reason(stop_request, step)
            last = bool(stop) or step == options.num_steps
            if last or _due(step, options.log_every):
                self._report(step, state, metrics, clock)
                metrics = self._no_metrics()
                clock.restart(step)
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

    def _stop_reason(self, stop_request: Callable[[], str], step: int) -> str:
        if jax.process_count() == 1:
            return stop_request()
        # All processes must stop at the same step: orbax agrees on one between them.
        return "preemption" if self._saved.reached_preemption(step) else ""

    def _report(self, step: int, state: TrainState, metrics: TrainMetrics, clock: _Clock) -> None:
        options = self._options
        values = {name: float(value) for name, value in metrics.compute().items()}
        skipped, in_a_row = int(state.nonfinite_total), int(state.nonfinite_in_a_row)
        rate = clock.steps_per_second(step) * options.batch_size
        remaining = (options.num_steps - step) * options.batch_size / rate if rate else 0.0
        images = step * options.batch_size
        say(
            f"step {step:,}/{options.num_steps:,} | {images:,} images | loss {values['loss']:.4f} "
            f"(denoise {values['denoise']:.4f}, deblur {values['deblur']:.4f}) | "
            f"consistency {values['consistency']:.2e} | grad {values['grad_norm']:.3g} | "
            f"{rate:,.0f} images/s | ETA {_duration(remaining)}"
            + (f" | {skipped} steps skipped, not finite" if skipped else "")
        )
        if self._writer:
            extra = {"images": images, "images_per_second": rate, "nonfinite_total": skipped}
            self._writer.scalars(step, values | extra)
        if in_a_row >= options.max_nonfinite:
            raise Diverged(
                f"the gradient was not finite in the last {in_a_row} steps, up to step {step:,}: "
                "stopped. Weights and averages are those from before; lower "
                "optimizer.learning_rate, or look at the data and model.dtype"
            )

    def _save(self, step: int, state: TrainState) -> None:
        self._saved.check()
        if not bool(self._is_finite(state)):
            raise Diverged(
                f"the state at step {step:,} is not finite and was not saved; the "
                f"checkpoints in {self._workdir} are from before"
            )
        self._saved.save(state, about(self._config, self._data))

    def _draw(self, step: int, state: TrainState) -> None:
        """Writes the grid of the fixed seeds 0, 1, ... at this step."""
        params, _ = choose_weights(self._config, state)
        seeds = np.arange(self._grids.batch_size)
        images = np.concatenate(list(generate(self._grids, params, seeds, self._data)))
        picture = grid(images, min_side=32)
        if self._writer:
            folder = self._workdir / "samples"
            folder.mkdir(exist_ok=True)
            save_png(folder / f"step_{step:08d}.png", picture)
            self._writer.image(step, "samples", picture)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def about(config: ConfigDict, data: Dataset) -> dict:
    """Facts kept with each checkpoint: what is needed to use it without the data, and origins."""
    packages = ("warm-diffusion", "jax", "flax", "optax", "orbax-checkpoint")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # run from a checkout, without pip install
    return {
        "image_shape": list(data.images.shape[1:]),
        "batch_size": config.training.batch_size,
        "data_sha256": data.info["content_sha256"],
        "versions": versions,
    }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
