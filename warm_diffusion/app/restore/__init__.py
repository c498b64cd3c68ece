"""Restores photographs that are blurred and noisy, at known levels or at levels read off each one.

It writes a folder of images and a page, index.html, that needs no other file: a template shows what
it is given as text unless a filter says otherwise, so names of files are escaped.
"""

import base64
import functools
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import pretrained, restoration
from warm_diffusion.app import plots
from warm_diffusion.app.restore import photographs
from warm_diffusion.data.images import png, save_png, to_uint8
from warm_diffusion.evaluation import pairs
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import progress, say, say_weights

_GREY = 127.5  # grey levels of 0..255 per unit of [-1, 1]
_LEAST_NOISE = 1 / 127.5 / 12**0.5  # of rounding to 8 bits
_LARGEST = 1024  # pixels a side, above which levels are read off tiles
_TILE = 512


class Request(NamedTuple):
    """The request on the command line: --input, --blur, --noise, --samples, --reference."""

    input: str
    blur: float | None = None  # pixels
    noise: float | None = None  # grey levels of 0..255
    samples: int = 0
    reference: str | None = None


def restore(config: ConfigDict, workdir: str, checkpoint: str, request: Request) -> pathlib.Path:
    """Restores photographs into a new folder `workdir` and returns it.

    Writes mean/NAME.png (the posterior mean), samples/NAME_0.png..., comparison/NAME.png,
    restoration.json and index.html.

    Raises:
      ValueError: no usable checkpoint, images or references that cannot be used, levels out of
        range, or a folder that is not empty; all of it is checked before anything is written.
    """
    folder = storage.local(workdir, "--workdir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: restored images go to a new folder")
    _check(request)
    model = pretrained.load(checkpoint, config.sampling.ema)
    if model.spectrum is None and None in (request.blur, request.noise):
        raise ValueError(
            f"{checkpoint} does not carry the spectrum of its data, from which levels are read: "
            "give --blur and --noise"
        )
    channels = model.image_shape[2]
    inputs = photographs.find(request.input, "--input")
    images = {name: photographs.read(path, channels) for name, path in inputs.items()}
    references = _references(request.reference, images, channels)
    say_weights(model.info, checkpoint)
    ranges = _trained_ranges(model)
    images_report, figures = {}, []
    with progress(len(images), "restoring", " images") as bar:
        for name, image in images.items():
            found = _levels(model, image, request)
            _say_levels(name, found, ranges)
            versions = _versions(model, image, found, config.sampling.num_steps, request.samples)
            scores = _scores(name, versions, references.get(name))
            _write(folder, name, versions, found, scores)
            images_report[name] = {"file": str(inputs[name]), **found, "scores": scores}
            pixels = {one: png(to_uint8(version)) for one, version in versions.items()}
            ordered = ["input", "mean", *(key for key in pixels if key not in ("input", "mean"))]
            figures.append((name, _caption(found), {key: pixels[key] for key in ordered}))
            bar.update()
    about = {
        "checkpoint": str(checkpoint),
        "weights_sha256": model.info["weights_sha256"],
        "num_steps_of_samples": config.sampling.num_steps,
        "request": request._asdict(),
        "images": images_report,
    }
    storage.write_json(folder / "restoration.json", about)
    storage.write_bytes(folder / "index.html", page(figures))
    say(f"restored {len(images)} images in {folder}; look at {folder / 'index.html'}")
    return folder


def page(figures: list[tuple[str, str, dict[str, bytes]]]) -> bytes:
    """The page of (name, caption, PNG file by version) of each image."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("warm_diffusion.app"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["image"] = lambda png: (
        f"data:image/png;base64,{base64.b64encode(png).decode()}"
    )
    return templates.get_template("restore.html").render(figures=figures).encode()


def _check(request: Request) -> None:
    if not request.input:
        raise ValueError("--mode=restore needs --input=FILE_OR_FOLDER")
    for flag, value in (("--blur", request.blur), ("--noise", request.noise)):
        if value is not None and not 0 <= value < 256:
            raise ValueError(f"{flag} must lie in [0, 256), got {value}")
    if request.samples < 0:
        raise ValueError(f"--samples must be at least 0, got {request.samples}")


def _references(where: str | None, images: dict, channels: int) -> dict[str, np.ndarray]:
    if where is None:
        return {}
    paths = photographs.find(where, "--reference")
    if missing := sorted(images.keys() - paths.keys()):
        raise ValueError(f"--reference: {where} has no image named {', '.join(missing[:5])}")
    references = {name: photographs.read(paths[name], channels) for name in images}
    for name, image in images.items():
        if references[name].shape != image.shape:
            raise ValueError(
                f"--reference: {paths[name]} is {references[name].shape}, the image {image.shape}"
            )
    return references


# --- levels --------------------------------------------------------------------------------------


def _levels(model: pretrained.Model, image: np.ndarray, request: Request) -> dict:
    """Blur in pixels and noise in grey levels, with the standard errors of what was estimated."""
    found = {
        "blur": request.blur, "blur_error": None, "noise": request.noise, "noise_error": None,
    }  # fmt: skip
    if None in (request.blur, request.noise):
        x = _tiles(image)
        mean = model.mean if x.shape[1:] == model.image_shape else None
        beta = None if request.noise is None else request.noise / _GREY
        levels = _estimate(jnp.asarray(x), model.spectrum, mean, request.blur, beta)
        alpha, beta, alpha_error, beta_error = (float(level[0]) for level in levels)
        if request.blur is None:
            found |= {"blur": alpha, "blur_error": alpha_error}
        if request.noise is None:
            found |= {"noise": beta * _GREY, "noise_error": beta_error * _GREY}
    return found


def _tiles(image: np.ndarray) -> np.ndarray:
    """An image as [1, H, W, C]; a large one as tiles that count as its channels."""
    height, width, channels = image.shape
    if max(height, width) <= _LARGEST:
        return image[None]
    size = [min(side, _TILE) for side in (height, width)]
    counts = [side // part for side, part in zip((height, width), size, strict=True)]
    cut = image[: counts[0] * size[0], : counts[1] * size[1]]
    cut = cut.reshape(counts[0], size[0], counts[1], size[1], channels).transpose(1, 3, 0, 2, 4)
    return cut.reshape(1, *size, -1)


@jax.jit
def _estimate(x, spectrum, mean, alpha, beta):
    """Both levels, where they are not known, and their standard errors, each [1]."""
    found = restoration.estimate_levels(x, spectrum, mean, alpha=alpha, beta=beta, contrast=True)
    return *found, *restoration.level_errors(x, spectrum, *found, mean, contrast=True)


def _trained_ranges(model: pretrained.Model) -> dict[str, tuple[float, float]]:
    """The noise and the ratios that nearly all training images had, in the app's units."""
    alpha, beta = (
        np.asarray(level) for level in model.schedule.sample_levels(jax.random.key(0), (4096,))
    )
    ratio = alpha / beta / _GREY
    return {
        "noise": tuple(np.quantile(beta * _GREY, (0.005, 0.995))),
        "ratio": (float(ratio.min()), float(ratio.max())),
    }


