"""A trained network as one object: load it, use it, save it for others.

    from warm_diffusion import pretrained
    model = pretrained.load("pretrained/digits")
    images = model.sample(range(16))                # uint8 [16, 8, 8, 1]

A description has, in plain values, all that makes a network besides its weights. Its sections are
those of a configuration (`configs/default.py`), the arguments of what they are named after:

    image_shape   [H, W, C]
    model         name (ddpmpp, ncsnpp), and arguments of that function in `models`
    denoiser      arguments of `denoiser.precondition`
    augment       transforms: whether the network sees how an image was augmented
    schedule      name, and a section of that name: arguments of that function in `schedules`

A model folder has config.json (format, version, description, info), model.safetensors (weights by
dotted names; data.mean and data.spectrum of the training data), and a model card, README.md with
samples.png. Loading it runs nothing that is in it.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import pathlib
import re
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import denoiser as _denoiser
from warm_diffusion import models, samplers, schedules
from warm_diffusion.data import augmentation, images
from warm_diffusion.data.statistics import Statistics
from warm_diffusion.denoiser import Denoiser, Prediction
from warm_diffusion.models import weights
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say, shorten

FORMAT, VERSION = "warm_diffusion model", 2
NUM_SEEDS = 2**32
GRIDS = ("edm", "spectral")
SECTIONS = ("model", "denoiser", "augment", "schedule")
_MEAN, _SPECTRUM = "data.mean", "data.spectrum"
_CHECKSUMS = ("weights_sha256", "statistics_sha256")
# Largest height and width that a network is called with, unless it was trained on larger images;
# larger images are cut into overlapping tiles, so that the memory does not grow with them.
_TILE, _OVERLAP = 128, 32


# --- what a network is, besides its weights ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for drawing images.

    The grid is edm (`schedules.time_grid`, from noise) or spectral (`schedules.spectral_grid`, from
    Gaussian data with the mean and spectrum of the training data).
    """

    solver: str = "heun"  # or euler, multistep
    num_steps: int = 18
    rho: float = 7.0  # spacing of the grid `edm`
    churn: samplers.Churn | float | None = None  # EDM's stochasticity, or S_churn alone
    label: int = -1  # class to draw; -1: the seed modulo the number of classes
    guidance: float = 1.0  # weight of the class (`denoiser.guided`); 1: not guided
    time_grid: str = "edm"

    def __post_init__(self) -> None:
        if self.time_grid not in GRIDS:
            names = ", ".join(GRIDS)
            raise ValueError(f"sampling.time_grid must be one of {names}, got {self.time_grid!r}")
        if not isinstance(self.label, int | np.integer) or self.label < -1:
            raise ValueError(f"sampling.label must be a class, or -1 for all, got {self.label!r}")

    @property
    def num_calls(self) -> int:
        """Calls of the network per image: heun calls it twice per step but in the last one."""
        calls = 2 * self.num_steps - 1 if self.solver == "heun" else self.num_steps
        return calls if self.guidance == 1.0 else 2 * calls


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """All of a trained network but its weights, which its methods take; see `build`."""

    description: dict  # the plain values that it was made from
    network: models.UNet
    schedule: schedules.Schedule  # the path trained on
    statistics: Statistics | None  # mean image and spectrum of the training data, where known

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the training images."""
        return tuple(self.description["image_shape"])

    def init_params(self, key: jax.Array) -> dict:
        """Fresh parameters."""
        return models.init_params(self.network, key)

    @property
    def abstract_params(self) -> dict:
        """Shapes and types of the parameters."""
        return models.init_params.eval_shape(self.network, jax.random.key(0))

    def denoiser(
        self,
        params: dict,
        labels: jax.Array | None = None,
        *,
        augment_labels: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Denoiser:
        """The preconditioned network with its weights, for images of any height and width.

        With a dropout key it works as in training.
        """
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None

        def network(x, c_noise, c_blur):
            inputs = x, c_noise, c_blur, labels, augment_labels
            return _apply(self.network, params, inputs, rngs, train)

        multiple, largest = self.network.factor, max(_TILE, *self.image_shape[:2])
        tile, overlap = (-(-size // multiple) * multiple for size in (largest, _OVERLAP))
        network = models.at_any_size(network, multiple=multiple, tile=tile, overlap=overlap)
        return _denoiser.precondition(network, **self.description["denoiser"])

    def seed_denoiser(
        self, params: dict, seeds: jax.Array, *, label: int = -1, guidance: float = 1.0
    ) -> Denoiser:
        """The denoiser of each seed's class: its remainder, or `label` if that is not negative."""
        classes = self.network.num_classes
        if classes == 0:
            if guidance != 1.0 or label >= 0:
                raise ValueError("sampling.guidance and sampling.label need a network with classes")
            return self.denoiser(params)
        if label >= classes:
            raise ValueError(f"sampling.label must be below {classes}, got {label}")
        seeds = seeds.astype(jnp.uint32)
        labels = seeds % classes if label < 0 else jnp.full_like(seeds, label)
        conditional = self.denoiser(params, labels.astype(jnp.int32))
        if guidance == 1.0:
            return conditional
        return _denoiser.guided(conditional, self.denoiser(params), guidance)

    def times(self, schedule: schedules.Schedule, sampling: Sampling) -> jax.Array:
        """The grid of the settings [num_steps + 1]."""
        if sampling.time_grid == "edm":
            return schedules.time_grid(schedule, sampling.num_steps, sampling.rho)
        if self.statistics is None:
            raise ValueError(
                "this network does not carry the spectrum of its training data: take "
                "sampling.time_grid=edm"
            )
        settings = self.statistics.spectrum, sampling.num_steps, sampling.solver
        start = schedule.t_max if schedule.needs_start else None
        return schedules.spectral_grid(schedule, *settings, start=start)

    def draw(
        self,
        params: dict,
        seeds: jax.Array,
        schedule: schedules.Schedule,
        sampling: Sampling,
        start: jax.Array | None = None,
        *,
        return_trajectory: bool = False,
    ):
        """Float images [B, H, W, C] of seeds [B], a pure function; each depends on its seed alone.

        `start` has blurred images [B, H, W, C] at `schedule.t_max` where the path needs some. With
        `return_trajectory` the result is (images, states [num_steps + 1, B, H, W, C]).
        """
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(seeds)
        noise = samplers.initial_noise(seeds, self.image_shape)
        times = self.times(schedule, sampling)
        if start is None and sampling.time_grid == "edm":
            start = schedule.beta(times[0]) * noise
        elif start is None:
            start = samplers.gaussian_start(noise, schedule, times[0], *self.statistics)
        return samplers.solve(
            self.seed_denoiser(params, seeds, label=sampling.label, guidance=sampling.guidance),
            start, schedule, times, solver=sampling.solver, churn=sampling.churn, key=keys,
            return_trajectory=return_trajectory,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(network: models.UNet, params: dict, inputs: tuple, rngs: dict | None, train: bool):
    # Jitted by itself so that its many calls (a step of Heun makes two) are traced once.
    return network.apply({"params": params}, *inputs, train=train, rngs=rngs)


def build(
    description: Mapping, statistics: Statistics | None = None, *, remat: bool = False
) -> Architecture:
    """The objects of a description, which is checked in full.

    A schedule that is made from the spectrum needs the statistics of the training data. `remat`
    recomputes blocks for their gradient: less memory, more work.

    Raises:
      ValueError: a key, name, number or size that is missing, not known or does not work.
    """
    shape = description.get("image_shape")
    if not isinstance(shape, list | tuple) or [type(n) for n in shape] != [int] * 3:
        raise ValueError(f"image_shape must be three integers [H, W, C], got {shape!r}")
    lacking = [key for key in SECTIONS if not isinstance(description.get(key), Mapping)]
    if lacking:
        raise ValueError(f"the description of the network lacks {', '.join(lacking)}")
    description = {key: description[key] for key in ("image_shape", *SECTIONS)}
    description = json.loads(json.dumps(description))  # lists for tuples, as it is read again
    wrap = description["denoiser"]
    try:
        _denoiser.precondition(None, **wrap)
    except TypeError as error:  # Python's, for an argument that is not known
        raise ValueError(f"denoiser: {error}") from error
    sigma = wrap.get("sigma_data", 0.5)
    if type(sigma) not in (int, float) or not 0 < sigma < math.inf:
        raise ValueError(f"denoiser.sigma_data must be a number > 0, got {sigma!r}")
    network = models.by_name(
        **{"remat": remat} | description["model"],
        resolution=shape[0],
        channels=shape[2],
        augment_dim=augmentation.NUM_LABELS if description["augment"].get("transforms") else 0,
        heads=_denoiser.PARAMETERIZATIONS[wrap.get("parameterization", "divide")],
    )
    network.check_size(*shape[:2])
    models.init_params.eval_shape(network, jax.random.key(0))  # traced once for all uses
    schedule = schedule_of(description["schedule"], statistics)
    return Architecture(description, network, schedule, statistics)


def schedule_of(section: Mapping, statistics: Statistics | None = None) -> schedules.Schedule:
    """The path of a section `schedule`: its name, and arguments in a section of that name."""
    name = section.get("name")
    if name not in schedules.PATHS:
        names = ", ".join(schedules.PATHS)
        raise ValueError(f"schedule.name must be one of {names}, got {name!r}")
    spectrum = {}
    if takes_spectrum(name):
        if statistics is None:
            raise ValueError(f"schedule {name} needs the spectrum of the training data")
        spectrum = {"spectrum": statistics.spectrum}
    try:
        return schedules.PATHS[name](**spectrum, **section.get(name, {}))
    except TypeError as error:  # Python's, for an argument too many or too few
        raise ValueError(f"schedule.{name}: {error}") from error


def at_ratio(section: Mapping, bnr: ArrayLike) -> schedules.Schedule:
    """The path of a constant ratio, between a path's levels of noise if they are its arguments."""
    numbers = section.get(section["name"], {})
    levels = {key: numbers[key] for key in ("beta_min", "beta_max") if key in numbers}
    return schedules.constant_bnr(bnr, **levels)


def takes_spectrum(name: str) -> bool:
    """Returns whether the path of a name is made from the spectrum of the data."""
    return "spectrum" in inspect.signature(schedules.PATHS[name]).parameters


# --- a trained network ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Model(Architecture):
    """A trained network: see `load`.

    `info` says where it comes from: step, images_seen, weights (which average), weights_sha256,
    data_sha256, versions, configuration, evaluation; what is not known is left out.
    """

    params: dict
    info: dict

    @property
    def spectrum(self) -> np.ndarray | None:
        """Variance of each DCT coefficient of the training data [H, W]; None if not known."""
        return self.statistics and self.statistics.spectrum

    @property
    def mean(self) -> np.ndarray | None:
        """Mean training image [H, W, C]; None if not known."""
        return self.statistics and self.statistics.mean

    def __call__(self, x: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        """The same as `denoise`, so that a model is a denoiser."""
        return self.denoise(x, alpha, beta)

    def denoise(
        self, x: ArrayLike, alpha: ArrayLike, beta: ArrayLike, labels: ArrayLike | None = None
    ) -> Prediction:
        """Posterior means of the blurry image and of the residual: a `denoiser.Denoiser`.

        Args:
          x: images [B, H, W, C] with blur and noise, of any H and W: above 128 (or what it was
            trained on, if larger) the network sees overlapping tiles (`models/any_size.py`).
          alpha: blur in pixels, scalar or [B].
          beta: noise standard deviation > 0, scalar or [B].
          labels: classes [B], for a network with classes; None or -1: no class.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"expected float images [B, H, W, C] in [-1, 1] before noise, got {x.dtype} "
                f"{x.shape}: scale uint8 images by x / 127.5 - 1"
            )
        if labels is not None:
            labels, classes = jnp.asarray(labels), self.network.num_classes
            if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != x.shape[:1]:
                raise ValueError(
                    f"labels must be {len(x)} integers, got {labels.dtype} {labels.shape}"
                )
            inside = isinstance(labels, jax.core.Tracer) or (labels >= -1) & (labels < classes)
            if not np.all(inside):
                raise ValueError(f"labels must be from -1 (none) to below {classes}, got {labels}")
        return self.denoiser(self.params, labels)(x, alpha, beta)

    def sample(
        self,
        seeds: int | Sequence[int] | np.ndarray,
        solver: str = "heun",
        num_steps: int = 18,
        bnr: float | None = None,
        *,
        batch_size: int = 64,
        **options: Any,
    ) -> np.ndarray:
        """Images of the seeds, uint8 [N, H, W, C]; each depends on its own seed alone.

        Args:
          seeds: integers in [0, 2^32), or one.
          solver: euler, heun or multistep.
          num_steps: steps; the network is called as often, by heun 2 n - 1 times.
          bnr: ratio of a constant-ratio path; None: the path trained on.
          batch_size: images drawn at once.
          **options: time_grid, rho, churn, label, guidance, as in `Sampling`.

        Raises:
          ValueError: seeds, solver or path that do not work.
        """
        seeds = np.asarray(samplers._seeds(np.atleast_1d(seeds)))
        if not len(seeds):
            raise ValueError("seeds must be one or more integers, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        sampling = Sampling(solver, num_steps, **options)
        path = self.schedule if bnr is None else at_ratio(self.description["schedule"], bnr)
        if path.needs_start:
            raise ValueError(
                "this network's path ends in blurred images, not in noise: give bnr=, or start "
                "from some with samplers.solve(model.denoise, blurred, model.schedule, times)"
            )
        size = min(batch_size, len(seeds))
        draw, drawn = _compiled(self, path, sampling), []
        for first in range(0, len(seeds), size):
            part = np.resize(seeds[first : first + size], size)  # filled up: one program for all
            drawn.append(images.to_uint8(draw(self.params, part)))
        return np.concatenate(drawn)[: len(seeds)]


@functools.lru_cache(maxsize=8)  # not of all models ever loaded: it keeps their weights
def _compiled(model: Model, path: schedules.Schedule, sampling: Sampling) -> Callable:
    return jax.jit(lambda params, seeds: model.draw(params, seeds, path, sampling))


# --- loading -------------------------------------------------------------------------------------


def load(path: str | os.PathLike, ema: int = 0) -> Model:
    """The trained network in a model folder, a training workdir, or a file of EDM's.

    Args:
      path: a model folder; a workdir (the newest checkpoint) or its checkpoints/STEP; a .pkl of
        EDM's, whose second head and blur embedding start at zero: on the path without blur the
        model is EDM's.
      ema: which of the averaged weights that training kept; -1: the raw weights. All but a workdir
        hold one set, number 0.

    Raises:
      ValueError: nothing of the kind there, or something damaged or of another version.
    """
    path = storage.path(path)
    workdir, step = split_checkpoint(path)
    if not is_model(path):
        if not (workdir / "checkpoints").is_dir():
            raise ValueError(
                f"there is no trained network in {path}: expected a model folder (config.json and "
                "model.safetensors), a training workdir, its checkpoints/STEP, or EDM's .pkl"
            )
        return _load_checkpoint(workdir, step, ema)
    if ema != 0:
        raise ValueError(f"{path} holds one set of weights: ema must be 0, got {ema}")
    try:
        return _load_folder(path) if path.is_dir() else _load_edm(path)
    except Exception as error:  # a crafted file may hold any type anywhere
        message = str(error) if isinstance(error, ValueError | OSError) else repr(error)
        known = message if str(path) in message else f"{path}: {message}"
        raise ValueError(shorten(known)) from error


def is_model(path: str | os.PathLike) -> bool:
    """Returns whether a path is a model folder or a file, and not a training workdir."""
    path = storage.path(path)
    return path.is_file() or (path / "model.safetensors").exists()


def split_checkpoint(checkpoint: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
    """(training workdir, step or None for the latest) of WORKDIR or WORKDIR/checkpoints/STEP."""
    path = storage.path(checkpoint)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _load_folder(folder: pathlib.Path) -> Model:
    config = storage.read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("info"), dict):
        raise ValueError("config.json must be an object that has info, an object")
    found = config.get("format"), config.get("version")
    if found != (FORMAT, VERSION):
        raise ValueError(f"expected {FORMAT} of version {VERSION} in config.json, got {found}")
    _check_info(config["info"])
    arrays = weights.load(folder / "model.safetensors")
    found = [arrays.pop(name, None) for name in (_MEAN, _SPECTRUM)]
    statistics = None if all(array is None for array in found) else Statistics(*found)
    built = build(config, statistics)
    if statistics is not None:
        shapes = tuple(map(np.shape, statistics))
        if shapes != (built.image_shape, built.image_shape[:2]) or np.any(statistics[1] < 0):
            raise ValueError(f"{_MEAN} or {_SPECTRUM} do not fit, they have shapes {shapes}")
    params = weights.unflatten(arrays, built.abstract_params)
    recorded = {key: sha for key, sha in config["info"].items() if key in _CHECKSUMS}
    if _checksums(params, statistics) != recorded:
        raise ValueError("model.safetensors is damaged: its checksum does not fit")
    return _model(built, params, config["info"])


_KINDS = {
    int: "a whole number of at least 0", str: "one line of text", dict: "an object", list: "a list"
}  # fmt: skip
_INFO = {
    "step": int, "images_seen": int, "weights": str, "origin": str, "data_sha256": str,
    "versions": dict, "configuration": dict, "evaluation": list,
}  # fmt: skip
_REPORTED = ("metric", "solver", "network_calls", "bnr", "seeds")


def _check_info(info: dict) -> None:
    """Raises ValueError unless a folder's record of its origin is complete."""
    for key, kind in _INFO.items():
        value = info.get(key, kind())
        fits = type(value) is kind and (kind is not int or 0 <= value < 2**53)
        if not fits or (kind is str and not (len(value) <= 300 and value.isprintable())):
            got = reprlib.repr(value)
            raise ValueError(f"info.{key} in config.json must be {_KINDS[kind]}, got {got}")
    data = info.get("configuration", {}).get("data")
    source = data.get("source") if isinstance(data, dict) else None
    complete = isinstance(source, str) and {"step", "images_seen"} <= info.keys()
    if "configuration" in info and not complete:
        raise ValueError("info.configuration in config.json goes with data, step and images_seen")
    for report in info.get("evaluation", ()):
        named = isinstance(report, dict) and report.keys() >= set(_REPORTED)
        if not named or type(report.get(str(report["metric"]))) not in (int, float):
            raise ValueError(
                f"info.evaluation must have the metric's value, {', '.join(_REPORTED)}"
            )


def _model(built: Architecture, params: dict, info: dict) -> Model:
    return Model(**vars(built), params=jax.device_put(params), info=info)


def _checksums(params: dict, statistics: Statistics | None) -> dict[str, str]:
    """Returns the checksums that info has of the arrays."""
    found = {"weights_sha256": storage.digest(params)}
    if statistics is not None:
        found["statistics_sha256"] = storage.digest(statistics._asdict())
    return found


def _load_edm(path: pathlib.Path) -> Model:
    arrays, sigma_data = models.edm.read(path)
    network = models.edm.hyperparameters(arrays)
    size, channels = network.pop("resolution"), network.pop("channels")
    augmented = network.pop("augment_dim")
    if augmented not in (0, augmentation.NUM_LABELS):
        raise ValueError(f"it takes {augmented} augmentation parameters, expected 0 or 9")
    built = build({
        "image_shape": [size, size, channels],
        "model": {**network, "dropout": 0.0},
        "denoiser": {"parameterization": "divide", "sigma_data": sigma_data},
        "augment": {"transforms": list(augmentation.TRANSFORMS) if augmented else []},
        "schedule": {"name": "hot", "hot": {"beta_min": 0.002, "beta_max": 80.0}},
    })  # fmt: skip
    params = models.from_edm(built.network, arrays, jax.random.key(0))["params"]
    origin = f"EDM's weights, from `{path.name}`."
    info = {"weights": "EDM's", "origin": origin, **_checksums(params, None)}
    return _model(built, params, info)


def _load_checkpoint(workdir: pathlib.Path, step: int | None, ema: int) -> Model:
    try:
        from warm_diffusion.training.checkpoints import Checkpoints, Damaged, finished_steps
    except ImportError as error:
        raise ValueError(
            f"{workdir} is a training workdir, which orbax reads: pip install '.[app]' in a "
            f"checkout of warm_diffusion ({error})"
        ) from error
    while True:
        with Checkpoints(workdir, read_only=True) as saved:
            steps = saved.steps()
            if not steps:
                raise ValueError(f"there is no finished checkpoint in {workdir / 'checkpoints'}")
            for candidate in reversed(steps) if step is None else [step]:
                try:
                    return _read_checkpoint(workdir, saved, candidate, ema)
                except ValueError as error:
                    if step is None and finished_steps(workdir)[-1:] > steps[-1:]:
                        break  # training has saved another, and may have removed this one
                    last = step is not None or candidate == steps[0]
                    if last or not isinstance(error, Damaged):
                        raise
                    say(f"note     {error}: the one before is used")


def _read_checkpoint(workdir: pathlib.Path, saved, step: int, ema: int) -> Model:
    about = saved.about(step)
    names = about["weights"]
    if not -1 <= ema < len(names):
        raise ValueError(f"ema must be -1 (raw weights) or 0 to {len(names) - 1}, got {ema}")
    built = build(about["model"], Statistics(**saved.statistics(step)))
    params = saved.weights(step, built.abstract_params, ema)
    keys = ("step", "images_seen", "data_sha256", "versions", "configuration")
    info = {key: about[key] for key in keys if key in about}
    info |= {"weights": "raw" if ema < 0 else names[ema], **_checksums(params, built.statistics)}
    return _model(built, params, info)


# --- saving --------------------------------------------------------------------------------------


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError unless a model can be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: a model is written to a new folder")


def save(
    model: Model,
    folder: str | os.PathLike,
    *,
    samples: np.ndarray | None = None,
    caption: str = "heun, 35 network calls",
    files: Mapping[str, bytes] = types.MappingProxyType({}),
    dtype: str = "float32",
) -> None:
    """Writes a model folder that `load` reads and a model hub shows; whole or not at all.

    Args:
      model: what `load` gave.
      folder: a new or an empty one.
      samples: uint8 [N, H, W, C] for the picture in the model card, N may be 0; None draws the
        images of seeds 0 to 63.
      caption: how they were drawn.
      files: more files, by name.
      dtype: float32, or bfloat16, which rounds the weights and halves the file.

    Raises:
      ValueError: the folder holds something, or another dtype.
    """
    folder = storage.path(folder)
    check_new(folder)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    if samples is None:
        samples = np.zeros(0) if model.schedule.needs_start else model.sample(range(64))
    stored, statistics = (
        jax.tree.map(lambda a: np.asarray(a, dtype), model.params),
        model.statistics,
    )
    params = jax.tree.map(lambda a: a.astype(np.float32), stored)  # what `load` returns
    arrays = weights.flatten(stored)
    if statistics is not None:
        arrays |= {_MEAN: statistics.mean, _SPECTRUM: statistics.spectrum}
    info = {"weights": "as they are", **model.info, **_checksums(params, statistics)}
    config = {"format": FORMAT, "version": VERSION, **model.description, "info": info}
    content, picture = {**files}, ""
    if len(samples):
        content["samples.png"] = images.png(images.grid(samples, min_side=48))
        picture = f"\n![Samples](samples.png)\n\n*Seeds 0 to {len(samples) - 1}: {caption}.*\n"
    content["README.md"] = _card(folder, model, info, picture).encode()
    content["model.safetensors"] = weights.to_bytes(arrays)
    content["config.json"] = storage.to_json(config)  # last: without it no folder is a model
    storage.write_folder(folder, content)


def _harmless(text: Any, also: str = "") -> str:
    """Letters, digits and what paths and sources are written with; _ for the rest."""
    return re.sub(rf"[^\w .,:;/=+@~()#?{re.escape(also)}-]", "_", str(text))[:300]


def _card(folder: pathlib.Path, model: Model, info: dict, picture: str) -> str:
    """The README.md of a model folder: what it is, its use, training, evaluation and limits.

    Names, which a stranger may have given, lose what Markdown, HTML or a shell might act on.
    """
    here = pathlib.Path.cwd()  # where commands of the card run
    name = _harmless(folder.relative_to(here) if folder.is_relative_to(here) else folder.name)
    call, mode, task = "images = model.sample(range(16))  # uint8", "sample", "generation"
    if model.schedule.needs_start:
        call = (
            f"images = np.zeros({[16, *model.image_shape]})  # yours, in [-1, 1]\n"
            "clean = model.denoise(images, alpha=1.0, beta=0.1).clean  "
            "# their blur in pixels, noise in [-1, 1]"
        )
        if model.description["schedule"]["name"] == "any_bnr":  # others know one ratio alone
            mode, task = "restore --input=PHOTOS", "restoration"
    training = _harmless(info.get("origin", "Not known."), "`'")
    if "configuration" in info:
        source = _harmless(info["configuration"]["data"]["source"])
        training = (
            f"On `{source}`, {info['images_seen']:,} images in {info['step']:,} steps; weights: "
            f"{_harmless(info['weights'])}, SHA-256 "
            f"`{info['weights_sha256'][:16]}`. Every setting is in "
            "`config.json`. Where these data are, this trains it again:\n\n```sh\n"
            f"python main.py --config={name}/config.json --workdir=RUN "
            f"--config.training.num_steps={info['step']}\n```"
        )
    evaluation = "\n".join(
        "- `{}`: {:.4g} ({}, {} network calls, BNR {}, seeds {})".format(
            _harmless(report["metric"]),
            report[report["metric"]],
            *(_harmless(report[key], "[]") for key in _REPORTED[1:]),
        )
        for report in info.get("evaluation", ())
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return f"""---
library_name: warm_diffusion
tags: [image-{task}, diffusion, jax, warm-diffusion]
---

# {_harmless(folder.name)}

A blur-noise diffusion model ([Warm Diffusion](https://arxiv.org/abs/2511.16904)) of
{"x".join(map(str, model.image_shape))} images: {model.description["model"]["name"]}, \
{parameters:,} parameters, path `{model.description["schedule"]["name"]}`.
{picture}
## Use

```python
import numpy as np
from warm_diffusion import pretrained
model = pretrained.load("{name}")  # this folder
{call}
```

or `python main.py --checkpoint={name} --workdir=OUT --mode={mode}`.

## Training

{training}

## Evaluation

{evaluation or "None is recorded."}

## Limits

What it draws or adds looks like its training images, with their biases. It undoes Gaussian blur and
white Gaussian noise, not motion blur, defocus or the blocks of JPEG.
"""
