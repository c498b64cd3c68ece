"""What does augmentation cost inside the training step? Images a second, against a plain x-flip.

    python -m benchmarks.augmentation_speed [--batch 128] [--rounds 25] [--out results.json]

Every row is one compiled call on images that lie on the device. Rounds visit the rows in turn, so
that a busy moment of the machine falls on all of them; figures are medians over the rounds.

    x_flip       augment with transforms=("x_flip",): the augmentation that most recipes have
    augment      all transforms; static shapes make its cost the same at any probability
    draw         its random parameters and labels alone
    warp         its resampling alone
    products     the warp by products of matrices, which TPUs run in place of gathers
    bilinear     jax.scipy.ndimage.map_coordinates, order 1: 4 reads a pixel instead of 16
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from warm_diffusion.data import augmentation

PROBABILITY = 0.12


def _bilinear(images: jax.Array, inverse: jax.Array) -> jax.Array:
    height, width, channels = images.shape[1:]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    grid = grid.reshape(2, -1) - centre[:, None]

    def one(image: jax.Array, matrix: jax.Array) -> jax.Array:
        where = matrix[:, :2] @ grid + matrix[:, 2:] + centre[:, None]
        values = [
            jax.scipy.ndimage.map_coordinates(image[..., c], list(where), order=1, mode="reflect")
            for c in range(channels)
        ]
        return jnp.stack(values, axis=-1).reshape(image.shape)

    return jax.vmap(one)(images, inverse)


def _products(images: jax.Array, inverse: jax.Array) -> jax.Array:
    """`augmentation.warp` as it is on a TPU."""
    gather = augmentation._sum_by_gather
    augmentation._sum_by_gather = augmentation._sum_by_products
    try:
        return augmentation.warp(images, inverse)
    finally:
        augmentation._sum_by_gather = gather


def calls(size: int, batch: int) -> dict[str, Callable[[], object]]:
    """One compiled call a row, on random images [batch, size, size, 3]."""
    key, image_key = jax.random.split(jax.random.key(0))
    images = jax.random.uniform(image_key, (batch, size, size, 3), minval=-1.0)

    @jax.jit
    def draw(key):
        parameters = augmentation.draw(key, batch, PROBABILITY)
        return augmentation.inverse_map(parameters, size, size), augmentation.labels(parameters)

    augment = jax.jit(augmentation.augment, static_argnames="transforms")
    warp, products, bilinear = (jax.jit(f) for f in (augmentation.warp, _products, _bilinear))
    inverse, _ = draw(key)
    return {
        "x_flip": lambda: augment(key, images, PROBABILITY, transforms=("x_flip",)),
        "augment": lambda: augment(key, images, PROBABILITY),
        "draw": lambda: draw(key),
        "warp": lambda: warp(images, inverse),
        "products": lambda: products(images, inverse),
        "bilinear": lambda: bilinear(images, inverse),
    }


def measure(size: int, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds a batch and images a second of every row."""
    rows = calls(size, batch)
    for call in rows.values():  # compile, and once more to warm up
        jax.block_until_ready(call())
        jax.block_until_ready(call())
    seconds = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "seconds_per_batch": median,
            "fastest_seconds_per_batch": min(seconds[name]),
            "images_per_second": batch / median,
            "times_x_flip": median / medians["x_flip"],
        }
        for name, median in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="images a call")
    parser.add_argument("--rounds", type=int, default=25, help="interleaved runs of every row")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="pixels a side")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()

    device = jax.devices()[0]
    report = {
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "batch": args.batch,
        "rounds": args.rounds,
        "probability": PROBABILITY,
        "sizes": {},
    }
    print(f"{report['device']}, jax {jax.__version__}, batch {args.batch}, {args.rounds} rounds")
    print(f"{'size':>9}  {'row':<9} {'images/s':>10} {'ms/batch':>9} {'x flip':>7}")
    for size in args.sizes:
        report["sizes"][f"{size}x{size}x3"] = results = measure(size, args.batch, args.rounds)
        for name, row in results.items():
            print(
                f"{size:>5}x{size:<3}  {name:<9} {row['images_per_second']:>10,.0f}"
                f" {1e3 * row['seconds_per_batch']:>9.2f} {row['times_x_flip']:>7.1f}"
            )
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
