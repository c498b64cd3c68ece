"""How do work, traffic and stored bytes grow with resolution, width and the number of chips?

    python -m benchmarks.growth [--utilisation=0.4] [--out=growth.json]

Arithmetic alone, on any machine, in a minute. FLOP of a training step for one image:

    (1)  convolution  2 k^2 C_in C_out H W,   H W of its output, borders in full
    (2)  attention    qkv and projection by (1), and 4 N^2 C for N = H W positions
    (3)  dense        2 C_in C_out
    (4)  training     3 times all of it: values, gradient by input, gradient by weights

What is per element (norms, activations, augmentation, the DCTs of the loss) is left out; the first
convolution needs no gradient by its input. XLA counts all that, and the borders exactly.

A step on n chips, with nothing overlapped, which is the pessimist's count:

    (5)  compute   batch / n x FLOP per image / (peak x utilisation)
    (6)  reduce    2 (n - 1) / n x bytes of gradients / bandwidth of a chip's links in one direction

Peaks and bandwidths are Google's data sheets'; the utilisation is an assumption.
"""

import importlib
import sys

import jax
import numpy as np
from absl import flags

from benchmarks.aot import abstract_architecture
from benchmarks.train_step import gigaflop, run, write_json
from warm_diffusion.app import build
from warm_diffusion.training.state import Batch

FLAGS = flags.FLAGS

CONFIGS = ("cifar10", "ffhq64", "lsun_church128")
# TFLOP/s in bfloat16, and GB/s of a chip's links in one direction: half of the bidirectional rate.
CHIPS = {"v4": (275, 300), "v5e": (197, 200), "v5p": (459, 600), "v6e": (918, 400)}
COUNTS = (8, 32, 128, 256, 1024)
IMAGES = {"cifar10": 50_000, "ffhq64": 70_000, "lsun_church128": 126_227}
BUDGET = 200e6  # images of the paper's training


def _block(size: int, features_in: int, features: int, embedding: int, attention: bool) -> float:
    """FLOP of one block's values; `size` is the height of its output."""
    positions = size**2
    flops = 2 * 9 * (features_in + features) * features * positions + 2 * embedding * features
    if features_in != features:
        flops += 2 * features_in * features * positions  # skip
    if attention:
        flops += 2 * 4 * features**2 * positions + 4 * positions**2 * features
    return flops


def forward_flops(
    *,
    resolution: int,
    channels: int,
    model_channels: int,
    channel_mult: tuple[int, ...],
    num_blocks: int,
    attention_resolutions: tuple[int, ...],
    heads: int,
    **_,
) -> float:
    """FLOP of one image's pass through DDPM++ by (1) to (3); arguments as `models.ddpmpp`."""
    embedding = 4 * model_channels
    width, total, skips = model_channels, 2 * 9 * channels * model_channels * resolution**2, []
    levels = [(resolution >> i, model_channels * mult) for i, mult in enumerate(channel_mult)]
    for level, (size, features) in enumerate(levels):
        if level:
            total += _block(size, width, width, embedding, False)
        skips.append(width)
        for _ in range(num_blocks):
            total += _block(size, width, features, embedding, size in attention_resolutions)
            width = features
            skips.append(width)
    for level, (size, features) in reversed(list(enumerate(levels))):
        last = level == len(levels) - 1
        total += _block(size, width, width, embedding, last)  # in0, or up
        total += _block(size, width, width, embedding, False) if last else 0  # in1
        for index in range(num_blocks + 1):
            attend = size in attention_resolutions and index == num_blocks
            total += _block(size, width + skips.pop(), features, embedding, attend)
            width = features
    total += 2 * 9 * width * heads * channels * resolution**2
    # map_layer0 and 1, blur0 and 1.
    return total + 2 * (model_channels + embedding) * embedding + 4 * model_channels**2


def count(config) -> dict:
    """GFLOP of an image's training step, both counts, and the number of parameters."""
    built = abstract_architecture(config)
    network = build.describe(config, built.image_shape)["network"]
    params = jax.eval_shape(lambda: built.init_params(jax.random.key(0)))
    image = Batch(jax.ShapeDtypeStruct((1, *built.image_shape), np.uint8))
    return {
        "analytic": 3 * forward_flops(**network) / 1e9,
        "xla": gigaflop(config, built.image_shape, params, image),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def variants() -> dict:
    """The CIFAR-10 network at half and twice the width, and the images' side halved and doubled."""
    rows = {}
    for width, resolution in ((64, 32), (256, 32), (128, 16), (128, 64)):
        config = importlib.import_module("configs.cifar10").get_config()
        config.model.model_channels, config.data.resolution = width, resolution
        rows[f"width {width}, {resolution}x{resolution}"] = count(config)
    return rows


def scaling(row: dict, batch: int, chip: str, utilisation: float) -> list[dict]:
    """Milliseconds of (5) and (6) for each number of chips that can share the batch."""
    peak, links = CHIPS[chip]
    steps = []
    for chips in (number for number in COUNTS if batch % number == 0):
        compute = batch / chips * row["xla"] / (peak * utilisation)
        reduce = 2 * (chips - 1) / chips * 4 * row["parameters"] / (links * 1e6)
        steps.append({"chips": chips, "compute_ms": compute, "reduce_ms": reduce})
    return steps


def main(argv: list[str]) -> None:
    """Prints the tables of docs/scaling.md."""
    del argv
    utilisation = FLAGS.utilisation
    configs = {n: importlib.import_module(f"configs.{n}").get_config() for n in CONFIGS}
    rows = {name: count(config) for name, config in configs.items()}
    report = {"utilisation": utilisation, "flops": rows | variants(), "steps": {}}
    print("GFLOP of an image's training step: analytic, XLA, ratio; parameters")
    for name, row in report["flops"].items():
        print(
            f"  {name:<20} {row['analytic']:8.1f} {row['xla']:8.1f} "
            f"{row['analytic'] / row['xla']:6.3f} {row['parameters']:12,}"
        )
    print(f"ms to compute + reduce at utilisation {utilisation}, the paper's batch over n chips")
    for name, row in rows.items():
        batch = configs[name].training.batch_size
        for chip in CHIPS:
            steps = scaling(row, batch, chip, utilisation)
            report["steps"][f"{name} {chip}"] = steps
            cells = [f"{s['compute_ms']:8.2f} + {s['reduce_ms']:.2f}" for s in steps]
            print(f"  {name:<16} {chip:<4}" + "".join(cells))
    print("stored: GB of data, of weights + average + Adam's moments; chip-days of 200 M images")
    for name, row in rows.items():
        shape = configs[name].data.resolution ** 2 * 3
        days = {
            chip: BUDGET * row["xla"] / (peak * utilisation * 1e3) / 86_400
            for chip, (peak, _) in CHIPS.items()
        }
        print(
            f"  {name:<16} {IMAGES[name] * shape / 1e9:.2f} {4 * 4 * row['parameters'] / 1e9:.2f}  "
            + ", ".join(f"{chip} {d:.1f}" for chip, d in days.items())
        )
        row |= {"data_bytes": IMAGES[name] * shape, "state_bytes": 16 * row["parameters"]}
        row["chip_days"] = days
    write_json(FLAGS.out, {"command": sys.argv[1:], **report})


if __name__ == "__main__":
    flags.DEFINE_float("utilisation", 0.4, "Share of a chip's peak that a step reaches: assumed.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    run(main)
