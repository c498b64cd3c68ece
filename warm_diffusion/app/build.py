"""The one place where a configuration becomes objects: data, network, path, loss, step, sampler.

Everything below takes plain arguments; `configs/default.py` explains every key.
"""

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import losses, pretrained, public, samplers, schedules, spectra
from warm_diffusion.app import drawing
from warm_diffusion.data import Dataset, Statistics, augmentation, load_dataset, statistics
from warm_diffusion.data.images import from_uint8
from warm_diffusion.evaluation import features, reference
from warm_diffusion.pretrained import Architecture, Model
from warm_diffusion.runtime import devices
from warm_diffusion.runtime.console import say, say_weights
from warm_diffusion.training import step

# Keys of the network that do not matter once it is trained.
_AFTERWARDS = ("model.dtype", "model.dropout", "model.label_dropout")


# --- public files --------------------------------------------------------------------------------

_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def fetch_public(config: ConfigDict, mode: str, checkpoint: str | None) -> str | None:
    """Puts paths in place of the names of public files, which `config.download` allows to fetch.

    The checkpoint, whose path is returned, `eval.reference` and `init_from` may be edm:NAME. Where
    `eval` names no Inception weights, they are found if its features, or a reference of EDM's, need
    them, and for eval.features=auto and images in colour if they are there or may be fetched.

    Raises:
      ValueError: an unknown name, or a file that is not there and may not or cannot be fetched.
    """
    options, fetch = config.eval, functools.partial(public.obtain, download=config.download)
    of_edm = options.reference.startswith("edm:")
    if of_edm:
        options.reference = str(fetch(options.reference))
    if config.init_from.startswith("edm:") and mode == "train":
        config.init_from = str(fetch(config.init_from))
    if mode in ("eval", "fid_stats") and not options.inception_weights:
        known = config.download or (public.default_folder() / _INCEPTION).is_file()
        colour = config.data.channels == 3 and known
        if options.features == "inception" or (options.features == "auto" and (of_edm or colour)):
            options.inception_weights = str(fetch(_INCEPTION))
    if checkpoint and checkpoint.startswith("edm:"):
        return str(fetch(checkpoint))
    return checkpoint


# --- data ----------------------------------------------------------------------------------------


def dataset(config: ConfigDict) -> Dataset:
    """The prepared images of `config.data`."""
    return load_dataset(**config.data.to_dict(), download=config.download)


@functools.lru_cache(maxsize=4)
def _statistics(**options) -> Statistics:
    with jax.ensure_compile_time_eval():  # numbers, also where a path is built inside jit
        return statistics(load_dataset(**options).images)


def data_statistics(config: ConfigDict) -> Statistics:
    """Mean image and spectrum of the data; computed once in a process."""
    return _statistics(**config.data.to_dict(), download=config.download)


def labels(config: ConfigDict, data: Dataset) -> np.ndarray | None:
    """The classes of a data set's images, int32 [N], if the network sees them."""
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


def realised(config: ConfigDict) -> ConfigDict:
    """The configuration with a number for `schedule.constant_bnr.bnr="auto"`: the data's."""
    if config.schedule.constant_bnr.bnr != "auto" or config.schedule.name != "constant_bnr":
        return config
    config = copy.deepcopy(config)
    spectrum, attenuation = data_statistics(config).spectrum, config.schedule.spectral.attenuation
    config.schedule.constant_bnr.bnr = round(spectra.recommend_bnr(spectrum, attenuation), 3)
    return config


def describe(config: ConfigDict, image_shape: tuple[int, int, int]) -> dict:
    """The description (`pretrained.py`) of the network that a configuration trains."""
    config = realised(config)
    everything = config.to_dict() | {"image_shape": image_shape, "schedule": chosen_path(config)}
    del everything["model"]["remat"]  # how it is computed, not what it is
    sections = {key: everything[key] for key in ("image_shape", *pretrained.SECTIONS)}
    return json.loads(json.dumps(sections))  # as it is read again, with lists for tuples


def chosen_path(config: ConfigDict) -> dict:
    """Name and arguments of the path of `config.schedule`, without those of the others."""
    name = config.schedule.name
    return {"name": name, name: config.schedule[name].to_dict()}


def _path_statistics(config: ConfigDict, known: Statistics | None) -> Statistics | None:
    """Statistics for `config.schedule`: those known, or computed where the path is made of them."""
    if known is None and pretrained.takes_spectrum(config.schedule.name):
        return data_statistics(config)
    return known


