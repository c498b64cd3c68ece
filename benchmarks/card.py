"""What to do with half an hour of an accelerator: the most wanted first, and nothing is lost.

    python -m benchmarks.card --plan
    python -m benchmarks.card --minutes=28 --out=runs/card --data=folder:DIR [--edm=PATH]

Parts, in the order of `QUEUE`; a later half hour with the same --out begins where this one ended:

    step      a training step of the paper's CIFAR-10 network in bfloat16: images/s, utilisation of
              the chip's peak, memory, compile time
    profile   the slowest operations of that step, after the seconds that the kept program takes
    gradient  the error of loss and gradient in bfloat16, and in float32 at default precision
    edm       with a checkout of NVlabs/edm and PyTorch: EDM's step and sampler in turns with ours
    sweep_N   `bnr_sweep` of seed N at 32x32: a network of 7.0 M parameters for each ratio
    any_N     one network for all ratios, trained as long as the four that it is compared with
    ship_N    goes on training one such network at BNR 0.5, to be shipped: OUT/ship/model, weights
              in bfloat16

Each part is a process of its own; one that fails is recorded with its error, and the others go on.
After each, OUT/card.json has the figures, and OUT/state.0, state.1, ... are pieces below 16 MiB of
all that a later half hour needs: on another machine copy them into an empty OUT. There the shipped
network goes on from its averaged weights with a fresh optimizer. `--tiny` tries it all on a CPU.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import train_step
from benchmarks.train_step import architecture
from configs import cifar10
from warm_diffusion import pretrained
from warm_diffusion.app import build
from warm_diffusion.process import _image_keys
from warm_diffusion.runtime import storage

# Dense bfloat16 peaks in TFLOP/s by the makers' data sheets, by parts of jax's device_kind.
PEAKS = {
    "H100": 989, "H200": 989, "A100": 312, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459,
    "TPU v6 lite": 918,
}  # fmt: skip
# GFLOP of an image's training step and images/s, measured on an H200.
KNOWN = ((1.887, 21_400), (121.0, 1_749))
GFLOP = 10.05  # of the network of the sweep (7.0 M parameters; XLA's count)
START = 90  # seconds until a process of the sweep has compiled and read the data, expected

BATCH, STEPS, SAMPLES, SHIP_SECONDS = 512, 1_000, 10_000, 360
RATIOS, SHARED = (0, 0.1, 0.3, 0.5, 0.65, 1, 2, 10), (0, 0.5, 1, 2)
SOLVERS = {"heun:18": 35, "multistep:9": 9}  # and network calls
QUEUE = (
    "step", "profile", "gradient", "edm", "sweep_0", "ship_0", "any_0", "sweep_1", "ship_1",
    "any_1", "sweep_2", "ship_2", "sweep_3", "ship_3",
)  # fmt: skip
FIGURES = {"step": 120, "profile": 40, "gradient": 60, "edm": 200}  # seconds, expected

NETWORK = (
    "--config=configs/cifar10.py", "--config.model.dtype=bfloat16",
    "--config.model.model_channels=64", "--config.model.channel_mult=(1,2,2)",
    "--config.model.num_blocks=2", f"--config.training.batch_size={BATCH}",
    "--config.model.dropout=0.0", "--config.augment.transforms=()", "--config.eval.features=auto",
)  # fmt: skip
SWEEP = (
    "--config.optimizer.warmup_images=25000", "--config.training.ema_halflife_images=(25000,)",
    "--config.sampling.batch_size=2500",
    "--config.schedule.any_bnr.hot_share=0.3", f"--solvers={','.join(SOLVERS)}",
)  # fmt: skip
SHIP = (
    "--config.optimizer.warmup_images=100000", "--config.training.num_steps=400000",
    "--config.training.sample_every=0", "--config.training.checkpoint_every=1000",
    "--config.schedule.constant_bnr.bnr=0.5",
)  # fmt: skip
TINY = (
    "--config.model.model_channels=8", "--config.model.channel_mult=(1,)",
    "--config.model.num_blocks=1", "--config.model.attention_resolutions=()",
    "--config.data.resolution=8", "--config.data.tiles=True", "--config.training.batch_size=8",
    "--config.sampling.batch_size=16",
)  # fmt: skip
_PIECE = 15 * 2**20  # bytes of a piece of the state
_SAVING = 60  # seconds kept for the last checkpoint and the model folder


def expected(name: str) -> float:
    """Seconds that a part takes on an H200, from what was measured there."""
    (work, rate), (more, slower) = KNOWN
    speed = rate * (GFLOP / work) ** (np.log(slower / rate) / np.log(more / work))
    training = STEPS * BATCH / speed
    drawing = SAMPLES * sum(SOLVERS.values()) / (3 * speed) + 15  # a call is a third of a step
    kind = name.split("_")[0]
    return FIGURES.get(name) or {
        "sweep": START + len(RATIOS) * (training + drawing),
        "any": START + len(SHARED) * (training + drawing),
        "ship": SHIP_SECONDS,
    }[kind]  # fmt: skip


def plan(minutes: float, done: dict) -> str:
    """The parts that are not done, with the minute at which each is expected to end."""
    lines, end = [], 0.0
    for name in QUEUE:
        if not done.get(name, {}).get("done"):
            end += expected(name)
            half_hour = int(end / 60 // minutes) + 1
            lines.append(f"{name:<9} {expected(name):5.0f} s  until minute {end / 60:5.1f}, ")
            lines[-1] += f"half hour {half_hour}"
    images = STEPS * BATCH
    return "\n".join([
        *lines,
        f"sweep: {len(RATIOS)} ratios, {images:,} images each, {SAMPLES:,} samples by each of "
        f"{', '.join(SOLVERS)}; any: {len(SHARED) * images:,} images",
    ])  # fmt: skip


# --- parts that measure, each in its own process -------------------------------------------------


def configuration(tiny: bool):
    """The paper's network in bfloat16, or one of some thousand weights."""
    config = train_step.variant(cifar10.get_config(), model__dtype="bfloat16")
    if not tiny:
        return config
    return train_step.variant(
        config, model__model_channels=8, model__channel_mult=(1,), model__num_blocks=1,
        model__attention_resolutions=(), data__resolution=8, training__batch_size=8,
        augment__transforms=(),
    )  # fmt: skip


