"""How fast the small-set data path is: index stream and gather on the device.

    python -m benchmarks.data_path

Times what training does for a batch before the network sees it - the indices of the step, their
transfer, gather and conversion inside a jitted function - on arrays sized as digits and CIFAR-10.
Prints images/s (median of several rounds) and writes JSON with --out.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import numpy as np

from benchmarks import train_step
from warm_diffusion.data import batch_indices
from warm_diffusion.data.images import from_uint8

_SETS = {"digits 8x8x1": (1_797, 8, 8, 1), "CIFAR-10 32x32x3": (50_000, 32, 32, 3)}


def images_per_second(shape: tuple[int, ...], batch_size: int, steps: int, rounds: int) -> float:
    """Median over rounds of `steps` batches."""
    images = jax.device_put(np.zeros(shape, np.uint8))
    fetch = jax.jit(lambda images, indices: from_uint8(images[indices]))
    jax.block_until_ready(fetch(images, batch_indices(0, 0, batch_size, shape[0])))
    rates = []
    for number in range(rounds):
        begin = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            batch = fetch(images, batch_indices(0, step, batch_size, shape[0]))
        jax.block_until_ready(batch)
        rates.append(steps * batch_size / (time.perf_counter() - begin))
    return statistics.median(rates)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=500, help="batches a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    report = {"machine": train_step.machine(), "batch_size": options.batch_size}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for name, shape in _SETS.items():
        rate = images_per_second(shape, options.batch_size, options.steps, options.rounds)
        report[name] = round(rate)
        print(f"{name:18} {rate:12,.0f} images/s")
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