def architecture(
    config: ConfigDict, image_shape: tuple[int, int, int], statistics: Statistics | None = None
) -> Architecture:
    """Network and path of a configuration for images (H, W, C).

    Raises:
      ValueError: a name that is not known, a number or a size that does not work.
    """
    statistics = _path_statistics(config, statistics)
    return pretrained.build(describe(config, image_shape), statistics, remat=config.model.remat)


def schedule(config: ConfigDict, statistics: Statistics | None = None) -> schedules.Schedule:
    """The path of `config.schedule`."""
    statistics = _path_statistics(config, statistics)
    return pretrained.schedule_of(chosen_path(realised(config)), statistics)


def sampling_schedule(
    config: ConfigDict, statistics: Statistics | None = None
) -> schedules.Schedule:
    """The path to sample along: that of `config.schedule`, or the ratio `config.sampling.bnr`."""
    if config.sampling.bnr < 0:
        return schedule(config, statistics)
    return pretrained.at_ratio(chosen_path(config), config.sampling.bnr)


def trained(config: ConfigDict, checkpoint: str | os.PathLike) -> Model:
    """The model of a checkpoint, with what a configuration may change afterwards.

    That is which average of the weights, precision and memory.

    Raises:
      ValueError: no usable checkpoint, or the configuration asks for another network than was
        trained; names every key.
    """
    model = pretrained.load(checkpoint, config.sampling.ema)
    say_weights(model.info, checkpoint)
    was, now = model.description, describe(config, model.image_shape)
    differences = [
        f"{section}.{key} is {value!r}, not {now[section].get(key)!r}"
        for section in ("model", "denoiser")
        for key, value in was[section].items()
        if value != now[section].get(key) and f"{section}.{key}" not in _AFTERWARDS
    ]
    if differences:
        raise ValueError(
            f"the network was trained with other settings: {'; '.join(differences)}. Leave these "
            "keys out"
        )
    if (bnr := config.sampling.bnr) >= 0:
        _, (low, high) = trained_levels(model.schedule)
        if not 0.99 * low <= bnr <= 1.01 * high:
            ratios = " to ".join(dict.fromkeys((f"{low:.3g}", f"{high:.3g}")))
            say(
                f"note     the network was trained at BNR {ratios}, not {bnr:g}: images may be poor"
            )
    description = {**was, "model": {**was["model"], "dtype": config.model.dtype}}
    built = pretrained.build(description, model.statistics, remat=config.model.remat)
    return dataclasses.replace(model, **vars(built))


@functools.lru_cache(maxsize=2)
def trained_levels(path: schedules.Schedule) -> tuple[tuple[float, float], tuple[float, float]]:
    """The noise (99 % of it) and the ratios that training images have: (low, high) of each."""
    alpha, beta = map(np.asarray, path.sample_levels(jax.random.key(0), (4096,)))
    low, high = np.quantile(beta, (0.005, 0.995))
    ratio = alpha / beta
    return (float(low), float(high)), (float(ratio.min()), float(ratio.max()))


# --- training ------------------------------------------------------------------------------------


def loss(config: ConfigDict, built: Architecture) -> step.LossFn:
    """(params, keys [B], Batch) -> LossTerms of the training objective."""
    augment = config.augment
    # Parameterization score has no residual to learn.
    weight = 0.0 if config.denoiser.parameterization == "score" else config.loss.residual_weight

    def loss_fn(params, keys, batch):
        loss_keys, augment_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        images, augment_labels = from_uint8(batch.images), None
        if augment.transforms:
            images, augment_labels = augmentation.augment(
                augment_keys, images, augment.probability, augment.transforms
            )
        denoise = built.denoiser(
            params, batch.labels, augment_labels=augment_labels,
            dropout_key=jax.random.fold_in(keys[0], 2),
        )  # fmt: skip
        return losses.score_matching_loss(
            denoise, loss_keys, images, built.schedule, residual_weight=weight
        )

    return loss_fn


def initial_state(
    config: ConfigDict, built: Architecture, mesh: Mesh
) -> tuple[Callable[[], step.TrainState], step.TrainState]:
    """A jitted function that makes the state before the first step, and its abstract form."""
    options = config.optimizer
    rate = step.warmup_schedule(
        options.learning_rate, options.warmup_images, config.training.batch_size
    )
    optimizer = optax.adam(rate, b1=options.b1, b2=options.b2, eps=options.eps)
    if options.grad_clip > 0:
        optimizer = optax.chain(optax.clip_by_global_norm(options.grad_clip), optimizer)

    def make():
        params = built.init_params(jax.random.key(config.seed))
        num_ema = len(config.training.ema_halflife_images)
        return step.create_state(built.network.apply, params, optimizer, num_ema)

    shapes = jax.eval_shape(make)
    shardings = devices.state_shardings(config.training.sharding, shapes, mesh)
    made = devices.jit(make, mesh, once=True, out_shardings=shardings)
    return made, devices.abstract(shapes, shardings)