def step(options) -> dict:
    """Training at the paper's batch."""
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS.items() if name in kind), 0)
    measured = train_step.measure(configuration(options.tiny), 10, peak)
    return {"machine": train_step.machine(), **measured}


def profile(options) -> dict:
    """The operations that take most of a step's time, by `jax.profiler`."""
    step, rounds = train_step.Step(configuration(options.tiny)), 3
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
    """Milliseconds per step of all device operations and of the slowest, from a trace.

    On a GPU an operation is a kernel of any stream, on a TPU one of the line "XLA Ops"; on a CPU it
    is what XLA's threads report about the programs they run.
    """
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    on_host = not any(event for plane in planes for line in plane.lines for event in line.events)
    if on_host:
        planes = [plane for plane in trace.planes if plane.name.startswith("/host:CPU")]
    total = collections.Counter()
    for plane in planes:
        tpu = "XLA Ops" in {line.name for line in plane.lines}
        wanted = "XLA" if on_host else "XLA Ops" if tpu else "Stream"
        for line in plane.lines:
            for event in line.events if wanted in line.name else ():
                if on_host and ("::" in event.name or event.name.startswith("end: ")):
                    continue  # of the runtime, around the operations
                total[event.name] += event.duration_ns / 1e6 / rounds
    rows = [{"name": name, "milliseconds": ms} for name, ms in total.most_common(most)]
    return {"milliseconds": sum(total.values()), "slowest": rows}


def gradient(options) -> dict:
    """Loss and gradient of the same images, noise and weights, relative to full float32."""
    config = configuration(True) if options.tiny else cifar10.get_config("small")
    exact = _loss_and_gradient(config, "float32", "highest")
    norm, found = np.linalg.norm(exact[1]), {}
    for dtype in ("float32", "bfloat16"):
        loss, flat = _loss_and_gradient(config, dtype, None)
        found[f"loss_{dtype}"] = abs(loss - exact[0]) / abs(exact[0])
        found[f"gradient_{dtype}"] = float(np.linalg.norm(flat - exact[1]) / norm)
    return found


def _loss_and_gradient(config, dtype: str, precision: str | None) -> tuple[float, np.ndarray]:
    """Returns loss and flat gradient on a batch of noise, at the same weights for all types."""
    config = train_step.variant(config, model__dtype=dtype, model__dropout=0.0)
    built = architecture(config)
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


