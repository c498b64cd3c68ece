"""The one place where a configuration becomes objects: data, network, path, loss, step, sampler.

Everything below takes plain arguments; `configs/default.py` explains every key.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import architecture as _architecture
from warm_diffusion import denoiser, drawing, losses, samplers, schedules, spectra
from warm_diffusion.architecture import Architecture
from warm_diffusion.data import Dataset, Statistics, augmentation, load_dataset, statistics
from warm_diffusion.data.images import from_uint8
from warm_diffusion.evaluation import features, reference
from warm_diffusion.runtime import devices
from warm_diffusion.training import program
from warm_diffusion.training import state as train_state

# The arguments of each schedule, and the keys of config.schedule where they have other names.
_LEVELS = {name: name for name in ("beta_min", "beta_max", "p_mean", "p_std")}
_SCHEDULES = {
    "hot": _LEVELS,
    "constant_bnr": {"bnr": "bnr", **_LEVELS},
    "any_bnr": {"bnr": "bnr", "bnr_range": "bnr_range", "hot_share": "hot_share", **_LEVELS},
    "spectral": {"attenuation": "attenuation", **_LEVELS},
    "blurring_diffusion": {"sigma_blur_max": "sigma_blur_max"},
    "cold": {"alpha_min": "cold_alpha_min", "alpha_max": "cold_alpha_max", "beta": "cold_beta"},
}

# Keys of the network that do not matter once it is trained.
_AFTERWARDS = ("model.dtype", "model.dropout", "model.label_dropout")


# --- data ----------------------------------------------------------------------------------------


def _data_options(config: ConfigDict) -> dict:
    options = config.data.to_dict()
    options.pop("device_megabytes")
    return options


def dataset(config: ConfigDict) -> Dataset:
    """The prepared images of `config.data`."""
    return load_dataset(**_data_options(config))


@functools.lru_cache(maxsize=4)
def _statistics(**options) -> Statistics:
    with jax.ensure_compile_time_eval():  # numbers, also where a path is built inside jit
        return statistics(load_dataset(**options).images)


def data_statistics(config: ConfigDict) -> Statistics:
    """Mean image and spectrum of the data; computed once in a process."""
    return _statistics(**_data_options(config))


def labels(config: ConfigDict, data: Dataset) -> np.ndarray | None:
    """The classes of a data set's images, int32 [N], if the network is told them.

    Raises:
      ValueError: the data have no classes, or another number than `config.model.num_classes`.
    """
    expected, names = config.model.num_classes, data.info["class_names"]
    if expected == 0:
        return None
    if len(names) != expected:
        raise ValueError(
            f"model.num_classes is {expected}, but {config.data.source} has {len(names)} classes"
        )
    if int(data.labels.min()) < 0:
        raise ValueError(f"an image of {config.data.source} has no class: put all in sub-folders")
    return data.labels


# --- network and path ----------------------------------------------------------------------------


def bnr(config: ConfigDict) -> float:
    """The number that `config.schedule.bnr` means; for "auto" rounded to three decimals.

    Raises:
      ValueError: neither a number nor "auto", or data without detail.
    """
    value = config.schedule.bnr
    if value == "auto":
        spectrum = data_statistics(config).spectrum
        return round(spectra.recommend_bnr(spectrum, config.schedule.attenuation), 3)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"schedule.bnr must be a number or auto, got {value!r}")
    return float(value)


def describe_schedule(config: ConfigDict) -> dict:
    """Name and numbers of the path of `config.schedule`, for `schedules.by_name`."""
    name = config.schedule.name
    if name not in _SCHEDULES:
        raise ValueError(f"schedule.name must be one of {', '.join(_SCHEDULES)}, got {name!r}")
    numbers = {to: config.schedule[key] for to, key in _SCHEDULES[name].items()}
    if "bnr" in numbers:
        numbers["bnr"] = bnr(config)
    return {"name": name} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in numbers.items()
    }


def describe(config: ConfigDict, image_shape: tuple[int, int, int]) -> dict:
    """The description (`architecture.py`) of the network that a configuration trains."""
    options = config.model.to_dict()
    own = {name: options.pop(name) for name in ("parameterization", "preconditioning")}
    options.pop("remat")  # how it is computed, not what it is
    network = options | {
        "resolution": image_shape[0],
        "channels": image_shape[2],
        "augment_dim": augmentation.NUM_LABELS if config.augment.transforms else 0,
        "heads": denoiser.num_heads(own["parameterization"]),
    }
    return {
        "image_shape": list(image_shape),
        "network": {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()},
        **own,
        "sigma_data": config.loss.sigma_data,
        "schedule": describe_schedule(config),
    }


def configuration_of(description: Mapping) -> dict:
    """The keys of a configuration that a description tells: the inverse of `describe`."""
    network, path = description["network"], description["schedule"]
    elsewhere = ("resolution", "channels", "augment_dim", "heads")
    own = {key: value for key, value in network.items() if key not in elsewhere}
    own |= {key: description[key] for key in ("parameterization", "preconditioning")}
    keys = _SCHEDULES.get(path["name"], {})
    numbers = {keys[name]: value for name, value in path.items() if name in keys}
    return {
        "data": {"resolution": network["resolution"], "channels": network["channels"]},
        "model": {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()},
        "schedule": {"name": path["name"], **numbers},
        "loss": {"sigma_data": description["sigma_data"]},
    }


def architecture(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    statistics: Statistics | None = None,
) -> Architecture:
    """Network and path of a configuration for images (H, W, C).

    `statistics` of the data are computed where they are needed and not given.

    Raises:
      ValueError: a name that is not known, a number or a size that does not work.
    """
    description = describe(config, image_shape)
    if statistics is None and _architecture.needs_statistics(description):
        statistics = data_statistics(config)
    return _architecture.build(description, statistics, remat=config.model.remat)


def schedule(config: ConfigDict, statistics: Statistics | None = None) -> schedules.Schedule:
    """The path of `config.schedule`; `statistics` as for `architecture`."""
    description = describe_schedule(config)
    if description["name"] == "spectral":
        statistics = statistics or data_statistics(config)
        return schedules.by_name(spectrum=statistics.spectrum, **description)
    return schedules.by_name(**description)


def sampling_schedule(
    config: ConfigDict, statistics: Statistics | None = None
) -> schedules.Schedule:
    """The path to sample along: that of `config.schedule`, or the ratio `config.sampling.bnr`."""
    if config.sampling.bnr < 0:
        return schedule(config, statistics)
    levels = {"beta_min": config.schedule.beta_min, "beta_max": config.schedule.beta_max}
    return schedules.constant_bnr(config.sampling.bnr, **levels)


def trained_architecture(config: ConfigDict, trained: Architecture) -> Architecture:
    """A trained architecture with what a configuration may change afterwards: precision, memory.

    Raises:
      ValueError: the configuration asks for another network than was trained; names every key.
    """
    was, now = (
        {f"model.{key}": value for key, value in told["model"].items()} | told["loss"]
        for told in map(
            configuration_of, (trained.description, describe(config, trained.image_shape))
        )
    )
    differences = [
        f"{key} is {value!r}, not {now.get(key)!r}"
        for key, value in was.items()
        if value != now.get(key) and key not in _AFTERWARDS
    ]
    if differences:
        raise ValueError(
            f"the network was trained otherwise: {'; '.join(differences)}. Leave these keys out"
        )
    network = {**trained.description["network"], "dtype": config.model.dtype}
    return _architecture.build(
        {**trained.description, "network": network}, trained.statistics, remat=config.model.remat
    )


# --- training ------------------------------------------------------------------------------------


def loss(
    config: ConfigDict, built: Architecture, path: schedules.Schedule | None = None
) -> train_state.LossFn:
    """(params, keys [B], Batch) -> LossTerms of the training objective.

    `path` stands in for the architecture's, where its ratio is an argument of a jitted function.
    """
    path, augment = path or built.schedule, config.augment
    divides = built.description["parameterization"] != "score"
    residual_weight = config.loss.residual_weight if divides else 0.0
    residual_floor = config.loss.residual_floor if divides else 0.0
    losses.check_residual_weight(residual_weight, residual_floor)

    def loss_fn(params, keys, batch):
        loss_keys, augment_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        images, augment_labels = from_uint8(batch.images), None
        if augment.transforms:
            images, augment_labels = augmentation.augment(
                augment_keys, images, augment.probability, augment.transforms
            )
        denoise = built.denoiser(
            params,
            batch.labels,
            augment_labels=augment_labels,
            dropout_key=jax.random.fold_in(keys[0], 2),
        )
        return losses.score_matching_loss(
            denoise,
            loss_keys,
            images,
            path,
            sigma_data=config.loss.sigma_data,
            residual_weight=residual_weight,
            residual_floor=residual_floor,
        )

    return loss_fn


def initial_state(
    config: ConfigDict, built: Architecture, mesh: Mesh
) -> tuple[Callable[[], train_state.TrainState], train_state.TrainState]:
    """A jitted function that makes the state before the first step, and its abstract form."""
    options = config.optimizer
    rate = train_state.warmup_schedule(
        options.learning_rate, options.warmup_images, config.training.batch_size
    )
    optimizer = optax.adam(rate, b1=options.b1, b2=options.b2, eps=options.eps)
    if options.grad_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(options.grad_clip), optimizer)

    def make():
        params = built.init_params(jax.random.key(config.seed))
        num_ema = len(config.training.ema_halflife_images)
        return train_state.create_state(built.network.apply, params, optimizer, num_ema)

    shapes = jax.eval_shape(make)
    shardings = devices.state_shardings(config.training.sharding, shapes, mesh)
    made = devices.jit(make, mesh, once=True, out_shardings=shardings)
    return made, devices.abstract(shapes, shardings)


def train_step(
    config: ConfigDict,
    built: Architecture,
    mesh: Mesh,
    *,
    resident: bool = False,
    path: Callable[[jax.Array], schedules.Schedule] | None = None,
    loss_fn: train_state.LossFn | None = None,
) -> Callable:
    """The jitted step: state and metrics donated, the batch split, the state as it is given.

    Args:
      config: see `configs/default.py`.
      built: of this configuration.
      mesh: the devices.
      resident: the batch is given as all images, everywhere, and the indices of the batch, split.
      path: makes the path of a traced ratio, where one program trains many.
      loss_fn: stands in for the configuration's.

    Returns:
      (state, metrics, batch, seed, ratio) -> (state, metrics); with `resident` (state, metrics,
      stored, indices, seed, ratio); `training.steps_per_call` above 1 adds an axis
      (`program.jitted`). Seed and ratio are arguments so that many trainings share a program; the
      ratio is not used without `path`.
    """
    options = config.training

    def shardings(tree):
        return devices.state_shardings(options.sharding, tree, mesh)

    def make(key, loss_fn):
        def loss_of_split(params, *batch):
            return loss_fn(devices.gathered(params, mesh, shardings(params)), *batch)

        return train_state.make_train_step(
            loss_fn if options.sharding == "replicated" else loss_of_split, key,
            batch_size=options.batch_size, ema_halflives=options.ema_halflife_images,
            ema_rampup=options.ema_rampup, grad_accumulation=options.grad_accumulation,
            unroll=devices.platform(mesh) == "cpu",
        )  # fmt: skip

    devices.check_slices(options.grad_accumulation, options.batch_size, mesh)
    fixed = loss_fn or loss(config, built)
    make(jax.random.key(0), fixed)  # what does not fit shows here

    def step(state, metrics, *arguments):
        *batch, seed, ratio = arguments
        if resident:
            stored, indices = batch
            batch = [jax.tree.map(lambda leaf: leaf[indices], stored)]
        chosen = loss(config, built, path(ratio)) if path else fixed
        state, metrics = make(jax.random.key(seed), chosen)(state, metrics, *batch)
        return jax.lax.with_sharding_constraint(state, shardings(state)), metrics

    return program.jitted(step, mesh, resident=resident, steps=options.steps_per_call)


def step_arguments(config: ConfigDict, *of, resident: bool = False) -> tuple:
    """The abstract arguments of `train_step`; `of` state, images, mesh: see `program.arguments`."""
    size, steps = config.training.batch_size, config.training.steps_per_call
    return program.arguments(*of, batch_size=size, resident=resident, steps=steps)


# --- sampling and evaluation ---------------------------------------------------------------------


def sampling_settings(config: ConfigDict) -> drawing.Settings:
    """Solver, steps, stochasticity and class of `config.sampling`."""
    options = config.sampling
    churn = samplers.Churn(options.s_churn, options.s_min, options.s_max, options.s_noise)
    names = ("solver", "num_steps", "grid", "rho", "label", "guidance")
    return drawing.Settings(
        **{name: options[name] for name in names}, churn=churn if options.s_churn > 0 else None
    )


def sampler(
    config: ConfigDict,
    built: Architecture,
    mesh: Mesh,
    *,
    batch_size: int = 0,
    return_trajectory: bool = False,
) -> drawing.Sampler:
    """The sampler of `config.sampling`; `batch_size` over all devices, 0: the configuration's."""
    return drawing.sampler(
        built,
        sampling_schedule(config, built.statistics),
        sampling_settings(config),
        batch_size=batch_size or devices.global_batch(config.sampling.batch_size, mesh),
        mesh=mesh,
        return_trajectory=return_trajectory,
    )


def extractor(config: ConfigDict) -> features.Extractor:
    """The features of `config.eval`, on all devices."""
    weights = config.eval.inception_weights
    return features.extractor(config.eval.features, weights=weights, mesh=devices.make_mesh())


def split_name(config: ConfigDict) -> str:
    """Which part of the data `config.data` is: `eval.split`, or what the source says, or train."""
    if config.eval.split:
        return config.eval.split
    kind, _, argument = config.data.source.partition(":")
    return (argument.partition(":")[2] if kind == "tfds" else "") or "train"


def provenance(config: ConfigDict, data: Dataset, extract: features.Extractor) -> dict:
    """What statistics of these images in these features are of (`reference.facts`)."""
    return reference.facts(
        extract,
        count=len(data.images),
        image_shape=data.images.shape[1:],
        split=split_name(config),
        source=config.data.source,
        data_sha256=data.info["content_sha256"],
        recipe=data.info["resize"],
    )