def step_options(config: ConfigDict) -> step.Options:
    """Returns the options by which `config.training` computes a step."""
    names = [field.name for field in dataclasses.fields(step.Options)]
    return step.Options(**{name: config.training[name] for name in names})


def train_step(
    config: ConfigDict, built: Architecture, mesh: Mesh, *, resident: bool = False
) -> Callable:
    """The jitted step of a configuration, `training.step.jitted`."""
    return step.jitted(loss(config, built), step_options(config), mesh, resident=resident)


def step_arguments(config: ConfigDict, data: Dataset, state: step.TrainState, mesh: Mesh) -> tuple:
    """The abstract arguments of `train_step` for a data set and an abstract state."""
    batch, options = step.Batch(data.images, labels(config, data)), step_options(config)
    return step.abstract_arguments(state, batch, options, mesh, resident=resident(config, data))


def resident(config: ConfigDict, data: Dataset) -> bool:
    """Returns whether training keeps the images on the devices."""
    return data.images.nbytes <= config.training.device_megabytes * 2**20


# --- sampling and evaluation ---------------------------------------------------------------------


def sampling_settings(config: ConfigDict) -> pretrained.Sampling:
    """Solver, steps, stochasticity and class of `config.sampling`."""
    options, churn = config.sampling, samplers.Churn(**config.sampling.churn.to_dict())
    names = ("solver", "num_steps", "time_grid", "rho", "label", "guidance")
    return pretrained.Sampling(
        **{name: options[name] for name in names}, churn=churn if churn.s_churn > 0 else None
    )


def sampler(
    config: ConfigDict,
    built: Architecture,
    mesh: Mesh,
    *,
    batch_size: int = 0,
    num_images: int = 0,
    return_trajectory: bool = False,
) -> drawing.Sampler:
    """The sampler of `config.sampling`, its seeds divided over the devices of a mesh.

    `batch_size` is that over all devices; 0 is the configuration's, or less where no more than
    `num_images` are drawn. With `return_trajectory` it draws (images, states [num_steps + 1, B, H,
    W, C]).

    Raises:
      ValueError: a solver that is not known or does not fit the path.
    """
    batch_size = batch_size or devices.global_batch(config.sampling.batch_size, mesh, num_images)
    path, sampling = sampling_schedule(config, built.statistics), sampling_settings(config)

    def function(params, seeds, start):
        params = jax.lax.with_sharding_constraint(params, everywhere)  # in training it may be split
        return built.draw(params, seeds, path, sampling, start, return_trajectory=return_trajectory)

    everywhere, split = devices.replicated(mesh), devices.split(mesh)
    # With the shardings that a call has, so that it need not be traced again.
    params = jax.tree.map(lambda leaf: leaf.update(sharding=everywhere), built.abstract_params)
    seeds = jax.ShapeDtypeStruct((batch_size,), np.uint32, sharding=split)
    shape = (batch_size, *built.image_shape)
    image = jax.ShapeDtypeStruct(shape, np.float32, sharding=split)
    arguments = params, seeds, image if path.needs_start else None
    shardings = {"in_shardings": (None, split, split), "out_shardings": everywhere}
    program = devices.jit(function, mesh, **shardings)
    program.eval_shape(*arguments)  # what does not fit shows here, before any training
    return drawing.Sampler(program, arguments, batch_size, sampling.num_calls, path, mesh)


def extractor(config: ConfigDict, image_shape: tuple[int, int, int]) -> features.Extractor:
    """The features of `config.eval` for images (H, W, C), on all devices; says what auto means."""
    weights = config.eval.inception_weights
    name, reason = features.choose(config.eval.features, image_shape, weights)
    if reason:
        say(f"features {name}: {reason} (eval.features=auto)")
    return features.extractor(name, weights=weights, mesh=devices.make_mesh())


def split_name(config: ConfigDict) -> str:
    """Returns the part of the data: `eval.split`, the source's own split, or train."""
    if config.eval.split:
        return config.eval.split
    kind, _, argument = config.data.source.partition(":")
    named = {"tfds": argument.partition(":")[2], "cifar10": argument}
    return named.get(kind, "") or "train"


def provenance(config: ConfigDict, data: Dataset, extract: features.Extractor) -> dict:
    """Returns the origin of statistics of these images in these features (`reference.facts`)."""
    return reference.facts(extract, data.images, data.info, split_name(config))