def _caption(found: dict) -> str:
    def one(name: str, unit: str) -> str:
        error = found[f"{name}_error"]
        level = f"{name} {found[name]:.2f}"
        return f"{level} {unit}" if error is None else f"{level} ± {error:.2f} {unit} (estimated)"

    return f"{one('blur', 'pixels')}, {one('noise', 'grey levels')}"


def _say_levels(name: str, found: dict, ranges: dict) -> None:
    say(f"levels   {name}: {_caption(found)}")
    low, high = ranges["noise"]
    if not low <= found["noise"] <= high:
        say(
            f"note     {name}: noise {found['noise']:.2f} is outside what the network was trained "
            f"on, {low:.2f} to {high:.2f} grey levels: the result may be poor"
        )
    low, high = ranges["ratio"]
    ratio = found["blur"] / max(found["noise"], _LEAST_NOISE * _GREY)
    if not 0.9 * low <= ratio <= 1.1 * high:
        say(
            f"note     {name}: {ratio:.3g} pixels of blur per grey level of noise is outside what "
            f"the network was trained on, {low:.3g} to {high:.3g}: the result may be poor"
        )


# --- images --------------------------------------------------------------------------------------


def _versions(
    model: pretrained.Model, image: np.ndarray, found: dict, num_steps: int, samples: int
) -> dict[str, np.ndarray]:
    """The input, Wiener's, the posterior mean and samples, each [H, W, C] in [-1, 1]."""
    y = jnp.asarray(image[None])
    alpha, beta = found["blur"], max(found["noise"] / _GREY, _LEAST_NOISE)
    versions = {"input": image}
    if model.spectrum is not None:
        versions["Wiener filter"] = restoration.wiener(y, model.spectrum, alpha, beta)[0]
    mean, sample = _compiled(model, num_steps)
    versions["mean"] = mean(model.params, y, alpha, beta)[0]
    for i in range(samples):
        versions[f"sample {i}"] = sample(model.params, y, alpha, beta, jax.random.key(i))[0]
    return {name: np.asarray(version) for name, version in versions.items()}


@functools.lru_cache(maxsize=2)
def _compiled(model: pretrained.Model, num_steps: int):
    """The posterior mean and a sample as functions that compile once for each size."""

    @devices.jit
    def mean(params, y, alpha, beta):
        return model.denoiser(params)(y, alpha, beta).clean

    @devices.jit
    def sample(params, y, alpha, beta, key):
        denoise = model.denoiser(params)
        return restoration.restore(
            denoise, y, alpha, beta, num_steps=num_steps, key=key, stochastic=1.0
        )

    return mean, sample


def _scores(name: str, versions: dict, reference: np.ndarray | None) -> dict[str, dict]:
    """PSNR and SSIM by version; None for one that is no finite number."""
    if reference is None:
        return {}
    measures, found = {"psnr": pairs.psnr}, {}
    if min(reference.shape[:2]) > 10:
        measures["ssim"] = pairs.ssim
    for version, image in versions.items():
        scores = {measure: value(image, reference) for measure, value in measures.items()}
        found[version] = {key: x if math.isfinite(x) else None for key, x in scores.items()}
        for measure, score in found[version].items():
            if score is None:
                say(f"note     {name}: {measure} of {version} is not finite, so it is null")
    return found


def _write(folder: pathlib.Path, name: str, versions: dict, found: dict, scores: dict) -> None:
    units, panels = {"psnr": "{:.2f} dB", "ssim": "SSIM {:.3f}"}, []
    save_png(folder / "mean" / f"{name}.png", to_uint8(versions["mean"]))
    for version, image in versions.items():
        _, _, number = version.partition("sample ")
        if number:
            save_png(folder / "samples" / f"{name}_{number}.png", to_uint8(image))
        if number not in ("", "0"):  # the picture shows one
            continue
        known = {key: x for key, x in scores.get(version, {}).items() if x is not None}
        lines = ", ".join(units[key].format(x) for key, x in known.items())
        panels.append((f"{version}\n{lines}" if lines else version, to_uint8(image)))
    figure = plots.comparison(panels, f"{name}: {_caption(found)}")
    plots.save(folder / "comparison" / f"{name}.png", figure)
