"""Restores photographs that are blurred and noisy, at known levels or at levels read off each one.

It writes a folder of images and a page, index.html: a template shows what it is given as text
unless a filter says otherwise, so names of files are escaped. restoration.json grows with each
image, so that the same command continues after a fault.
"""

import contextlib
import functools
import hashlib
import json
import math
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import pretrained, restoration
from warm_diffusion.app import plots
from warm_diffusion.app.restore import levels, photographs
from warm_diffusion.app.restore.photographs import Photograph
from warm_diffusion.data.images import to_uint8
from warm_diffusion.evaluation import pairs
from warm_diffusion.runtime import devices, storage
from warm_diffusion.runtime.console import progress, say, say_weights


class Request(NamedTuple):
    """The request on the command line, by its flags."""

    input: str
    blur: float | None = None  # pixels
    noise: float | None = None  # grey levels of 0..255
    samples: int = 0
    reference: str | None = None
    only_if_sure: bool = False


def restore(config: ConfigDict, workdir: str, checkpoint: str, request: Request) -> pathlib.Path:
    """Restores photographs into a new folder `workdir`, or continues there, and returns it.

    Writes mean/NAME.png (the posterior mean), samples/NAME_0.png..., input/NAME.png and
    wiener/NAME.png to compare with, comparison/NAME.png, restoration.json and index.html.

    Raises:
      ValueError: no usable checkpoint, images or references that cannot be used, levels out of
        range, or a folder of another command; all of it is checked before anything is written.
    """
    folder = storage.local(workdir, "--workdir")
    _check(request)
    model = pretrained.load(checkpoint, config.sampling.ema)
    if model.spectrum is None and None in (request.blur, request.noise):
        raise ValueError(
            f"{checkpoint} does not carry the spectrum of its data, from which levels are read: "
            "give --blur and --noise"
        )
    report = {
        "checkpoint": str(checkpoint),
        "weights_sha256": model.info["weights_sha256"],
        "num_steps_of_samples": config.sampling.num_steps,
        "request": request._asdict(),
    }
    done = _images_done(folder, report)
    inputs = photographs.find(request.input, "--input")
    references = photographs.find(request.reference, "--reference") if request.reference else {}
    _check_images(inputs, references, request, model.image_shape[2])
    say_weights(model.info, checkpoint)
    contents = {name: _contents(path, references.get(name)) for name, path in inputs.items()}
    images = {  # of files that are as they were, or were taken out since
        name: image
        for name, image in done.items()
        if "sha256" in image and image["sha256"] == contents.get(name, image["sha256"])
    }
    storage.write_json(folder / "restoration.json", {**report, "images": images})
    with progress(len(inputs), "restoring", " images", initial=len(images)) as bar:
        for name, path in inputs.items():
            if name not in images:
                one = _Image(folder, name, photographs.read(path, model.image_shape[2]))
                found = one.restore(model, request, config.sampling.num_steps, references.get(name))
                images[name] = {"file": str(path), "sha256": contents[name], **found}
                storage.write_json(folder / "restoration.json", {**report, "images": images})
                bar.update()
    storage.write_bytes(folder / "index.html", page(_figures(images)))
    left = sum(image["left_as_it_is"] for image in images.values())
    say(f"done     {len(images) - left} restored, {left} unchanged: {folder / 'index.html'}")
    return folder


def _contents(*paths: pathlib.Path | None) -> list[str]:
    """The sha256 of an image's file and of its reference's, by which it is the same one again."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path]


def _check(request: Request) -> None:
    if not request.input:
        raise ValueError("--mode=restore needs --input=FILE_OR_FOLDER")
    for flag, value in (("--blur", request.blur), ("--noise", request.noise)):
        if value is not None and not 0 <= value < 256:
            raise ValueError(f"{flag} must lie in [0, 256), got {value}")
    if request.samples < 0:
        raise ValueError(f"--samples must be at least 0, got {request.samples}")


def _images_done(folder: pathlib.Path, report: dict) -> dict[str, dict]:
    """The images that the same command has restored in the folder before it was stopped."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir must be a folder, got the file {folder}")
    parts = [] if not folder.exists() else folder.iterdir()
    if all(".partial-" in part.name for part in parts):  # of a process that was killed
        return {}
    found = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = storage.read_json(folder / "restoration.json")
    images = found.pop("images", None) if isinstance(found, dict) else None
    if not isinstance(images, dict) or found != json.loads(storage.to_json(report)):
        raise ValueError(
            f"{folder} is not empty, and another command wrote it: give a new --workdir (only the "
            "same command with the same flags continues in an old one)"
        )
    return images