def edm(options) -> dict:
    """EDM's step and sampler in turns with ours; a ratio above 1 says that ours is faster."""
    from benchmarks.edm import Edm

    batch = 8 if options.tiny else 256
    config = train_step.variant(configuration(options.tiny), training__batch_size=batch)
    theirs = Edm(options.edm, config, half=not options.tiny)  # PyTorch has no float16 on a CPU
    draw = train_step.Draw(train_step.variant(config, sampling__num_steps=18), batch)
    pairs = {
        "step": {"edm": theirs.seconds, "warm": train_step.Step(config).seconds},
        "sample": {"edm": lambda: theirs.draw_seconds(18), "warm": draw.seconds},
    }
    found = {"batch_size": batch, "edm_parameters": theirs.parameters}
    for what, rows in pairs.items():
        seconds = train_step.in_turns(rows, 10 if what == "step" else 3)
        ratios = [a / b for a, b in zip(seconds["edm"], seconds["warm"], strict=True)]
        for name, times in seconds.items():
            found[f"{what}_{name}_images_per_second"] = batch / statistics.median(times)
        found[f"{what}_warm_to_edm"] = statistics.median(ratios), min(ratios), max(ratios)
    return found | {"edm_peak_gigabytes": theirs.peak_gigabytes()}


def save(options) -> dict:
    """Puts the averaged weights of OUT/ship/work, in bfloat16, in the place of OUT/ship/model."""
    ship = options.out / "ship"
    model = pretrained.load(ship / "work")
    shutil.rmtree(ship / "new", ignore_errors=True)
    pretrained.save(model, ship / "new", dtype="bfloat16", samples=np.zeros(0))
    shutil.rmtree(ship / "model", ignore_errors=True)
    (ship / "new").rename(ship / "model")
    return {name: model.info[name] for name in ("images_seen", "weights_sha256")}


# --- the queue -----------------------------------------------------------------------------------


