"""How fast is training and sampling on this CPU: with XLA's defaults, ours, and EDM in PyTorch?

    python -m benchmarks.cpu --config=configs/digits.py --config.data.resolution=8 \
        --config.data.channels=1
    python -m benchmarks.cpu --config=configs/cifar10.py \
        --config.training.batch_size=4 --config.sampling.num_steps=2 [--edm=PATH]

Training step and sampler, in turns in one process; a ratio is the median, over the rounds, of the
ratio within a round, and above 1 says that the row is faster than the first:

    library    what XLA chooses by itself (jax 0.10 and 0.11: YNNPACK)
    own        what this project chooses: the library for sums alone (`devices.jit`)
    edm        with a checkout of NVlabs/edm, EDM's in PyTorch on as many threads as it takes

XLA_FLAGS must not name the option: it would hold for both.
"""

import statistics
import sys
from collections.abc import Callable
from unittest import mock

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks import train_step
from benchmarks.train_step import Draw
from warm_diffusion.runtime import devices

FLAGS = flags.FLAGS


def rows(config: ConfigDict, edm_path: str) -> dict[str, dict[str, Callable[[], float]]]:
    """Returns the timed functions by task and row.

    Raises:
      ValueError: not on a CPU; XLA_FLAGS names the option.
    """
    if jax.default_backend() != "cpu" or devices.compiler_options("cpu") is None:
        raise ValueError(
            "this is about CPUs: set JAX_PLATFORMS=cpu and no xla_cpu_experimental_ynn_fusion_type "
            "in XLA_FLAGS; or this XLA has no such option"
        )
    count = config.training.batch_size
    with mock.patch.object(devices, "compiler_options", return_value=None):
        training = {"library": train_step.Step(config).seconds}
        sampling = {"library": Draw(config, count).seconds}
    training["own"], sampling["own"] = train_step.Step(config).seconds, Draw(config, count).seconds
    if edm_path:
        from benchmarks.edm import Edm

        edm = Edm(edm_path, config, half=False)
        training["edm"] = edm.seconds
        sampling["edm"] = lambda: edm.draw_seconds(config.sampling.num_steps)
    return {"training": training, "sampling": sampling}


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    config, about = FLAGS.config, train_step.machine()
    found = rows(config, FLAGS.edm)
    batch = config.training.batch_size
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"batch {batch}, {config.model.dtype}, medians of {FLAGS.rounds} rounds (lowest, highest)"
    )
    report = {}
    for what, each in found.items():
        seconds = train_step.in_turns(each, FLAGS.rounds)
        report[what] = seconds
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(seconds["library"], times, strict=True)]
            print(
                f"{what:<9} {name:<8} {statistics.median(times):8.3f} s "
                f"({min(times):.3f}, {max(times):.3f})  {batch / statistics.median(times):8.2f} "
                f"images/s  {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            )
    train_step.write_json(FLAGS.out, {"machine": about, "command": sys.argv[1:], "seconds": report})


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/digits.py", "Any configuration.")
    flags.DEFINE_integer("rounds", 10, "Steps and draws that are timed.", lower_bound=1)
    flags.DEFINE_string("edm", "", "Checkout of github.com/NVlabs/edm.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    train_step.run(main)
