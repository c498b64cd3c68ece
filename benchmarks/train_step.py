"""One training step of any configuration: images per second, memory, model FLOP utilisation.

    python -m benchmarks.train_step --config=configs/cifar10.py --config.training.batch_size=4
    python -m benchmarks.train_step --config=configs/cifar10.py \
        --config.model.dtype=bfloat16 --peak_tflops=989

The step is training's own: augmentation, loss, gradient, Adam, averages, guard; jitted, donated,
over all devices. Images are random, and on the device: speed does not depend on what they show, and
`config.data` need not be there. Each step is waited for, so the host's share is counted too.

    GFLOP/image    of the network's forward pass and gradient, as XLA counts the program before it
                   optimises; without what rematerialisation computes twice
    utilisation    those FLOPs over time and --peak_tflops of every device (an H100 or H200's dense
                   bfloat16 peak is 989, by its data sheet)
    compiled       what the program holds on a device: arguments, results that reuse none of them,
                   temporaries
    peak           most bytes in use on a device, where it counts them (not on a CPU), and the
                   process's largest resident size, which includes compiling
"""

import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable

import clu.parameter_overview
import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from warm_diffusion.app import build
from warm_diffusion.data import Statistics
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime import devices
from warm_diffusion.training.step import Batch, TrainMetrics, abstract_arguments

FLAGS = flags.FLAGS


class Step:
    """The compiled training step of a configuration, its state and its batch.

    Attributes:
      batch_size: images per step, over all devices.
      parameters: of the network.
      compile_seconds: from lowering to the executable.
      compiled: the executable.
      gigaflop: of one image's forward pass and gradient.
    """

    def __init__(self, config: ConfigDict):
        """Compiles."""
        shape = (config.data.resolution, config.data.resolution, config.data.channels)
        if 0 in shape:
            raise ValueError(
                "set config.data.resolution and config.data.channels: no data are read"
            )
        mesh = devices.make_mesh()
        self.batch_size = config.training.batch_size
        devices.check_batch_size("training.batch_size", self.batch_size, mesh)
        built = build.architecture(config, shape)
        make_state, abstract = build.initial_state(config, built, mesh)
        options = build.step_options(config)
        step = build.train_step(config, built, mesh)
        everywhere = devices.replicated(mesh)
        self._batch = devices.put_split(random_batch(config, shape), mesh)
        self._metrics = jax.jit(TrainMetrics.empty, out_shardings=everywhere)()
        self.parameters = int(clu.parameter_overview.count_parameters(abstract.params))
        self.gigaflop = gigaflop(config, shape, abstract.params, self._batch)
        begin = time.perf_counter()
        self._seed = np.uint32(config.seed)
        arguments = abstract_arguments(abstract, self._batch, options, mesh)
        self.compiled = step.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begin
        self._state = make_state()

    def seconds(self) -> float:
        """Runs one step and waits for it."""
        begin = time.perf_counter()
        self._state, self._metrics = self.compiled(
            self._state, self._metrics, self._batch, self._seed
        )
        jax.block_until_ready(self._state)
        return time.perf_counter() - begin

    def memory(self) -> dict[str, float]:
        """Gigabytes (1e9) of the compiled program on a device."""
        analysis = self.compiled.memory_analysis()
        results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        parts = {
            "arguments": analysis.argument_size_in_bytes,
            "results": results,
            "temporaries": analysis.temp_size_in_bytes,
        }
        return {name: size / 1e9 for name, size in {**parts, "total": sum(parts.values())}.items()}


def architecture(config: ConfigDict) -> Architecture:
    """The network of a configuration, for data that need not be there."""
    shape = (config.data.resolution, config.data.resolution, config.data.channels)
    return build.architecture(
        config, shape, Statistics(np.zeros(shape, np.float32), np.ones(shape[:2], np.float32))
    )


