"""Everything that a new accelerator should be asked, in one command of less than ten minutes.

    python -m benchmarks.accelerator --out=h100 [--edm=PATH]

The script writes h100.json and h100.txt, a table, after every part, so an interruption loses only
the part under way. Each part is a process of its own: a part that fails or runs out of memory is
recorded with its error and the others go on, and a peak of memory belongs to one part. The most
wanted parts come first; those that --seconds leaves no time for are named.

    numbers     the DCT against float64; bfloat16 and default precision against full float32; the
                same samples from the same seeds
    training    the paper's CIFAR-10 network by batch and type, and FFHQ's at 64x64: images/s,
                utilisation of the chip's peak, memory, compile time (the parts share a new folder
                of compiled programs, so `profile`, which repeats the first one, shows how long a
                kept program takes); the slowest operations of a step
    the rest    the sampler at 18 and 35 network calls, Inception features
    EDM         with a checkout of NVlabs/edm and PyTorch: EDM's own step and sampler in turns with
                ours, and the ratios

`--tiny` runs the same with networks of some thousand weights, to try the script on a CPU. Networks
have random weights except where samples are compared: speed does not depend on them.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import train_step
from configs import cifar10, ffhq64
from warm_diffusion import dct, pretrained
from warm_diffusion.app import build, drawing
from warm_diffusion.data import Statistics
from warm_diffusion.evaluation import features, inception
from warm_diffusion.pretrained import Architecture
from warm_diffusion.process import _image_keys
from warm_diffusion.runtime import devices

# Dense peaks in TFLOP/s by the makers' data sheets, of bfloat16, and of float32 factors at JAX's
# default precision (TF32 on these GPUs, bfloat16 products on TPUs). Parts of jax's device_kind.
PEAKS = {
    "H100": (989, 495), "H200": (989, 495), "A100": (312, 156), "TPU v4": (275, 275),
    "TPU v5 lite": (197, 197), "TPU v5": (459, 459), "TPU v6 lite": (918, 918),
}  # fmt: skip

_MODEL = pathlib.Path(__file__).resolve().parent.parent / "pretrained" / "cifar10_16"
_SLOWEST = 5  # operations of a profile in the table; the JSON file has more
_LEAST_SECONDS = 15.0  # a part with less time left is not begun


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      cifar10: configuration of the network of most parts.
      ffhq64: of one part.
      numerics: of a network small enough to compile twice.
      batches: of training.
      drawn: images that the sampler draws at once.
      rounds: of every timing, whose median counts.
      model: folder of a trained network, for samples.
      edm: checkout of NVlabs/edm; empty: none.
    """

    cifar10: ConfigDict
    ffhq64: ConfigDict
    numerics: ConfigDict
    batches: tuple[int, ...] = (512, 256, 128)
    drawn: int = 512
    rounds: int = 10
    model: pathlib.Path = _MODEL
    edm: str = ""


def peak(dtype: str) -> float:
    """TFLOP/s of one of the devices here; 0 where it is not known."""
    kind = jax.devices()[0].device_kind
    found = next((pair for name, pair in PEAKS.items() if name in kind), (0, 0))
    return found[dtype != "bfloat16"]


def _architecture(config: ConfigDict) -> Architecture:
    shape = (config.data.resolution, config.data.resolution, config.data.channels)
    return build.architecture(
        config, shape, Statistics(np.zeros(shape, np.float32), np.ones(shape[:2], np.float32))
    )


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


# --- numbers -------------------------------------------------------------------------------------


def dct_error(setting: Setting) -> dict:
    """The largest error of the DCT, of its inverse and of their round trip, over the largest value,
    against the same sums in float64 on the host: TF32 or bfloat16 factors would show."""
    del setting
    size = 32
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * k * (n + 0.5) / size)
    matrix[0] /= np.sqrt(2)
    x = np.random.default_rng(0).uniform(-1, 1, (64, size, size, 3)).astype(np.float32)
    exact = np.einsum("ih,bhwc,jw->bijc", matrix, x.astype(np.float64), matrix)
    there = np.asarray(jax.jit(dct.dct)(x), np.float64)
    back = np.asarray(jax.jit(dct.idct)(exact.astype(np.float32)), np.float64)
    return {
        "dct": float(np.abs(there - exact).max() / np.abs(exact).max()),
        "idct": float(np.abs(back - x).max()),
        "round_trip": float(
            np.abs(np.asarray(jax.jit(lambda x: dct.idct(dct.dct(x)))(x)) - x).max()
        ),
    }


