"""Blur and noise of a photograph, in pixels and grey levels, and what speaks against them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion import pretrained, restoration
from warm_diffusion.app import build
from warm_diffusion.schedules import Schedule

GREY = 127.5  # grey levels of 0..255 per unit of [-1, 1]
LEAST_NOISE = 1 / 127.5 / 12**0.5  # of rounding to 8 bits
_LARGEST = 1024  # pixels per side, above which levels are read off tiles
_TILE = 512
_LEAST_QUALITY = 90  # of a JPEG that leaves blur and noise what they are
# In standard errors. Over 26 photographs without either, levels are below 1.1 errors, `block_edges`
# below 4 and `goodness_of_fit`'s largest z below 3.1.
_FOUND, _BLOCKS, _NO_FIT = 2.0, 5.0, 3.1


def read(
    model: pretrained.Model,
    image: np.ndarray,
    quality: int | None,
    blur: float | None,
    noise: float | None,
) -> dict:
    """Levels of an image [H, W, C] and the judgement on them, for restoration.json.

    Levels that are given (not None) are not judged and have no errors. `found` is false where
    neither level stands out of texture; otherwise `doubts` are clauses of a sentence.
    """
    known = [None if level is None else level / GREY**i for i, level in enumerate((blur, noise))]
    alpha, beta = known
    errors, fit = [None, None], None
    most, edges = _measure(jnp.asarray(image[None]))
    if model.spectrum is not None:
        x = _tiles(image)
        mean = model.mean if x.shape[1:] == model.image_shape else None
        levels, errors, fit = _estimate(jnp.asarray(x), model.spectrum, mean, alpha, beta, most)
        fit = [np.ravel(part).tolist() for part in fit]
        alpha, beta = (float(level[0]) for level in levels)
        errors = [
            None if given is not None or not math.isfinite(error[0]) else float(error[0])
            for given, error in zip(known, errors, strict=True)
        ]
        if blur is None and errors[0] is None:
            alpha = 0.0  # nothing in the image shows its blur
    report = {
        "blur": alpha,
        "blur_given": blur is not None,
        "blur_error": errors[0],
        "noise": beta * GREY,
        "noise_given": noise is not None,
        "noise_error": errors[1] and errors[1] * GREY,
        "quiet_noise": float(most[0]) * GREY,
        "fit": fit and dict(zip(("frequency", "departure", "z"), fit, strict=True)),
        "jpeg_quality": quality,
        "block_edges": float(edges[0]),
    }
    report["found"] = any(
        value > 0 if given is not None else _stands_out(value, error, least)
        for value, error, given, least in zip(
            (alpha, beta), errors, known, (0.0, LEAST_NOISE / 2), strict=True
        )
    )
    report["doubts"] = list(_doubts(report, model.schedule)) if report["found"] else []
    return report


def caption(report: dict) -> str:
    """Both levels; those that were read off are marked, with their errors where there are any."""

    def one(name: str, unit: str) -> str:
        level, error = f"{name} {report[name]:.2f}", report[f"{name}_error"]
        if report[f"{name}_given"]:
            return f"{level} {unit}"
        return f"{level}{'' if error is None else f' ± {error:.2f}'} {unit} (estimated)"

    return f"{one('blur', 'pixels')}, {one('noise', 'grey levels')}"


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
def _measure(x):
    """The most noise that an image can have, and how far edges of JPEG's blocks stand out, [1]."""
    return restoration.quiet_noise(x), restoration.block_edges(x)


@jax.jit
def _estimate(x, spectrum, mean, alpha, beta, most):
    """Both levels, where they are not known, their standard errors, each [1], and the fit."""
    levels = restoration.estimate_levels(
        x, spectrum, mean, alpha=alpha, beta=beta, beta_max=most, contrast=True
    )
    known = (alpha is not None, beta is not None)
    errors = restoration.level_errors(
        x, spectrum, *levels, mean, contrast=True, texture=restoration.TEXTURE, known=known
    )
    return levels, errors, restoration.goodness_of_fit(x, spectrum, *levels, mean, contrast=True)


def _stands_out(level: float, error: float | None, least: float) -> bool:
    """Whether a level differs from 0 by more than texture explains: its square, as its error is."""
    return (
        error is not None
        and level > least
        and level**2 > _FOUND * ((level + error) ** 2 - level**2)
    )


def _doubts(report: dict, path: Schedule):
    """What speaks against the levels, or against the network at them, each as a clause."""
    fit, quality = report["fit"], report["jpeg_quality"]
    if fit and max(map(abs, fit["z"]), default=0) > _NO_FIT:
        band = np.argmax(np.abs(fit["z"]))
        times, frequency = np.exp(fit["departure"][band]), fit["frequency"][band]
        yield (
            "it does not have Gaussian blur and white noise, which leave another power at "
            f"{frequency:.2f} cycles per pixel: it has {times:.2g} times that"
        )
    if quality is not None and quality < _LEAST_QUALITY:
        yield f"it is a JPEG of quality {quality}, which alters noise and blur"
    elif report["block_edges"] > _BLOCKS:
        yield "it has edges every 8 pixels, as a JPEG leaves them, which alters noise and blur"
    noise, ratios = build.trained_levels(path)
    low, high = (GREY * level for level in noise)
    if not low <= report["noise"] <= high:
        yield f"the network was trained on noise of {low:.2f} to {high:.2f} grey levels"
    low, high = (ratio / GREY for ratio in ratios)
    ratio = report["blur"] / max(report["noise"], LEAST_NOISE * GREY)
    if not 0.9 * low <= ratio <= 1.1 * high:
        yield (
            f"the network was trained on {low:.3g} to {high:.3g} pixels of blur per grey level of "
            f"noise, and here it is {ratio:.3g}"
        )
