"""The one place where a configuration becomes objects: data, network, path, loss, sampler.

Everything below takes plain arguments; `configs/default.py` explains every key.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion import denoiser, losses, models, samplers, schedules, spectra
from warm_diffusion.data import Dataset, augmentation, load_dataset
from warm_diffusion.data.images import from_uint8
from warm_diffusion.data.spectrum import coefficient_moments
from warm_diffusion.training import devices
from warm_diffusion.training import state as train_state

_MODELS = {"ddpmpp": models.ddpmpp, "ncsnpp": models.ncsnpp}
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _choose(key: str, name: str, choices: dict):
    if name not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {name!r}")
    return choices[name]


def _data_options(config: ConfigDict) -> dict:
    options = config.data.to_dict()
    options.pop("device_megabytes")
    return options


def dataset(config: ConfigDict) -> Dataset:
    """The prepared images of `config.data`."""
    return load_dataset(**_data_options(config))


@functools.lru_cache(maxsize=4)
def _moments(**options) -> tuple[np.ndarray, np.ndarray]:
    with jax.ensure_compile_time_eval():  # numbers, also where a path is built inside jit
        return coefficient_moments(load_dataset(**options).images)


def spectrum(config: ConfigDict) -> np.ndarray:
    """Variance of each DCT coefficient of the data [H, W]; computed once in a process."""
    return _moments(**_data_options(config))[1]


def _mean_squares(config: ConfigDict) -> np.ndarray | None:
    """Mean square of each DCT coefficient of the data [H, W] if `config.model` asks for it."""
    choices = {"edm": lambda: None, "spectral": lambda: _moments(**_data_options(config))}
    moments = _choose("model.preconditioning", config.model.preconditioning, choices)()
    if moments is None:
        return None
    mean, variance = moments
    return mean**2 + variance


def bnr(config: ConfigDict) -> float:
    """The number that `config.schedule.bnr` means; for "auto" rounded to three decimals.

    Raises:
      ValueError: neither a number nor "auto", or data without detail.
    """
    value = config.schedule.bnr
    if value == "auto":
        return round(spectra.recommend_bnr(spectrum(config), config.schedule.attenuation), 3)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"schedule.bnr must be a number or auto, got {value!r}")
    return float(value)


def schedule(config: ConfigDict) -> schedules.Schedule:
    """The path of `config.schedule`."""
    options = config.schedule
    levels = {name: options[name] for name in ("beta_min", "beta_max", "p_mean", "p_std")}
    choices = {
        "hot": lambda: schedules.hot(**levels),
        "constant_bnr": lambda: schedules.constant_bnr(bnr(config), **levels),
        "any_bnr": lambda: schedules.any_bnr(
            bnr(config), options.bnr_range, options.hot_share, **levels
        ),
        "spectral": lambda: schedules.spectral(spectrum(config), options.attenuation, **levels),
        "blurring_diffusion": lambda: schedules.blurring_diffusion(
            sigma_blur_max=options.sigma_blur_max
        ),
        "cold": lambda: schedules.cold(
            alpha_min=options.cold_alpha_min,
            alpha_max=options.cold_alpha_max,
            beta=options.cold_beta,
        ),
    }
    return _choose("schedule.name", options.name, choices)()


def sampling_schedule(config: ConfigDict) -> schedules.Schedule:
    """The path to sample along: the one trained on, or the ratio `config.sampling.bnr`."""
    if config.sampling.bnr < 0:
        return schedule(config)
    levels = {"beta_min": config.schedule.beta_min, "beta_max": config.schedule.beta_max}
    return schedules.constant_bnr(config.sampling.bnr, **levels)


def model(config: ConfigDict, image_shape: tuple[int, int, int]) -> models.UNet:
    """The network of `config.model` for images (H, W, C).

    Raises:
      ValueError: a name that is not known, or a size that the network cannot halve.
    """
    options = config.model
    network = _choose("model.name", options.name, _MODELS)(
        resolution=image_shape[0],
        channels=image_shape[2],
        model_channels=options.model_channels,
        channel_mult=options.channel_mult,
        num_blocks=options.num_blocks,
        attention_resolutions=options.attention_resolutions,
        dropout=options.dropout,
        num_classes=options.num_classes,
        label_dropout=options.label_dropout,
        augment_dim=augmentation.NUM_LABELS if config.augment.transforms else 0,
        remat=options.remat,
        heads=denoiser.num_heads(options.parameterization),
        dtype=_choose("model.dtype", options.dtype, _DTYPES),
    )
    jax.eval_shape(lambda: init_params(network, jax.random.key(0), image_shape))
    return network


def init_params(network: models.UNet, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
    """Fresh parameters; call it inside jit."""
    level = jnp.zeros((1,))
    return network.init(key, jnp.zeros((1, *image_shape)), level, level)["params"]


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


def make_denoiser(
    config: ConfigDict,
    network: models.UNet,
    params: dict,
    *,
    labels: jax.Array | None = None,
    augment_labels: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> denoiser.Denoiser:
    """The preconditioned network; with a dropout key it is in training mode."""
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None

    def apply(x, c_noise, c_blur):
        return network.apply(
            {"params": params}, x, c_noise, c_blur, labels, augment_labels, train=train, rngs=rngs
        )

    return denoiser.precondition(
        apply,
        sigma_data=config.loss.sigma_data,
        parameterization=config.model.parameterization,
        spectrum=_mean_squares(config),
    )


def loss(
    config: ConfigDict, network: models.UNet, path: schedules.Schedule | None = None
) -> train_state.LossFn:
    """(params, keys [B], Batch) -> LossTerms of the training objective.

    `path` stands in for the configuration's, where its ratio is an argument of a jitted function.
    """
    path, augment = path or schedule(config), config.augment
    divides = config.model.parameterization != "score"
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
        denoise = make_denoiser(
            config,
            network,
            params,
            labels=batch.labels,
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
    config: ConfigDict, network: models.UNet, image_shape: tuple[int, int, int], mesh: Mesh
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
        params = init_params(network, jax.random.key(config.seed), image_shape)
        num_ema = len(config.training.ema_halflife_images)
        return train_state.create_state(network.apply, params, optimizer, num_ema)

    sharding = devices.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(make),
    )
    return jax.jit(make, out_shardings=sharding), abstract


def sampling_denoiser(
    config: ConfigDict, network: models.UNet, params: dict, seeds: jax.Array
) -> denoiser.Denoiser:
    """The denoiser of each seed's class (its remainder, or the one asked for), guided."""
    num_classes, guidance, label = (
        config.model.num_classes, config.sampling.guidance, config.sampling.label,
    )  # fmt: skip
    if num_classes == 0:
        if guidance != 1.0 or label >= 0:
            raise ValueError("sampling.guidance and sampling.label need a network with classes")
        return make_denoiser(config, network, params)
    if label >= num_classes:
        raise ValueError(f"sampling.label must be below {num_classes}, got {label}")
    seeds = seeds.astype(jnp.uint32)
    labels = (seeds % num_classes if label < 0 else jnp.full_like(seeds, label)).astype(jnp.int32)
    conditional = make_denoiser(config, network, params, labels=labels)
    if guidance == 1.0:
        return conditional
    return denoiser.guided(conditional, make_denoiser(config, network, params), guidance)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws images by seed.

    Attributes:
      draw: (params, seeds [B], start [B, H, W, C] or None) -> float images [B, H, W, C], jitted.
      batch_size: the B that it is compiled for, over all devices.
      num_calls: calls of the network per image.
      schedule: the path followed.
      needs_start: the path does not end in noise, so `start` must be blurred images.
    """

    draw: Callable[[dict, jax.Array, jax.Array | None], jax.Array]
    batch_size: int
    num_calls: int
    schedule: schedules.Schedule
    needs_start: bool


def sampler(
    config: ConfigDict,
    network: models.UNet,
    image_shape: tuple[int, int, int],
    batch_size: int,
    mesh: Mesh,
    *,
    return_trajectory: bool = False,
) -> Sampler:
    """The sampler of `config.sampling`, its seeds divided over the devices.

    With `return_trajectory` it draws (images, states [num_steps + 1, B, H, W, C]).

    Raises:
      ValueError: a solver that is not known or does not fit the path; a batch that the devices
        cannot share.
    """
    options = config.sampling
    devices.check_batch_size("sampling.batch_size", batch_size, mesh)
    path = sampling_schedule(config)
    churn = None
    if options.s_churn > 0:
        churn = samplers.Churn(options.s_churn, options.s_min, options.s_max, options.s_noise)

    def draw(params, seeds, start):
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(seeds)
        return samplers.sample(
            sampling_denoiser(config, network, params, seeds),
            samplers.initial_noise(seeds, image_shape),
            path,
            solver=options.solver,
            num_steps=options.num_steps,
            rho=options.rho,
            churn=churn,
            key=keys,
            start=start,
            return_trajectory=return_trajectory,
        )

    # What does not fit shows here, before any training.
    seeds = jax.ShapeDtypeStruct((batch_size,), np.dtype("uint32"))
    params = jax.eval_shape(lambda: init_params(network, jax.random.key(0), image_shape))
    jax.eval_shape(draw, params, seeds, None)
    everywhere, split = devices.replicated(mesh), devices.split(mesh)
    calls = 2 * options.num_steps - 1 if options.solver == "heun" else options.num_steps
    calls *= 1 if options.guidance == 1.0 else 2
    jitted = jax.jit(draw, in_shardings=(everywhere, split, split), out_shardings=everywhere)

    def draw_split(params, seeds, start):
        """Every process passes the whole batch, computes its part and gets all images."""
        local = jax.tree.map(lambda array: devices.process_slice(np.asarray(array)), (seeds, start))
        return jitted(params, *devices.put_split(local, mesh))

    needs_start = options.bnr < 0 and config.schedule.name == "cold"
    return Sampler(draw_split, batch_size, calls, path, needs_start)
