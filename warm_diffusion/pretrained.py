"""A trained network as one object: load it, use it, save it for others.

    from warm_diffusion import pretrained
    model = pretrained.load("pretrained/digits")
    images = model.sample(range(16))                # uint8 [16, 8, 8, 1]

A model folder holds

    model.safetensors   weights by dotted names; data.mean and data.spectrum of the training data
    config.json         format, version, the description (`architecture.py`), info
    README.md           a model card, with samples.png

It is read without running anything in it: no pickles, no names of code. A training workdir, or
one of its checkpoints, is loaded the same way, without the optimizer's state.
"""

import dataclasses
import functools
import os
import pathlib
import types
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from warm_diffusion import architecture as _architecture
from warm_diffusion import card, drawing, samplers, schedules
from warm_diffusion.architecture import Architecture
from warm_diffusion.data.statistics import Statistics
from warm_diffusion.denoiser import Prediction
from warm_diffusion.models import weights
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import say

FORMAT, VERSION = "warm_diffusion model", 1
_MEAN, _SPECTRUM = "data.mean", "data.spectrum"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained network: see `load`.

    Attributes:
      architecture: network, path and statistics, `warm_diffusion.architecture`.
      params: the network's weights.
      info: where it comes from: step, images_seen, weights (which average), weights_sha256,
        data_sha256, versions, configuration, evaluation; what is not known is left out.
    """

    architecture: Architecture
    params: dict
    info: dict

    @property
    def schedule(self) -> schedules.Schedule:
        """The path that it was trained on."""
        return self.architecture.schedule

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the training images."""
        return self.architecture.image_shape

    @property
    def spectrum(self) -> np.ndarray | None:
        """Variance of each DCT coefficient of the training data [H, W]; None if not known."""
        return self.architecture.statistics and self.architecture.statistics.spectrum

    @property
    def mean(self) -> np.ndarray | None:
        """Mean training image [H, W, C]; None if not known."""
        return self.architecture.statistics and self.architecture.statistics.mean

    def __call__(self, x: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> Prediction:
        """The same as `denoise`, so that a model is a denoiser."""
        return self.denoise(x, alpha, beta)

    def denoise(
        self, x: ArrayLike, alpha: ArrayLike, beta: ArrayLike, labels: ArrayLike | None = None
    ) -> Prediction:
        """Posterior means of the blurry image and of the residual: a `denoiser.Denoiser`.

        Args:
          x: images [B, H, W, C] with blur and noise, of any H and W: above 128 (or what it was
            trained on, if larger) the network sees overlapping tiles, `sizes.py`.
          alpha: blur in pixels, scalar or [B].
          beta: noise standard deviation > 0, scalar or [B].
          labels: classes [B], for a network with classes; None: no class.

        Raises:
          ValueError: shapes that do not fit, labels for a network without classes.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"expected float images [B, H, W, C] in [-1, 1] before noise, got {x.dtype} "
                f"{x.shape}: of uint8 images take x / 127.5 - 1"
            )
        if labels is not None:
            labels = _architecture.check_labels(labels, x.shape[0], self.architecture.num_classes)
        return self.architecture.denoiser(self.params, labels)(x, alpha, beta)

    def sample(
        self,
        seeds: int | Sequence[int] | np.ndarray,
        solver: str = "heun",
        num_steps: int = 18,
        bnr: float | None = None,
        *,
        grid: str = "edm",
        rho: float = 7.0,
        churn: samplers.Churn | float | None = None,
        label: int = -1,
        guidance: float = 1.0,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Images of the seeds, uint8 [N, H, W, C]; each depends on its own seed alone.

        Args:
          seeds: integers in [0, 2^32), or one.
          solver: euler, heun or multistep.
          num_steps: steps; the network is called as often, by heun 2 n - 1 times.
          bnr: ratio of a constant-ratio path; None: the path trained on.
          grid: edm, or spectral: times from the spectrum of the training data, for few calls.
          rho: spacing of edm's.
          churn: EDM's stochasticity, for euler and heun; a number is S_churn.
          label: class of all images; negative: the seed modulo the number of classes.
          guidance: weight of the class; 1: not guided.
          batch_size: images drawn at once.

        Raises:
          ValueError: seeds, solver or path that do not work.
        """
        seeds = np.atleast_1d(np.asarray(seeds))
        if seeds.ndim != 1 or not len(seeds) or not np.issubdtype(seeds.dtype, np.integer):
            raise ValueError(f"seeds must be one or more integers, got {seeds.dtype} {seeds.shape}")
        if seeds.min() < 0 or seeds.max() >= drawing.NUM_SEEDS:
            raise ValueError(f"seeds must lie in [0, 2^32), got {seeds.min()} to {seeds.max()}")
        if churn is not None:
            churn = samplers.Churn(*churn) if isinstance(churn, tuple) else samplers.Churn(churn)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        settings = drawing.Settings(solver, num_steps, rho, churn, label, guidance, grid)
        batch = min(batch_size, len(seeds))
        sampler = _sampler(self.architecture, settings, bnr and float(bnr), batch)
        params = jax.device_put(self.params, devices.replicated(devices.make_mesh(1)))
        return np.concatenate(list(sampler.generate(params, seeds)))


@functools.lru_cache(maxsize=32)
def _sampler(built: Architecture, settings: drawing.Settings, bnr: float | None, batch: int):
    path = built.schedule
    if bnr is not None:
        trained = built.description["schedule"]
        levels = {key: trained[key] for key in ("beta_min", "beta_max") if key in trained}
        path = schedules.constant_bnr(bnr, **levels)
    if path.needs_start:
        raise ValueError(
            "this network's path ends in blurred images, not in noise: start from some with "
            "samplers.sample(model.denoise, noise, model.schedule, start=...), or give bnr="
        )
    mesh = devices.make_mesh(1)
    return drawing.sampler(built, path, settings, batch_size=batch, mesh=mesh)


# --- loading -------------------------------------------------------------------------------------


def check_new(folder: pathlib.Path) -> None:
    """Raises ValueError unless a model can be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: a model is written to a new folder")


def load(path: str | os.PathLike, ema: int = 0) -> Model:
    """The trained network in a model folder, a training workdir, or its checkpoints/STEP.

    Args:
      path: of any of them; of a workdir the newest checkpoint is taken.
      ema: which of the averaged weights that training kept; -1: the raw weights. A model folder
        holds one set, number 0.

    Raises:
      ValueError: nothing of the kind there, or something damaged or of a newer version.
    """
    path = storage.path(path)
    if is_model_folder(path):
        return _load_folder(path, ema)
    workdir, step = split_checkpoint(path)
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"there is no trained network in {path}: expected a model folder (config.json and "
            "model.safetensors), a training workdir, or its checkpoints/STEP"
        )
    return _load_checkpoint(workdir, step, ema)


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether a folder holds a saved model and is not a training workdir."""
    path = storage.path(path)
    return (path / "model.safetensors").exists() or (
        (path / "config.json").exists() and "format" in _read_config(path)
    )


def split_checkpoint(checkpoint: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
    """(training workdir, step or None for the latest) of WORKDIR or WORKDIR/checkpoints/STEP."""
    path = storage.path(checkpoint)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _read_config(folder: pathlib.Path) -> dict:
    try:
        config = storage.read_json(folder / "config.json")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no config.json: its model cannot be read") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds {type(config).__name__}, not an object")
    return config


def _load_folder(folder: pathlib.Path, ema: int) -> Model:
    config = _read_config(folder)
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder / 'config.json'} does not say format {FORMAT!r}")
    version = config.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{folder} is of version {version!r}, this release reads up to {VERSION}: update "
            "warm_diffusion"
        )
    info = config.get("info", {})
    if not isinstance(info, dict):
        raise ValueError(f"{folder / 'config.json'}: info must be an object, got {info!r}")
    if ema != 0:
        raise ValueError(
            f"{folder} holds one set of weights ({info.get('weights')}): ema must be 0"
        )
    try:
        return _with_weights(folder, config, info)
    except Exception as error:  # a crafted description may hold any type anywhere
        told = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(told if str(folder) in told else f"{folder}: {told}") from error