def gradient_error(setting: Setting) -> dict:
    """Loss and gradient of the same images, noise and weights in bfloat16, and in float32 at the
    device's default precision, against float32 at full precision; relative."""
    exact = _loss_and_gradient(setting.numerics, "float32", "highest")
    norm, found = np.linalg.norm(exact[1]), {}
    for dtype in ("float32", "bfloat16"):
        loss, gradient = _loss_and_gradient(setting.numerics, dtype, None)
        found[f"loss_{dtype}"] = abs(loss - exact[0]) / abs(exact[0])
        found[f"gradient_{dtype}"] = float(np.linalg.norm(gradient - exact[1]) / norm)
    return found


def _loss_and_gradient(
    config: ConfigDict, dtype: str, precision: str | None
) -> tuple[float, np.ndarray]:
    """Of a batch of noise, at weights that are the same for all types; the gradient flattened."""
    config = train_step.variant(config, model__dtype=dtype, model__dropout=0.0)
    built = _architecture(config)
    loss, batch = build.loss(config, built), train_step.random_batch(config, built.image_shape)

    def objective(params):
        keys = _image_keys(jax.random.key(1), config.training.batch_size)
        return loss(params, keys, batch).total.mean()

    def moved(leaf):  # layers that start at 0 would hide all behind them
        return leaf + 0.02 * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)

    params = jax.tree.map(moved, built.init_params(jax.random.key(0)))
    with jax.default_matmul_precision(precision):
        value, gradient = jax.jit(jax.value_and_grad(objective))(params)
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)]
    return float(value), np.concatenate(flat)


def same_samples(setting: Setting) -> dict:
    """Images of a trained network from the same seeds: drawn twice, in other batches, and on the
    host's CPU. The largest difference of any pixel, of a range of 2, and the median image's."""
    model = pretrained.load(setting.model)
    settings = pretrained.Sampling("heun", 9)
    seeds = np.arange(8, dtype=np.uint32)

    def draw(mesh: Mesh, batch: int) -> np.ndarray:
        sampler = drawing.sampler(model, model.schedule, settings, batch_size=batch, mesh=mesh)
        params = devices.put_replicated(model.params, mesh)
        parts = [sampler.draw(params, seeds[i : i + batch], None) for i in range(0, 8, batch)]
        return np.concatenate([np.asarray(part) for part in parts])

    here = devices.make_mesh(1)
    first = draw(here, 8)
    others = {"again": draw(here, 8), "in_fours": draw(here, 4)}
    if jax.default_backend() != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS leaves it out
            others["on_the_cpu"] = draw(Mesh(np.array(jax.devices("cpu")[:1]), ("data",)), 8)
    found = {}
    for name, images in others.items():
        each = np.abs(images - first).max(axis=(1, 2, 3))
        found |= {name: float(each.max()), f"{name}_median": float(np.median(each))}
    return found


# --- speed ---------------------------------------------------------------------------------------


def step(setting: Setting, name: str, dtype: str, batch: int) -> dict:
    """Training of one network at one batch size; compiled before only by an earlier such part."""
    config = train_step.variant(
        getattr(setting, name), model__dtype=dtype, training__batch_size=batch
    )
    return train_step.measure(config, setting.rounds, peak(dtype))


class Draw:
    """The compiled sampler of a configuration, with random weights.

    Attributes:
      num_calls: of the network for an image.
      first_seconds: of the first batch, which compiles.
    """

    def __init__(self, config: ConfigDict, count: int):
        built, mesh = _architecture(config), devices.make_mesh()
        self._sampler = build.sampler(config, built, mesh, batch_size=count)
        self._params = devices.put_replicated(built.init_params(jax.random.key(0)), mesh)
        self._seeds = np.arange(count, dtype=np.uint32)
        self.num_calls, self.first_seconds = self._sampler.num_calls, self.seconds()

    def seconds(self) -> float:
        """Draws a batch and waits for it."""
        began = time.perf_counter()
        jax.block_until_ready(self._sampler.draw(self._params, self._seeds, None))
        return time.perf_counter() - began


