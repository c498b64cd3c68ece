"""What does warm diffusion cost in training? Its step against the hot one of the same network.

    python -m benchmarks.warm_overhead --config=configs/cifar10.py --config.training.batch_size=4

Three steps, taken in turns in one run, so that a busy moment of the machine falls on all of them:

    edm     the network with one head, EDM's loss and nothing of this project's process: no blur,
            no second term, no diagnostic (written out below)
    hot     one head at BNR 0 through the project's own loss: parameterization `score`
    warm    two heads at BNR 0.5: parameterization `divide`, the paper's

A ratio is the median, over the rounds, of the ratio within a round. The order turns with the
rounds. Options of the network, batch and dtype are the configuration's.
"""

import statistics
import sys

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks import train_step
from warm_diffusion.app import build
from warm_diffusion.data import augmentation
from warm_diffusion.data.images import from_uint8
from warm_diffusion.losses import LossTerms
from warm_diffusion.training.state import LossFn

FLAGS = flags.FLAGS
_BNR = 0.5


def edm_loss(config: ConfigDict) -> LossFn:
    """EDM's own loss (arXiv 2206.00364, table 1) of a network with one head."""
    shape = (config.data.resolution, config.data.resolution, config.data.channels)
    network = build.architecture(config, shape).network
    options, s, augment = config.schedule.hot, config.denoiser.sigma_data, config.augment

    def loss(params, keys, batch):
        x0, augment_labels = from_uint8(batch.images), None
        noise_key, augment_key, dropout_key = jax.random.split(keys[0], 3)
        if augment.transforms:
            augment_keys = jax.random.split(augment_key, len(x0))
            x0, augment_labels = augmentation.augment(
                augment_keys, x0, augment.probability, augment.transforms
            )
        level_key, noise_key = jax.random.split(noise_key)
        levels = options.p_mean + options.p_std * jax.random.normal(level_key, (len(x0), 1, 1, 1))
        sigma = jnp.exp(levels)
        x = x0 + sigma * jax.random.normal(noise_key, x0.shape)
        scale = jnp.sqrt(sigma**2 + s**2)
        raw = network.apply(
            {"params": params}, x / scale, levels.ravel() / 4, jnp.zeros(len(x0)), batch.labels,
            augment_labels, train=True, rngs={"dropout": dropout_key},
        )  # fmt: skip
        denoised = (s / scale) ** 2 * x + sigma * s / scale * raw
        weight = (scale / (sigma * s)) ** 2
        error = jnp.mean(weight * (denoised - x0) ** 2, axis=(1, 2, 3))
        return LossTerms(error, error, jnp.zeros_like(error), jnp.zeros_like(error))

    return loss


def steps(config: ConfigDict) -> dict[str, train_step.Step]:
    """The compiled steps, by row."""
    hot = train_step.variant(config, schedule__name="hot", denoiser__parameterization="score")
    warm = train_step.variant(
        config,
        schedule__name="constant_bnr",
        schedule__constant_bnr__bnr=_BNR,
        denoiser__parameterization="divide",
    )
    return {
        "edm": train_step.Step(hot, edm_loss(hot)),
        "hot": train_step.Step(hot),
        "warm": train_step.Step(warm),
    }


def measure(rows: dict[str, train_step.Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, by row; two rounds first that do not count."""
    names, seconds = list(rows), {name: [] for name in rows}
    for number in range(-2, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time = rows[name].seconds()
            if number >= 0:
                seconds[name].append(time)
    return seconds


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    about, rows = train_step.machine(), steps(FLAGS.config)
    seconds = measure(rows, FLAGS.rounds)
    about["load after"] = train_step.machine()["load"]
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    batch = rows["warm"].batch_size
    print(f"batch {batch}, {FLAGS.config.model.dtype}, medians of {FLAGS.rounds} rounds")
    heads = ("s/step", "images/s", "temp. GB")
    print(
        f"{'parameters':>18}"
        + "".join(f"{head:>10}" for head in heads)
        + f"{'/ edm':>8}{'/ hot':>8}"
    )
    report = {}
    for name, step in rows.items():
        median = statistics.median(seconds[name])
        ratios = {
            f"times_{other}": statistics.median(
                a / b for a, b in zip(seconds[name], seconds[other], strict=True)
            )
            for other in ("edm", "hot")
        }
        report[name] = {
            "parameters": step.parameters,
            "gigaflop_per_image": step.gigaflop,
            "seconds_per_step": median,
            "images_per_second": batch / median,
            "compiled_gigabytes": step.memory(),
            "seconds": seconds[name],
            **ratios,
        }
        print(
            f"{name:6}{step.parameters:>12,}{median:>10.4f}{batch / median:>10.2f}"
            f"{step.memory()['temporaries']:>10.2f}"
            + "".join(f"{ratio:>8.4f}" for ratio in ratios.values())
        )
    result = {"machine": about, "command": sys.argv[1:], "batch_size": batch, "rows": report}
    train_step.write_json(FLAGS.out, result)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/cifar10.py", "Any configuration.")
    flags.DEFINE_integer("rounds", 15, "Steps of each row that are timed.", lower_bound=1)
    flags.DEFINE_string("out", "", "JSON file to write.")
    train_step.run(main)
