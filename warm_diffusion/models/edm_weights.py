"""Turns a file of EDM's weights into a model folder, to sample, evaluate or train on from.

    python -m warm_diffusion.models.edm_weights FILE [--out FOLDER]

FILE is a .safetensors or .npz file with EDM's parameters under its own names, torch layouts. The
network is read off their shapes: DDPM++ or NCSN++, widths, blocks, attention, class labels,
augmentation labels. The model is EDM's, on EDM's path without blur; its deblurrer and blur
embedding start at zero. What its training images were like is not in such a file. Exit status: 0
written; 2 a file that cannot be used, and one line that says why.

Deliberately absent: unpickling. What torch saves (.pkl, .pth) may run anything when loaded, so the
arrays are to be taken out where that file is trusted.
"""

import argparse
import hashlib
import os
import pathlib
import sys
import zipfile

import jax
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion import architecture, denoiser, pretrained
from warm_diffusion.models.edm import edm_hyperparameters, from_edm
from warm_diffusion.runtime import storage

_PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".ckpt", ".bin")


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a .npz or .safetensors file; nothing in it is unpickled.

    Raises:
      ValueError: another kind of file, a damaged one, or arrays that are not finite real numbers.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which is never loaded here: loading it once in EDM's own "
            "environment, write the arrays with numpy.savez('edm.npz', **{name: tensor.cpu()"
            ".numpy() for name, tensor in pickle.load(file)['ema'].state_dict().items()}) and "
            "convert edm.npz"
        )
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: expected a .npz or .safetensors file, got {suffix or 'neither'}")
    try:
        if suffix == ".safetensors":
            arrays = safetensors.numpy.load(path.read_bytes())
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    # numpy and safetensors report damage and types they lack (bfloat16) by all of these.
    except (
        OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:  # fmt: skip
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    bad = [
        name
        for name, array in arrays.items()
        if array.dtype.kind != "f" or not np.all(np.isfinite(array))
    ]
    if bad:
        raise ValueError(f"{path}: not finite floating-point numbers: {', '.join(bad)}")
    return arrays


def convert(
    source: str | os.PathLike, *, parameterization: str = "divide", seed: int = 0
) -> pretrained.Model:
    """The warm model of EDM's weights in `source`.

    Args:
      source: .npz or .safetensors file of EDM's parameters.
      parameterization: divide has a second head, the deblurrer, which starts at zero; with clean
        or score the network is EDM's own.
      seed: of the blur embedding's first layer, the one thing drawn at random.

    Raises:
      ValueError: a file that cannot be used; missing, extra and misshaped arrays are named.
    """
    arrays = read_arrays(source)
    network = edm_hyperparameters(arrays)
    network |= {"heads": denoiser.num_heads(parameterization), "dropout": 0.0}
    size, channels = network["resolution"], network["channels"]
    description = {
        "image_shape": [size, size, channels],
        "network": {k: list(v) if isinstance(v, tuple) else v for k, v in network.items()},
        "parameterization": parameterization,
        "preconditioning": "edm",
        "sigma_data": 0.5,
        "schedule": {"name": "hot", "beta_min": 0.002, "beta_max": 80.0},
    }
    built = architecture.build(description)
    params = from_edm(built.network, arrays, jax.random.key(seed))["params"]
    source = pathlib.Path(source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    info = {
        "weights": "EDM's",
        "weights_sha256": storage.digest(params),
        "origin": f"EDM's weights, converted from `{source.name}` (SHA-256 `{digest}`).",
    }
    return pretrained.Model(built, params, info)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m warm_diffusion.models.edm_weights", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=pathlib.Path, help=".npz or .safetensors of EDM's parameters")
    parser.add_argument("--out", help="folder to write [FILE without its suffix]")
    parser.add_argument(
        "--parameterization", choices=denoiser.PARAMETERIZATIONS, default="divide",
        help="divide: with a second head, the deblurrer [divide]",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the blur embedding's first layer")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # converting needs no accelerator
    out = options.out or options.file.with_suffix("")
    try:
        model = convert(options.file, parameterization=options.parameterization, seed=options.seed)
        pretrained.save(model, out, samples=np.zeros((0, *model.image_shape), np.uint8))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    network = model.architecture.description["network"]
    print(f"network  {', '.join(f'{key}={value}' for key, value in network.items())}")
    print(f"model    {out}: for --checkpoint={out}, or --config.init_from={out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