def sample(setting: Setting, dtype: str, solver: str, steps: int) -> dict:
    """Images a second of the sampler."""
    config = train_step.variant(
        setting.cifar10, model__dtype=dtype, sampling__solver=solver, sampling__num_steps=steps
    )
    draw = Draw(config, setting.drawn)
    draw.seconds()  # does not count either
    seconds = _spread([draw.seconds() for _ in range(max(setting.rounds // 3, 1))])
    return {
        "network_calls": draw.num_calls,
        "images_per_second": setting.drawn / seconds["median"],
        "seconds": seconds,
        "first_seconds": draw.first_seconds,
        "peak_gigabytes": train_step.peak_gigabytes(),
    }


def inception_speed(setting: Setting) -> dict:
    """Images a second of Inception's features, of images as the network draws them."""
    mesh, size = devices.make_mesh(), setting.cifar10.data.resolution
    network, batch = features.program(inception.features, mesh)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), inception.abstract_params()
    )  # speed does not depend on the weights
    params = devices.put_replicated(zeros, mesh)
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    images = devices.put_split(images, mesh)

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(network(params, images))
        return time.perf_counter() - began

    seconds = _spread(train_step.in_turns({"": once}, setting.rounds)[""])
    return {"images_per_second": batch / seconds["median"], "seconds": seconds, "batch_size": batch}


def profile(setting: Setting) -> dict:
    """The operations that take most of a training step's time, by `jax.profiler`; and the seconds
    to compile, which are those of a kept program after the same step's part."""
    batch = setting.batches[0]
    config = train_step.variant(
        setting.cifar10, model__dtype="bfloat16", training__batch_size=batch
    )
    step, rounds = train_step.Step(config), 3
    step.seconds()
    step.seconds()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                step.seconds()
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        found = slowest(jax.profiler.ProfileData.from_file(str(trace)), rounds)
    return {"compile_seconds": step.compile_seconds, **found}


def slowest(trace: jax.profiler.ProfileData, rounds: int, most: int = 30) -> dict:
    """Milliseconds a step of all device operations and of the slowest, from a trace.

    On a GPU an operation is a kernel of any stream, on a TPU one of the line "XLA Ops"; on a CPU it
    is what XLA's threads say of the programs they run.
    """
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    on_host = not any(event for plane in planes for line in plane.lines for event in line.events)
    if on_host:
        planes = [plane for plane in trace.planes if plane.name.startswith("/host:CPU")]
    total = collections.Counter()
    for plane in planes:
        named = {line.name for line in plane.lines}
        for line in plane.lines:
            if on_host:
                wanted = "XLA" in line.name
            elif "XLA Ops" in named:
                wanted = line.name == "XLA Ops"
            else:
                wanted = line.name.startswith("Stream")
            for event in line.events if wanted else ():
                if on_host and ("::" in event.name or event.name.startswith("end: ")):
                    continue  # of the runtime, around the operations
                total[event.name] += event.duration_ns / 1e6 / rounds
    return {
        "milliseconds": sum(total.values()),
        "slowest": [{"name": name, "milliseconds": ms} for name, ms in total.most_common(most)],
    }


def edm(setting: Setting, dtype: str, batch: int) -> dict:
    """EDM's step and sampler in turns with ours; a ratio above 1 says that ours is faster."""
    from benchmarks.edm import Edm

    config = train_step.variant(setting.cifar10, model__dtype=dtype, training__batch_size=batch)
    theirs = Edm(setting.edm, config, half=dtype == "bfloat16")
    draw = Draw(train_step.variant(config, sampling__num_steps=18), batch)
    pairs = {
        "step": {"edm": theirs.seconds, "warm": train_step.Step(config).seconds},
        "sample": {"edm": lambda: theirs.draw_seconds(18), "warm": draw.seconds},
    }
    found = {"batch_size": batch, "edm_parameters": theirs.parameters}
    for what, rows in pairs.items():
        seconds = train_step.in_turns(rows, setting.rounds if what == "step" else 3)
        ratios = [a / b for a, b in zip(seconds["edm"], seconds["warm"], strict=True)]
        for name, times in seconds.items():
            found[f"{what}_{name}_images_per_second"] = batch / statistics.median(times)
        found[f"{what}_warm_to_edm"] = _spread(ratios)
    return found | {"edm_peak_gigabytes": theirs.peak_gigabytes()}


def parts(setting: Setting) -> dict[str, Callable[[], dict]]:
    """All parts by name, the most wanted first: time may run out."""
    largest, *smaller = setting.batches
    middle = smaller[0] if smaller else largest

    def of(function, *arguments):
        return lambda: function(setting, *arguments)

    found = {
        "machine": train_step.machine,
        "dct_error": of(dct_error),
        "same_samples": of(same_samples),
    }
    found[f"cifar10_bfloat16_{largest}"] = of(step, "cifar10", "bfloat16", largest)
    found["profile"] = of(profile)
    if setting.edm:
        found["edm_bfloat16"] = of(edm, "bfloat16", middle)
    found["sample_bfloat16_nfe35"] = of(sample, "bfloat16", "heun", 18)
    found["sample_bfloat16_nfe18"] = of(sample, "bfloat16", "multistep", 18)
    found["inception"] = of(inception_speed)
    found[f"cifar10_float32_{largest}"] = of(step, "cifar10", "float32", largest)
    found["gradient_error"] = of(gradient_error)
    found[f"ffhq64_bfloat16_{middle}"] = of(step, "ffhq64", "bfloat16", middle)
    for batch in smaller:
        for dtype in ("bfloat16", "float32"):
            found[f"cifar10_{dtype}_{batch}"] = of(step, "cifar10", dtype, batch)
    if setting.edm:
        found["edm_float32"] = of(edm, "float32", middle)
    return found


# --- the command ---------------------------------------------------------------------------------


def make_setting(tiny: bool, edm: str) -> Setting:
    """What is measured; `tiny` makes it small enough for a CPU."""
    big = {"cifar10": cifar10.get_config(), "ffhq64": ffhq64.get_config()}
    big["numerics"] = cifar10.get_config("small")
    if not tiny:
        return Setting(**big, edm=edm)
    changes = {
        "model__model_channels": 8, "model__channel_mult": (1,), "model__num_blocks": 1,
        "model__attention_resolutions": (), "data__resolution": 8, "training__batch_size": 4,
        "augment__transforms": (),
    }  # fmt: skip
    small = {k: train_step.variant(config, **changes) for k, config in big.items()}
    digits = _MODEL.with_name("digits")
    return Setting(**small, batches=(8, 4), drawn=4, rounds=3, model=digits, edm=edm)


def run_part(name: str, flags: list[str], environment: dict, seconds: float) -> dict:
    """The figures of a part, run in a process of its own; {"error": ...} if there are none."""
    if seconds < _LEAST_SECONDS:
        return {"error": "not begun: no time left"}
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={name}", *flags]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s, at the end of --seconds"}
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"error": f"exit status {done.returncode}: {last[:500]}"}
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures | {"part_seconds": round(time.monotonic() - began, 1)}