def _with_weights(folder: pathlib.Path, config: dict, info: dict) -> Model:
    height, width, channels = config["image_shape"]
    extra = {_MEAN: (height, width, channels), _SPECTRUM: (height, width)}
    network = _architecture.network_of(config)
    known = config.get("statistics", True)
    arrays = weights.load(folder / "model.safetensors", network, extra if known else {})
    statistics = Statistics(arrays.pop(_MEAN), arrays.pop(_SPECTRUM)) if known else None
    if known and np.any(statistics.spectrum < 0):
        raise ValueError(f"{folder / 'model.safetensors'}: {_SPECTRUM} has negative variances")
    params = weights.unflatten(arrays)
    checksums = {"weights_sha256": storage.digest(params)}
    if known:
        checksums["statistics_sha256"] = storage.digest(statistics._asdict())
    if any(found != info.get(name, found) for name, found in checksums.items()):
        raise ValueError(f"{folder / 'model.safetensors'} is damaged: its checksum does not fit")
    built = _architecture.build(config, statistics)
    info = {"weights": "as they are", **info, **checksums}
    return Model(built, jax.tree.map(jnp.asarray, params), info)


def _load_checkpoint(workdir: pathlib.Path, step: int | None, ema: int) -> Model:
    try:
        from warm_diffusion.training.checkpoints import Checkpoints
    except ImportError as error:
        raise ValueError(
            f"{workdir} is a training workdir, which orbax reads: pip install '.[app]' in a "
            f"checkout of warm_diffusion ({error})"
        ) from error
    with Checkpoints(workdir, read_only=True) as saved:
        steps = saved.steps()
        if not steps:
            raise ValueError(f"there is no finished checkpoint in {workdir / 'checkpoints'}")
        if step is None:
            return _load_newest(workdir, steps, ema)
        about = saved.about(step)
        if about["format"] == 1:
            return _load_format_1(workdir, saved, about, ema)
        names = about["weights"]
        if not -1 <= ema < len(names):
            raise ValueError(f"ema must be -1 (raw weights) or 0 to {len(names) - 1}, got {ema}")
        statistics = Statistics(**saved.statistics(step))
        built = _architecture.build(about["model"], statistics)
        params = saved.weights(step, built.abstract_params, ema)
    return _of_checkpoint(workdir, about, built, params, "raw" if ema < 0 else names[ema])


