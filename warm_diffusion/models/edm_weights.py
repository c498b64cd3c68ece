"""Turns a file of EDM's weights into initial parameters of a warm model, for `config.init_from`.

    python -m warm_diffusion.models.edm_weights FILE [--out OUT]

FILE is a .safetensors or .npz file with EDM's parameters under its own names, torch layouts. The
network is read off their shapes: DDPM++ or NCSN++, widths, blocks, attention, class labels,
augmentation labels. At BNR 0 the model in OUT is EDM's; its deblurrer and blur embedding start at
zero. Exit status: 0 written; 2 a file that cannot be used, and one line that says why.

Deliberately absent: unpickling. What torch saves (.pkl, .pth) may run anything when loaded, so the
arrays are to be taken out where that file is trusted.
"""

import argparse
import os
import pathlib
import sys
import zipfile

import jax
import numpy as np
import safetensors
import safetensors.numpy

from warm_diffusion.models.edm import edm_hyperparameters, from_edm, make_network
from warm_diffusion.models.initial import save_initial

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
    source: str | os.PathLike, target: str | os.PathLike, *, heads: int = 2, seed: int = 0
) -> dict:
    """Writes the warm model of EDM's weights in `source` to `target`.

    Args:
      source: .npz or .safetensors file of EDM's parameters.
      target: file to write, read by `initial.load_initial`.
      heads: images that the network puts out; 2 for parameterization `divide`, else 1.
      seed: of the blur embedding's first layer, the one thing drawn at random.

    Returns:
      Name and arguments of the network, to be set in the configuration that starts from `target`.

    Raises:
      ValueError: a file that cannot be used; missing, extra and misshaped arrays are named.
      OSError: `target` cannot be written.
    """
    if pathlib.Path(source).resolve() == pathlib.Path(target).resolve():
        raise ValueError(f"{target} would replace the weights that it is made from: name another")
    arrays = read_arrays(source)
    network = {**edm_hyperparameters(arrays), "heads": heads}
    params = from_edm(make_network(network), arrays, jax.random.key(seed))["params"]
    save_initial(target, params, network)
    return network


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m warm_diffusion.models.edm_weights", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=pathlib.Path, help=".npz or .safetensors of EDM's parameters")
    parser.add_argument("--out", type=pathlib.Path, help="file to write [FILE.init.safetensors]")
    parser.add_argument(
        "--heads", type=int, choices=(1, 2), default=2, help="2: divide; 1: clean or score [2]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the blur embedding's first layer")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # converting needs no accelerator
    out = options.out or options.file.with_suffix(".init.safetensors")
    try:
        network = convert(options.file, out, heads=options.heads, seed=options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"network  {', '.join(f'{key}={value}' for key, value in network.items())}")
    print(f"wrote    {out}: start from it with config.init_from={out} and that config.model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
