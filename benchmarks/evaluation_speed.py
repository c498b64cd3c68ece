"""How fast are Inception features and the Frechet distance on this machine?

    python -m benchmarks.evaluation_speed [--out FILE.json] [--batch 8] [--repeats 7]

Weights and images are random: speed does not depend on them. Where torch can be imported, the same
layers (batch normalisation folded in as here) run in torch in turns with ours, and their features
are compared; it is no dependency. About a minute on two idle cores, whose load the table shows.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks import train_step
from warm_diffusion.evaluation import distances, inception, inception_layers
from warm_diffusion.runtime import devices

SIZE = 32
NUM_FEATURES = 2048
NUM_EXAMPLES = 5000  # more than features, so that covariances have full rank: the slower case


def random_arrays() -> dict[str, np.ndarray]:
    """Weights that keep activations near 1 through all layers."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in inception_layers.array_shapes().items():
        if name.endswith("conv.weight") or name == "fc.weight":
            array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            array = np.ones(shape) if name.endswith(("weight", "var")) else np.zeros(shape)
        arrays[name] = array.astype(np.float32)
    return arrays


def torch_features(params: inception.Params) -> Callable[[np.ndarray], np.ndarray]:
    """The same network in torch: uint8 images [B, H, W, 3] to features [B, 2048]."""
    import torch
    from torch.nn import functional

    layers = {
        name: tuple(
            torch.tensor(np.asarray(p[key]).transpose(axes).copy())
            for key, axes in (("kernel", (3, 2, 0, 1)), ("bias", (0, 3, 1, 2)))
        )
        for name, p in params.items()
        if name != "fc"
    }

    def convolve(name, x, stride=1, padded=True):
        kernel, bias = layers[name]
        padding = tuple(size // 2 for size in kernel.shape[2:]) if padded else 0
        return functional.relu(functional.conv2d(x, kernel, bias.ravel(), stride, padding))

    def pool(kind, x):
        if kind == "average":
            return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return functional.max_pool2d(x, 3, 1, 1)

    def run_block(block, x):
        branches, kind = inception_layers.BLOCKS[block]
        outputs = []
        for branch in branches:
            y = pool(kind, x) if branch == "branch_pool" else x
            stages = inception_layers.stages(block, branch)
            for i, stage in enumerate(stages):
                halve = kind == "reduce" and i == len(stages) - 1
                how = (2, False) if halve else (1, True)
                y = torch.cat([convolve(name, y, *how) for name in stage], 1)
            outputs.append(y)
        if kind == "reduce":
            outputs.append(functional.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)

    matrix = torch.tensor(inception._resize_matrix(SIZE))

    @torch.inference_mode()
    def features(images):
        x = torch.einsum("ih,bhwc,jw->bcij", matrix, torch.tensor(images).float(), matrix)
        x = (x - 128) / 128
        for name, (_, stride, padded) in inception_layers.STEM.items():
            x = convolve(name, x, stride, padded)
            if name in inception_layers.POOL_AFTER:
                x = functional.max_pool2d(x, 3, 2)
        for block in inception_layers.BLOCKS:
            x = run_block(block, x)
        return x.mean((2, 3)).numpy()

    return features


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of each function, in turns, after one call of each that does not count."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def feature_rows(batch: int, repeats: int) -> list[dict]:
    """Images per second: medians, and the range over repeats."""
    params = inception.params_from_arrays(random_arrays())
    images = np.random.default_rng(1).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    jitted = devices.jit(inception.features)
    functions = {"Inception features, jax": lambda: np.asarray(jitted(params, images))}
    if importlib.util.find_spec("torch"):
        in_torch = torch_features(params)
        functions["Inception features, torch"] = lambda: in_torch(images)
    outputs = [function() for function in functions.values()]
    error = max(np.abs(o - outputs[0]).max() for o in outputs) / outputs[0].max()
    if error > 1e-4:
        raise ValueError(f"torch and jax differ by {error:.1e}: they do not run the same layers")
    rows = []
    for name, times in seconds(functions, repeats).items():
        rates = sorted(batch / t for t in times)
        median = statistics.median(rates)
        rows.append(
            {"what": name, "unit": "images/s", "median": median, "low": rates[0], "high": rates[-1]}
        )
    return rows


def frechet_rows(repeats: int) -> list[dict]:
    """Seconds for moments of 5000 examples and for one distance, 2048 features each."""
    rng = np.random.default_rng(2)
    # A spectrum like that of Inception features: a few strong directions, a long tail.
    scale = (
        np.exp(-np.linspace(0, 8, NUM_FEATURES))
        * np.linalg.qr(rng.standard_normal((NUM_FEATURES, NUM_FEATURES)))[0]
    )
    sets = [rng.standard_normal((NUM_EXAMPLES, NUM_FEATURES)) @ scale.T for _ in range(2)]
    a, b = map(distances.Moments.of, sets)
    pair = (a.mean, a.covariance, b.mean, b.covariance)
    functions = {
        f"moments of {NUM_EXAMPLES} x {NUM_FEATURES}": lambda: distances.Moments.of(sets[0]),
        f"Frechet distance, {NUM_FEATURES} features": lambda: distances.frechet(*pair),
    }
    rows = []
    for name, times in seconds(functions, repeats).items():
        median = statistics.median(times)
        rows.append(
            {"what": name, "unit": "s", "median": median, "low": min(times), "high": max(times)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    machine = train_step.machine() | {
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    rows = feature_rows(options.batch, options.repeats) + frechet_rows(max(options.repeats // 2, 3))
    machine["load after"] = train_step.machine()["load"]
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':<36}{'median':>9}{'low':>9}{'high':>9}")
    for row in rows:
        numbers = "".join(f"{row[key]:>9.2f}" for key in ("median", "low", "high"))
        print(f"{row['what']:<36}{numbers} {row['unit']}")
    if options.out:
        report = {"machine": machine, "batch": options.batch, "image size": SIZE, "rows": rows}
        with open(options.out, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
