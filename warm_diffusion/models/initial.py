"""Initial parameters of a network in a file: safetensors, which holds arrays and nothing to run.

`python -m warm_diffusion.models.edm_weights` writes such a file, `config.init_from` reads one.
Arrays are named by their path, as in `enc_32x32_block0/conv0/kernel`; the file also says in JSON
which network they belong to, for messages.
"""

import json
import os
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion.models.unet import UNet

_FORMAT = "warm_diffusion initial parameters, version 1"


def _flatten(params: dict) -> dict:
    return flax.traverse_util.flatten_dict(params, sep="/")


def save_initial(path: str | os.PathLike, params: dict, network: Mapping) -> None:
    """Writes parameters; the file appears under its name only when complete.

    Args:
      path: the file to write; one that exists is replaced.
      params: of `model.apply`, without the level "params".
      network: name and arguments of the network, kept for messages.

    Raises:
      OSError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(value) for name, value in _flatten(params).items()}
    content = safetensors.numpy.save(
        arrays, metadata={"format": _FORMAT, "network": json.dumps(dict(network))}
    )
    partial = f"{os.fspath(path)}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_initial(path: str | os.PathLike, model: UNet) -> dict:
    """The parameters in a file that `save_initial` wrote, for `model`.

    Returns:
      `params` of `model.apply({"params": params}, ...)`, float32.

    Raises:
      ValueError: no such file, another kind of file, or arrays that do not fit the network:
        missing, extra and misshaped ones are named, as is the network that the file was made for.
    """
    size = model.resolution
    image, level = jnp.zeros((1, size, size, model.channels)), jnp.zeros((1,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, level, level)["params"]
    expected = {name: leaf.shape for name, leaf in _flatten(shapes).items()}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"it says format {about.get('format')!r}, expected {_FORMAT!r}")
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            problems = _differences(expected, found)
            if problems:
                raise ValueError(f"it was made for {about.get('network')}: " + "; ".join(problems))
            arrays = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in expected}
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"cannot start from {os.fspath(path)}: {error} (such files are written by "
            "`python -m warm_diffusion.models.edm_weights FILE`)"
        ) from error
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def _differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unknown {name}" for name in sorted(found.keys() - expected.keys())]
    return problems + [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
