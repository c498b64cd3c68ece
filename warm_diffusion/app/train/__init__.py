"""Training: what is checked before anything is written, the start or the restore, the loop."""

import copy
import pathlib
import shlex

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import pretrained
from warm_diffusion.app import build, settings
from warm_diffusion.app.train.loop import Loop, loader
from warm_diffusion.data import Dataset
from warm_diffusion.models import weights
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime import devices, lock, processes, storage
from warm_diffusion.runtime.console import say
from warm_diffusion.training import writer
from warm_diffusion.training.checkpoints import Checkpoints, last_checkpoint
from warm_diffusion.training.signals import compiling
from warm_diffusion.training.step import TrainState

_GRID_IMAGES = 64


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains until `config.training.num_steps`, from the latest checkpoint in `workdir` if any.

    Returns:
      The final state; `workdir` has config.json, checkpoints, metrics.jsonl, TensorBoard events and
      sample grids.

    Raises:
      ValueError: a configuration or data that cannot work, or another run's workdir.
      Interrupted: SIGTERM or SIGINT; the state is saved.
      Diverged: gradients or state were not finite; the checkpoints are from before.
    """
    workdir = storage.path(workdir)
    storage.check_for_checkpoints(workdir)
    settings.check(config)
    writer.check(config.training.writers)
    # A kill in the first save leaves no finished checkpoint: such a run starts again.
    steps, about = last_checkpoint(workdir)
    path = workdir / "config.json"
    began = about.get("configuration") or _written(path)
    if steps and began is None:
        raise ValueError(f"{workdir} has no record of what was trained there: give a new --workdir")
    _check_calls(config, steps[-1] if steps else 0)
    config = _realised(config, began)
    mesh = devices.make_mesh()
    devices.check_batch_size("training.batch_size", config.training.batch_size, mesh)
    data, statistics = build.dataset(config), build.data_statistics(config)
    built = build.architecture(config, data.images.shape[1:], statistics)
    settings.check_training(config, built.image_shape)
    make_state, abstract = build.initial_state(config, built, mesh)
    step = build.train_step(config, built, mesh, resident=build.resident(config, data))
    load = loader(config, data, mesh)
    step.eval_shape(*build.step_arguments(config, data, abstract, mesh))  # what is wrong shows
    grid_size = max(1, _GRID_IMAGES // mesh.size) * mesh.size
    grids = build.sampler(config, built, mesh, batch_size=grid_size)
    initial = None if steps else _initial_params(config, built)
    _refuse_other_data(about, config, data)
    changes = settings.compare(config, began, path) if began is not None else []
    processes.agree(**{
        "the hash of the images": data.info["content_sha256"],
        f"the last checkpoint in {workdir}": steps[-1] if steps else None,
        f"the hash of init_from={config.init_from}": storage.digest(initial),
    })  # fmt: skip
    # All that can be wrong is wrong by here: nothing of the run has been written yet.
    with lock.hold(workdir) as check_lock:
        processes.check_shared(workdir)
        storage.write_bytes(path, settings.to_json(config).encode())
        for change in changes:
            say(f"config   changed since this run began: {change}")
        _say_what_is_trained(config, data, abstract, mesh)
        with Checkpoints(
            workdir, keep_latest=config.training.keep_latest, keep_every=config.training.keep_every
        ) as saved:
            state = saved.restore_latest(abstract, report=say)
            if state is None:
                with compiling("the initial weights"):
                    state = _start_from(make_state(), initial)
                say(f"run      new, in {workdir}")
            else:
                done = int(state.step)
                _check_calls(config, done)
                _refuse_other_data(saved.about(done), config, data)
                images = done * config.training.batch_size
                say(f"run      continues at step {done:,} ({images:,} images), in {workdir}")
            origins = {  # what is needed to use a checkpoint, and where it comes from
                "model": built.description,
                "configuration": settings.plain(config),
                "weights": [
                    f"EMA, half-life {half:,} images"
                    for half in config.training.ema_halflife_images
                ],
                "data_sha256": data.info["content_sha256"],
                "versions": settings.versions(),
            }
            loop = Loop(
                config, workdir, step, load, saved, grids, data, statistics, origins, check_lock,
                mesh,
            )  # fmt: skip
            state = loop.run(state)
        say(f"done     {int(state.step):,} steps; to draw samples:")
        say(f"         python main.py --mode=sample --workdir={shlex.quote(str(workdir))}")
        return state


def _realised(config: ConfigDict, began: dict | None) -> ConfigDict:
    """The configuration with a number for the ratio "auto": the run's, or else the data's."""
    if config.schedule.name != "constant_bnr" or config.schedule.constant_bnr.bnr != "auto":
        return config
    if began is None:
        config = build.realised(config)
        share = config.schedule.spectral.attenuation
        why = f"at which no band loses more than {100 * share:g} % before noise hides it"
    else:
        config = copy.deepcopy(config)
        config.schedule.constant_bnr.bnr = began["schedule"]["constant_bnr"]["bnr"]
        why = "as this run began"
    say(f"bnr      auto: {config.schedule.constant_bnr.bnr}, {why}")
    return config


def _initial_params(config: ConfigDict, built: Architecture) -> dict | None:
    """The weights of `config.init_from`: of the same network, at this or another resolution."""
    if not config.init_from:
        return None
    model = pretrained.load(config.init_from)
    resolution = built.network.resolution
    params = weights.at_resolution(model.params, model.network, resolution)
    try:
        params = weights.unflatten(weights.flatten(params), built.abstract_params)
    except ValueError as error:
        raise ValueError(f"init_from={config.init_from}: {error} (see config.model)") from error
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
        raise ValueError(f"init_from={config.init_from} has weights that are not finite")
    say(f"weights  from {config.init_from}")
    return params


def _start_from(state: TrainState, params: dict | None) -> TrainState:
    """The state with other weights, in the averages too; the optimizer starts afresh."""
    if params is None:
        return state
    params = devices.put_as(params, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    # Copies: the step donates the state, and one buffer cannot be donated twice.
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in state.ema)
    return state.replace(params=params, ema=ema)


def _written(path: pathlib.Path) -> dict | None:
    """The configuration in a run's config.json, of which no checkpoint says more; None without."""
    try:
        found = storage.read_json(path) if path.exists() else None
        if not isinstance(found, dict | None):
            raise ValueError(f"{path} holds {type(found).__name__}, not a configuration")
        return found
    except ValueError as error:
        raise ValueError(
            f"{error}; no checkpoint has the configuration either: delete that file to begin anew"
        ) from error