def line(name: str, figures: dict) -> str:
    """A part as a line of the table."""
    shown = {name: value for name, value in figures.items() if name != "slowest"}
    text = f"{name:<26} {train_step.words(shown)}"
    for row in figures.get("slowest", [])[:_SLOWEST]:
        text += f"\n{'':<26} {row['milliseconds']:.3g} ms {row['name'][:90]}"
    return text


def main() -> None:
    """Writes the report and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="accelerator", help="write OUT.json and OUT.txt")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts")
    parser.add_argument("--edm", default="", help="checkout of github.com/NVlabs/edm")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--only", default="", help="parts whose names begin so, by comma")
    parser.add_argument("--part", help="this part alone, in this process, to stdout")
    options = parser.parse_args()
    every = parts(make_setting(options.tiny, options.edm))
    if options.part:
        print(json.dumps(every[options.part]()))
        return
    flags = [f"--edm={options.edm}"] + ["--tiny"] * options.tiny
    names = [
        name
        for name in every
        if name != "machine" and name.startswith(tuple(options.only.split(",")))
    ]
    out, table, found = pathlib.Path(options.out), [], {}
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as cache:  # new, so that the first compilation is cold
        # Without PREALLOCATE, the first of JAX and PyTorch would take the whole card.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        # This process does not start JAX's devices: a TPU has one user at a time.
        for name in ["machine", *names]:
            found[name] = run_part(name, flags, environment, end - time.monotonic())
            table.append(line(name, found[name]))
            print(table[-1], flush=True)
            report = {"command": sys.argv[1:], "parts": found}
            out.with_name(out.name + ".json").write_text(json.dumps(report, indent=2) + "\n")
            out.with_name(out.name + ".txt").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
