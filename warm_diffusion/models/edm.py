"""EDM's network weights in this project's networks.

EDM stores torch arrays (convolutions OIHW, linear layers OI) under names like
`model.enc.32x32_block0.conv0.weight`. Blocks and layers carry the same names here, so the mapping
is mechanical. The second head and the blur embedding have no counterpart and start at zero.

What training images were like is not in such a file.

Deliberately absent: EDM's third network, ADM (its ImageNet-64 model), whose layers are others.
"""

import pathlib
import re
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from warm_diffusion.models.layers import scaled_init
from warm_diffusion.models.unet import UNet
from warm_diffusion.models.weights import init_params
from warm_diffusion.runtime import torch_files

_FOURIER = "map_noise.freqs"  # NCSN++ has it, DDPM++ has not
_FILTER = "resample_filter"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], float]:
    """EDM's parameters by its names and its sigma_data, in its .pkl.

    Raises:
      ValueError: another kind of file, a damaged one, or arrays that are not finite real numbers.
    """
    if path.suffix != ".pkl":
        raise ValueError(f"expected EDM's .pkl, got {path}")
    name, attributes, arrays = torch_files.read_network(path)
    if name != "EDMPrecond":
        raise ValueError(f"it holds a network of class {name:.60}, expected EDMPrecond")
    arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    bad = [n for n, a in arrays.items() if a.dtype.kind != "f" or not np.all(np.isfinite(a))]
    if bad:
        raise ValueError(f"{path}: not finite floating-point numbers in {', '.join(bad)}")
    return arrays, attributes.get("sigma_data", 0.5)


def _edm_name(path: tuple[str, ...]) -> str:
    """EDM's name of one of our parameters: ("enc_8x8_block0", "conv0", "kernel") and so on."""
    if path == ("frequencies",):
        return _FOURIER
    module = re.sub(r"^(enc|dec)_", r"\1.", path[0])
    return ".".join([module, *path[1:-1], _LEAVES[path[-1]]])


def _to_edm_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_edm_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def hyperparameters(arrays: Mapping[str, np.ndarray]) -> dict:
    """Returns the hyperparameters that the names and shapes of EDM's weights imply.

    Args:
      arrays: EDM's parameters under its own names, as for `from_edm`.

    Returns:
      `name` (ddpmpp or ncsnpp) and that function's keyword arguments, except those that leave no
      trace in the weights: dropout, dtype, heads.

    Raises:
      ValueError: arrays of another kind of network.
    """
    outputs = [re.fullmatch(r"dec\.(\d+)x\1_aux_conv\.weight", name) for name in arrays]
    sizes = [int(match[1]) for match in outputs if match]
    if len(sizes) != 1:
        raise ValueError(
            "these are not the weights of EDM's DDPM++ or NCSN++: expected one array "
            f"dec.NxN_aux_conv.weight, got {len(sizes)} (its ADM network for ImageNet is another)"
        )

    def axis(name: str, axis: int, default: int | None = None) -> int:
        if name not in arrays and default is not None:
            return default
        if name not in arrays or arrays[name].ndim <= axis:
            raise ValueError(f"EDM weights are incomplete: missing {name}, or it has too few axes")
        return arrays[name].shape[axis]

    resolution = sizes[0]
    channels, model_channels = (
        axis(f"enc.{resolution}x{resolution}_conv.weight", i) for i in (1, 0)
    )
    blocks = [re.match(rf"dec\.{resolution}x{resolution}_block(\d+)\.", name) for name in arrays]
    last_block = max((int(match[1]) for match in blocks if match), default=0)
    levels = []
    while (
        f"dec.{resolution >> len(levels)}x{resolution >> len(levels)}_block0.conv0.weight" in arrays
    ):
        levels.append(resolution >> len(levels))
    widths = [axis(f"dec.{size}x{size}_block0.conv0.weight", 0) for size in levels]
    if not levels or any(width % model_channels for width in widths):
        raise ValueError(
            f"expected EDM's levels to be multiples of {model_channels} channels wide, got {widths}"
        )
    name = "ncsnpp" if _FOURIER in arrays else "ddpmpp"
    _check_filters(name, arrays)
    return dict(
        name=name,
        resolution=resolution,
        channels=channels,
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in widths),
        num_blocks=last_block,  # the decoder has one more
        attention_resolutions=tuple(
            size for size in levels if f"dec.{size}x{size}_block{last_block}.qkv.weight" in arrays
        ),
        num_classes=axis("map_label.weight", 1, 0),
        augment_dim=axis("map_augment.weight", 1, 0),
    )


def _check_filters(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """The stored low-pass filters must be those that the network will use."""
    taps = np.array((1, 3, 3, 1) if name == "ncsnpp" else (1, 1), np.float32)
    expected = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    for key, array in arrays.items():
        if key.endswith(_FILTER) and not (
            array.shape == expected.shape and np.allclose(array, expected)
        ):
            raise ValueError(f"{key} is not the filter {taps.astype(int).tolist()} of {name}")


def from_edm(model: UNet, arrays: Mapping[str, np.ndarray], key: jax.Array) -> dict:
    """Variables of `model` with EDM's weights in the trunk and the denoiser head.

    Args:
      model: a network of the same shape as EDM's.
      arrays: EDM's parameters under its own names (a leading `model.` is optional), torch layouts;
        its fixed `resample_filter` buffers are ignored.
      key: PRNG key for what EDM lacks (the first layer of the blur embedding).

    Returns:
      {"params": ...} for `model.apply`.

    Raises:
      ValueError: missing, extra or misshaped arrays, which it names.
    """
    arrays = {
        name.removeprefix("model."): a for name, a in arrays.items() if not name.endswith(_FILTER)
    }
    size = model.resolution
    shapes = init_params.eval_shape(model, key)
    params = flax.traverse_util.flatten_dict(shapes)
    output_layer = f"dec_{size}x{size}_aux_conv"

    problems, used = [], set()
    for path, value in params.items():
        if path[0] in ("blur0", "blur1"):
            init = scaled_init(1.0 if path == ("blur0", "kernel") else 0.0)
            params[path] = init(key, value.shape)
            continue
        name = _edm_name(path)
        if name not in arrays:
            problems.append(f"missing {name}")
            continue
        used.add(name)
        target = np.zeros(value.shape, np.float32)
        # The output layer holds both heads; EDM's is the first, the denoiser's.
        part = target[..., : model.channels] if path[0] == output_layer else target
        expected = _to_edm_layout(path, part).shape
        if arrays[name].shape != expected:
            problems.append(f"{name} has shape {arrays[name].shape}, expected {expected}")
            continue
        part[...] = _from_edm_layout(path, arrays[name])
        params[path] = jnp.asarray(target)
    problems += [f"unknown {name}" for name in sorted(set(arrays) - used)]
    if problems:
        raise ValueError("EDM weights do not fit the network: " + "; ".join(problems))
    return {"params": flax.traverse_util.unflatten_dict(params)}