def _load_newest(workdir: pathlib.Path, steps: list[int], ema: int) -> Model:
    """Of the newest sound checkpoint."""
    from warm_diffusion.training.checkpoints import Damaged

    for step in reversed(steps):
        try:
            return _load_checkpoint(workdir, step, ema)
        except Damaged as error:
            if step == steps[0]:
                raise
            say(f"note     {error}: the one before is used")
    raise ValueError(f"there is no checkpoint in {workdir}")


def _of_checkpoint(workdir, about: dict, built: Architecture, params: dict, name: str) -> Model:
    keys = ("step", "images_seen", "data_sha256", "versions", "sha256", "configuration")
    info = {key: about[key] for key in keys if key in about}
    info |= {"weights": name, "weights_sha256": storage.digest(params)}
    evaluation = card.evaluations(workdir, info["weights_sha256"])
    info |= {"evaluation": evaluation} if evaluation else {}
    return Model(built, jax.tree.map(jnp.asarray, params), info)


def _load_format_1(workdir: pathlib.Path, saved, about: dict, ema: int) -> Model:
    """A checkpoint from before checkpoints said what they are of: its run's config.json does."""
    from ml_collections import ConfigDict

    from warm_diffusion.app import build

    configuration = _read_config(workdir)
    config, shape = ConfigDict(configuration), tuple(about["image_shape"])
    halflives = config.training.ema_halflife_images
    if not -1 <= ema < len(halflives):
        raise ValueError(f"ema must be -1 (raw weights) or 0 to {len(halflives) - 1}, got {ema}")
    try:
        description = build.describe(config, shape)
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"{workdir / 'config.json'} lacks a key of the network: {error}"
        ) from error
    # Its data are not read: a file does not say where on this machine to read and write. Continued
    # by one step of training, the run keeps what they were.
    built = _architecture.build(description)
    _, abstract = build.initial_state(config, built, devices.make_mesh(1))
    state = saved.restore(about["step"], abstract)
    about = about | {
        "configuration": configuration,
        "images_seen": about["step"] * about["batch_size"],
    }
    params = state.params if ema < 0 else state.ema[ema]
    name = "raw" if ema < 0 else f"ema {halflives[ema]} images"
    return _of_checkpoint(workdir, about, built, jax.tree.map(np.asarray, params), name)


# --- saving --------------------------------------------------------------------------------------


def save(
    model: Model,
    folder: str | os.PathLike,
    *,
    samples: np.ndarray | None = None,
    caption: str = "heun, 35 network calls",
    files: Mapping[str, bytes] = types.MappingProxyType({}),
) -> None:
    """Writes a model folder that `load` reads and a model hub shows; whole or not at all.

    Args:
      model: what `load` gave.
      folder: a new or an empty one.
      samples: uint8 [N, H, W, C] for the picture in the model card, N may be 0; None draws the
        images of seeds 0 to 63.
      caption: how they were drawn.
      files: more files, by name.

    Raises:
      ValueError: the folder holds something.
    """
    folder = storage.path(folder)
    check_new(folder)
    draws = not model.schedule.needs_start
    if samples is None:
        samples = model.sample(range(64)) if draws else np.zeros(0)
    params = jax.tree.map(np.asarray, model.params)
    arrays, statistics = weights.flatten(params), model.architecture.statistics
    if statistics is not None:
        arrays |= {_MEAN: statistics.mean, _SPECTRUM: statistics.spectrum}
    info = {**model.info, "weights_sha256": storage.digest(params)}
    if statistics is not None:
        info["statistics_sha256"] = storage.digest(statistics._asdict())
    config = {
        "format": FORMAT,
        "version": VERSION,
        **model.architecture.description,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "statistics": statistics is not None,
        "info": info,
    }
    content = {
        **(card.files(folder.name, config, samples, caption, draws=draws) | dict(files)),
        "model.safetensors": weights.to_bytes(arrays),
        "config.json": storage.to_json(config),  # last: without it no folder passes for a model
    }
    storage.write_folder(folder, content)