class Card:
    """The parts, what is done of them, and the state for a later half hour."""

    def __init__(self, options):
        self._options, self._out = options, options.out
        self._out.mkdir(parents=True, exist_ok=True)
        self._report = self._out / "card.json"
        pieces = sorted(self._out.glob("state.*"), key=lambda path: int(path.suffix[1:]))
        if pieces and not self._report.exists():
            content = io.BytesIO(b"".join(path.read_bytes() for path in pieces))
            with tarfile.open(fileobj=content) as archive:
                archive.extractall(self._out, filter="data")
        self.done = storage.read_json(self._report) if self._report.exists() else {}
        self._end = time.monotonic() + 60 * options.minutes

    def run(self) -> None:
        """Runs what is not done until the time is over."""
        for name in QUEUE[:7] if self._options.tiny else QUEUE:  # one part of each kind
            left = self._end - time.monotonic()
            if self.done.get(name, {}).get("done") or (name == "edm" and not self._options.edm):
                continue
            if left < (5 if self._options.tiny else 30):
                print(f"{self._options.minutes:g} minutes are over: the same command continues")
                return
            began, kind = time.monotonic(), name.split("_")[0]
            part = getattr(self, f"_{kind}", self._measure)
            figures = self.done.get(name, {}) | part(name, left)
            figures["seconds"] = round(figures.get("seconds", 0) + time.monotonic() - began, 1)
            if kind == "ship":
                used = figures["seconds"] > 0.9 * self._ship_seconds
                figures["done"] = not figures["error"] and (used or self._options.tiny)
            self.done[name] = figures
            shown = {key: value for key, value in figures.items() if key != "slowest"}
            print(f"{name:<9} {train_step.words(shown)}", flush=True)
            storage.write_json(self._report, self.done)
            self._pack()

    @property
    def _ship_seconds(self) -> float:
        return 600 if self._options.tiny else SHIP_SECONDS

    def _execute(self, name: str, command: list[str], seconds: float) -> int | None:
        """The exit status of a command, whose output goes to OUT/NAME.log; None: out of time."""
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self._out.absolute() / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if name == "edm":  # else the first of JAX and PyTorch would take the whole card
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        with (self._out / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=log, stderr=log
            )
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this process is stopped
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_SAVING)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _error(self, name: str, status: int | None) -> dict:
        if status is None:
            return {"error": "stopped: no time left"}
        lines = (self._out / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return {"error": f"exit status {status}: {(lines or ['no message'])[-1][:500]}"}

    def _measure(self, name: str, left: float) -> dict:
        """A part of this file."""
        options = self._options
        flags = [f"--part={name}", f"--out={self._out}", f"--edm={options.edm}"]
        command = ["-m", "benchmarks.card", *flags, *["--tiny"] * options.tiny]
        status = self._execute(name, command, left)
        if status != 0:
            return self._error(name, status) | {"done": status is not None}
        text = (self._out / f"{name}.log").read_text()
        return {"error": None, **json.loads(text.strip().splitlines()[-1]), "done": True}

    def _compare(self, name: str, left: float, folder: str, steps: int, flags: list[str]) -> dict:
        """`bnr_sweep` with what is wanted of one seed; its rows stay in OUT/`folder`."""
        options = self._options
        tiny = ["--samples=32", "--config.training.num_steps=3"]
        sizes = [f"--samples={SAMPLES}", f"--config.training.num_steps={steps}"]
        command = ["-m", "benchmarks.bnr_sweep", *NETWORK, *SWEEP, *flags]
        command += [f"--config.data.source={options.data}", f"--seeds={name.split('_')[1]}"]
        command += [f"--out={self._out / folder}", f"--minutes={left / 60:.2f}"]
        command += [*TINY, *tiny] if options.tiny else sizes
        status = self._execute(name, command, left)
        lines = (self._out / f"{name}.log").read_text(errors="replace").splitlines() or [""]
        over = status is None or (status == 0 and "minutes are over" in lines[-1])
        return {"error": None} | (self._error(name, status) if status else {}) | {"done": not over}

    def _sweep(self, name: str, left: float) -> dict:
        """A network for each ratio."""
        ratios = RATIOS[::4] if self._options.tiny else RATIOS
        flags = [f"--ratios={','.join(map(str, ratios))}", "--any_ratios="]
        return self._compare(name, left, "sweep", STEPS, flags)

    def _any(self, name: str, left: float) -> dict:
        """A network for all ratios."""
        flags = ["--ratios=", f"--any_ratios={','.join(map(str, SHARED))}"]
        return self._compare(name, left, "any", len(SHARED) * STEPS, flags)

    def _ship(self, name: str, left: float) -> dict:
        """Trains on where the last half hour stopped, and saves."""
        options, ship = self._options, self._out / "ship"
        known, model = ship / "work" / "config.json", ship / "model"
        command = ["main.py", f"--workdir={ship / 'work'}"]
        if known.exists():
            command += [f"--config={known}"]
        else:
            command += [*NETWORK, *SHIP, f"--config.data.source={options.data}"]
            command += [f"--config.init_from={model}"] * model.exists()
            command += [*TINY, "--config.training.num_steps=20"] * options.tiny
        slice_ = self._ship_seconds - self.done.get(name, {}).get("seconds", 0)
        status = self._execute(name, command, min(slice_, left - _SAVING))
        if status:
            return self._error(name, status)
        return self._measure("save", max(self._end - time.monotonic(), _SAVING))

    def _pack(self) -> None:
        """Writes the pieces of the state."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name in ("card.json", "ship/model"):
                if (self._out / name).exists():
                    archive.add(self._out / name, name)
            for path in sorted(self._out.glob("*/[rs]e*s.json*")):  # results.jsonl, settings.json
                archive.add(path, str(path.relative_to(self._out)))
        content = content.getvalue()
        for number, first in enumerate(range(0, len(content), _PIECE)):
            storage.write_bytes(self._out / f"state.{number}", content[first : first + _PIECE])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="runs/card", help="folder of it all")
    parser.add_argument("--minutes", type=float, default=28.0, help="for all parts")
    parser.add_argument("--data", default="cifar10", help="as config.data.source")
    parser.add_argument("--edm", default="", help="checkout of github.com/NVlabs/edm")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--plan", action="store_true", help="print what is to do, and how long")
    parser.add_argument("--part", help="this part alone, in this process, to stdout")
    options = parser.parse_args()
    if options.part:
        parts = (step, profile, gradient, edm, save)
        found = {part.__name__: part for part in parts}[options.part](options)
        print(json.dumps(found))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    card = Card(options)
    print(plan(options.minutes, card.done), flush=True)
    if not options.plan:
        card.run()


if __name__ == "__main__":
    main()
