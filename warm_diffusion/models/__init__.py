"""Networks (flax linen): DDPM++ and NCSN++ with a second head and a blur embedding."""

import inspect

import jax.numpy as jnp

from warm_diffusion.models import edm
from warm_diffusion.models.any_size import at_any_size
from warm_diffusion.models.edm import from_edm
from warm_diffusion.models.unet import UNet, ddpmpp, ncsnpp
from warm_diffusion.models.weights import init_params

__all__ = [
    "SIZES", "UNet", "at_any_size", "by_name", "ddpmpp", "edm", "from_edm", "init_params", "ncsnpp"
]  # fmt: skip

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What no network needs more of: checked before anything of that size is made.
SIZES = {
    "resolution": (1, 4096),
    "channels": (1, 1024),
    "model_channels": (4, 2048),
    "channel_mult": (1, 32),
    "num_blocks": (0, 64),
    "num_classes": (0, 1_000_000),
    "augment_dim": (0, 1024),
}


def by_name(name: str, **arguments) -> UNet:
    """The network of a name, from arguments as JSON holds them (`dtype` by name, lists for tuples).

    Raises:
      ValueError: a name or an argument that is not known.
    """
    makers = {"ddpmpp": ddpmpp, "ncsnpp": ncsnpp}
    if name not in makers:
        raise ValueError(f"model.name must be one of {', '.join(makers)}, got {name!r}")
    known = inspect.signature(ddpmpp).parameters
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        raise ValueError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    for key, (low, high) in SIZES.items():
        values = arguments.get(key, low)
        for value in values if isinstance(values, list | tuple) else (values,):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"model.{key} must be {low} to {high:,}, got {values!r}")
    if not arguments.get("channel_mult", (1,)):
        raise ValueError("model.channel_mult must have at least one level, got none")
    dtype = arguments.pop("dtype", "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"model.dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return makers[name](**arguments, dtype=_DTYPES[dtype])