def _check_calls(config: ConfigDict, step: int) -> None:
    steps = config.training.steps_per_call
    if step % steps:
        raise ValueError(
            f"training.steps_per_call={steps} must divide the {step:,} steps of the run so far: "
            "continue it with 1"
        )


def _refuse_other_data(about: dict, config: ConfigDict, data: Dataset) -> None:
    found, saved = data.info["content_sha256"], about.get("data_sha256")
    if saved and found != saved:
        raise ValueError(
            f"{config.data.source} holds other images than this run was trained on (SHA-256 "
            f"{found[:16]}, the run's {saved[:16]}): give the run's data, or a new --workdir"
        )


def _say_what_is_trained(
    config: ConfigDict, data: Dataset, abstract: TrainState, mesh: Mesh
) -> None:
    height, width, channels = data.images.shape[1:]
    parameters = clu.parameter_overview.count_parameters(abstract.params)
    batch = config.training.batch_size
    say(
        f"data     {config.data.source}: {len(data.images):,} images {height}x{width}x{channels}, "
        f"{'on the device' if build.resident(config, data) else 'read from disk'}"
    )
    if batch > len(data.images):
        say(f"note     training.batch_size={batch:,} is more than the {len(data.images):,} images")
    say(f"network  {config.model.name}: {parameters:,} parameters")
    say(
        f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"global batch {batch}, {batch // mesh.size} per device"
    )