class Draw:
    """The compiled sampler of a configuration, with random weights.

    Attributes:
      num_calls: of the network for an image.
      first_seconds: of the first batch, which compiles.
    """

    def __init__(self, config: ConfigDict, count: int):
        built, mesh = architecture(config), devices.make_mesh()
        self._sampler = build.sampler(config, built, mesh, batch_size=count)
        self._params = devices.put_replicated(built.init_params(jax.random.key(0)), mesh)
        self._seeds = np.arange(count, dtype=np.uint32)
        self.num_calls, self.first_seconds = self._sampler.num_calls, self.seconds()

    def seconds(self) -> float:
        """Draws a batch and waits for it."""
        began = time.perf_counter()
        jax.block_until_ready(self._sampler.draw(self._params, self._seeds, None))
        return time.perf_counter() - began


def variant(config: ConfigDict, **changes) -> ConfigDict:
    """A copy with other values of dotted keys, given with __ for the dot."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def random_batch(config: ConfigDict, shape: tuple[int, int, int]) -> Batch:
    """A batch of noise, of images (H, W, C)."""
    rng, count = np.random.default_rng(0), config.training.batch_size
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    classes = config.model.num_classes
    return Batch(images, rng.integers(0, classes, count, np.int32) if classes else None)


def gigaflop(config: ConfigDict, shape: tuple[int, int, int], params, batch: Batch) -> float:
    """XLA's count for one image's loss and gradient, nothing computed twice but the norms.

    Raises:
      ValueError: JAX_PLATFORMS leaves out the CPU, whose compiler counts.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.remat = False
    loss = build.loss(config, build.architecture(config, shape))
    keys = jax.ShapeDtypeStruct((1,), jax.random.key(0).dtype)
    image = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), batch)
    gradient = jax.grad(lambda params, keys, image: loss(params, keys, image).total.mean())
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    # Counts a GPU's program on any device, by the host's compiler, the only one that counts.
    try:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ValueError(f"JAX_PLATFORMS must name cpu as well, to count FLOP ({error})") from error
    traced = jax.jit(gradient, in_shardings=host).trace(params, keys, image)
    return traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"] / 1e9


def machine() -> dict:
    """Returns the machine and versions of the figures."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
    }


def peak_gigabytes() -> dict[str, float]:
    """Gigabytes (1e9) at the fullest moment so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes
    peak = {"resident": kilobytes * unit / 1e9}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak["device"] = stats["peak_bytes_in_use"] / 1e9
    return peak


def in_turns(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by row, after two rounds that do not count.

    Rows take turns at going first, so that a busy machine slows all of them.
    """
    names, seconds = list(rows), {name: [] for name in rows}
    for number in range(-2, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time = rows[name]()
            if number >= 0:
                seconds[name].append(time)
    return seconds


def measure(config: ConfigDict, rounds: int, peak_tflops: float) -> dict:
    """All figures of one configuration; `peak_tflops` 0 leaves out the utilisation."""
    step = Step(config)
    times = sorted(in_turns({"step": step.seconds}, rounds)["step"])
    median = statistics.median(times)
    tflops = step.gigaflop * step.batch_size / median / 1e3
    result = {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "batch_size": step.batch_size,
        "parameters": step.parameters,
        "seconds_per_step": {"median": median, "low": times[0], "high": times[-1]},
        "images_per_second": step.batch_size / median,
        "gigaflop_per_image": step.gigaflop,
        "model_tflops_per_second": tflops,
        "compile_seconds": step.compile_seconds,
        "compiled_gigabytes": step.memory(),
        "peak_gigabytes": peak_gigabytes(),
    }
    if peak_tflops:
        result["utilisation"] = tflops / (peak_tflops * len(jax.devices()))
    return result


def words(value) -> str:
    """A figure, or figures by name or in a row, for a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(words(each) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: str, report: dict) -> None:
    """Writes the report if a path is given."""
    if path:
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")


def run(main: Callable[[list[str]], None]) -> None:
    """Starts a benchmark whose mistakes of use are one line."""

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(guarded)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    result = {"machine": machine(), **measure(FLAGS.config, FLAGS.rounds, FLAGS.peak_tflops)}
    for name, value in result.items():
        print(f"{name:<24} {words(value)}")
    write_json(FLAGS.out, {"command": sys.argv[1:], **result})


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/cifar10.py", "Any configuration.")
    flags.DEFINE_integer("rounds", 10, "Steps that are timed.", lower_bound=1)
    flags.DEFINE_float("peak_tflops", 0.0, "A device's peak TFLOP/s in this dtype; 0: unknown.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    run(main)