def _check_images(inputs: dict, references: dict, request: Request, channels: int) -> None:
    """Reads every image once, one at a time, so that nothing is refused after hours."""
    missing = sorted(inputs.keys() - references.keys()) if request.reference else []
    if missing:
        raise ValueError(
            f"--reference: {request.reference} has no image named {', '.join(missing[:5])}"
        )
    for name, path in inputs.items():
        shape = photographs.read(path, channels).pixels.shape
        if name not in references:
            continue
        other = photographs.read(references[name], channels).pixels.shape
        if other != shape:
            raise ValueError(f"--reference: {references[name]} is {other}, the image {shape}")


# --- one image -----------------------------------------------------------------------------------


class _Image(NamedTuple):
    folder: pathlib.Path
    name: str
    photograph: Photograph

    def restore(
        self,
        model: pretrained.Model,
        request: Request,
        num_steps: int,
        reference: pathlib.Path | None,
    ) -> dict:
        """Writes the image's files and returns what restoration.json says of it."""
        pixels = self.photograph.pixels
        found = levels.read(model, pixels, self.photograph.quality, request.blur, request.noise)
        say(f"levels   {self.name}: {levels.caption(found)}")
        left = not found["found"] or (request.only_if_sure and bool(found["doubts"]))
        found["note"] = _note(found, left)
        if found["note"]:
            say(f"note     {self.name}: {found['note']}")
        if left:
            versions = {"input": pixels, "mean": pixels}
        else:
            versions = _versions(model, pixels, found, num_steps, request.samples)
        scores = {}
        if reference is not None:
            clean = photographs.read(reference, pixels.shape[-1]).pixels
            scores = _scores(self.name, versions, clean)
            gain = (_in_words(scores[version]) for version in ("input", "mean"))
            say(f"scores   {self.name}: {' -> '.join(gain)}")
        files = {version: _file(self.name, version) for version in versions}
        for version, where in files.items():
            storage.write_bytes(self.folder / where, self.photograph.png(versions[version]))
        _compare(self.folder / "comparison" / f"{self.name}.png", versions, found, scores)
        return {**found, "left_as_it_is": left, "scores": scores, "files": files}


def _file(name: str, version: str) -> str:
    """Where a version of an image goes, in the folder."""
    _, _, number = version.partition("sample ")
    if number:
        return f"samples/{name}_{number}.png"
    return f"{'wiener' if version == 'Wiener filter' else version}/{name}.png"


def _note(found: dict, left: bool) -> str:
    """One sentence on what speaks against the result; empty where nothing does."""
    if not found["found"]:
        return "it is unchanged, because neither blur nor noise stands out of its texture"
    if not found["doubts"]:
        return ""
    doubts = "; ".join(found["doubts"])
    return f"it is unchanged: {doubts}" if left else f"the result may be poor: {doubts}"


def _versions(
    model: pretrained.Model, image: np.ndarray, found: dict, num_steps: int, samples: int
) -> dict[str, np.ndarray]:
    """The input, the posterior mean, Wiener's and samples, each [H, W, C] in [-1, 1]."""
    y = jnp.asarray(image[None])
    alpha, beta = found["blur"], max(found["noise"] / levels.GREY, levels.LEAST_NOISE)
    mean, sample = _compiled(model, num_steps)
    versions = {"input": image, "mean": mean(model.params, y, alpha, beta)[0]}
    if model.spectrum is not None:
        versions["Wiener filter"] = restoration.wiener(y, model.spectrum, alpha, beta)[0]
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


def _scores(name: str, versions: dict, reference: np.ndarray) -> dict[str, dict]:
    """PSNR and SSIM by version; None for one that is no finite number."""
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


def _in_words(scores: dict) -> str:
    """PSNR and SSIM of a version, those that are known."""
    units = {"psnr": "{:.2f} dB", "ssim": "SSIM {:.3f}"}
    return ", ".join(units[key].format(x) for key, x in scores.items() if x is not None)


def _compare(path: pathlib.Path, versions: dict, found: dict, scores: dict) -> None:
    """Writes the picture of the versions beside one another, with one sample."""
    panels = [
        (f"{version}\n{_in_words(scores.get(version, {}))}".strip(), to_uint8(image))
        for version, image in versions.items()
        if version == "sample 0" or not version.startswith("sample ")
    ]
    plots.save(path, plots.comparison(panels, f"{path.stem}: {levels.caption(found)}"))


# --- the page ------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """What the page shows of one image."""

    name: str
    caption: str
    note: str
    scores: dict[str, str]  # by version, in words
    sources: dict[str, str]  # by version: the file's address from the page


def _figures(images: dict[str, dict]) -> Iterator[Figure]:
    """The figures of restoration.json's images."""
    for name, report in images.items():
        sources = {version: urllib.parse.quote(where) for version, where in report["files"].items()}
        scores = {version: _in_words(one) for version, one in report["scores"].items()}
        yield Figure(name, levels.caption(report), report["note"], scores, sources)


def page(figures: Iterator[Figure]) -> bytes:
    """The page of all figures."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("warm_diffusion.app"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("restore.html").render(figures=list(figures)).encode()
