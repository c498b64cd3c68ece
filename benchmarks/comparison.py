"""What the comparisons share: many short trainings by one compiled step, and their distances.

`bnr_sweep.py` and `ablation.py` train networks that differ in one thing: seeds (of weights, noise
and the order of images), number of images, samples and network calls are equal. The training step,
loss, path, network, order of images and sampler are the package's; a comparison needs no
checkpoints or reports, so its loop is a few lines. Seed and ratio are arguments of the compiled
step, so that twenty trainings compile once.

Every finished training adds its rows to OUT/results.jsonl; starting again skips what is there, and
a second process, of other seeds, may add to the same OUT at the same time.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.judge import Judge
from warm_diffusion import drawing, samplers, schedules
from warm_diffusion.app import build, settings
from warm_diffusion.data import Dataset, batch_indices
from warm_diffusion.data.images import grid, save_png
from warm_diffusion.runtime import devices
from warm_diffusion.training.step import (
    Batch,
    TrainMetrics,
    abstract_arguments,
    choose_average,
    jitted,
)


class Timer:
    """Seconds by purpose; what none claims is overhead."""

    def __init__(self):
        self.seconds, self._began = {}, time.monotonic()

    @contextlib.contextmanager
    def of(self, purpose: str) -> Iterator[None]:
        """Adds the time of the block."""
        began = time.monotonic()
        yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.monotonic() - began

    def elapsed(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def report(self) -> str:
        """One line: every purpose, and the share of all but training and sampling."""
        useful = sum(self.seconds.get(name, 0.0) for name in ("training", "sampling"))
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        share = 1 - useful / self.elapsed()
        return f"{self.elapsed():.1f} s: {parts}; all but training and sampling {share:.1%}"


# --- training and sampling -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
    """The averaged weights that a training ended with, and what it took."""

    params: dict
    facts: dict


class Trainer:
    """Trainings of one configuration that differ in seed and ratio, by one compiled step."""

    def __init__(
        self,
        config: ConfigDict,
        data: Dataset,
        timer: Timer,
        path: Callable[[jax.Array], schedules.Schedule] | None = None,
    ):
        """`path` makes the path of a traced ratio; None: always the configuration's."""
        self.config, self.data, self._timer = config, data, timer
        self.mesh = devices.make_mesh()
        devices.check_batch_size("training.batch_size", config.training.batch_size, self.mesh)
        self.built = build.architecture(config, data.images.shape[1:])
        with timer.of("compiling"):
            self._step = self._compile(path)
        self._stored = devices.put_replicated(
            Batch(np.asarray(data.images), build.labels(config, data)), self.mesh
        )
        self._initial = {}

    def _compile(self, path):
        config = self.config
        _, state = build.initial_state(config, self.built, self.mesh)
        self._structure = jax.tree.structure(state)  # with the optimizer that the step is made for
        everywhere = devices.replicated(self.mesh)
        self._no_metrics = jax.jit(TrainMetrics.empty, out_shardings=everywhere)
        data = Batch(self.data.images, build.labels(config, self.data))
        loss, options = build.loss(config, self.built), build.step_options(config)

        def loss_fn(params, keys, batch, ratio):
            return loss(params, keys, batch, path(ratio) if path else self.built.schedule)

        step = jitted(loss_fn, options, self.mesh, resident=True)
        arguments = abstract_arguments(
            state, data, options, self.mesh, resident=True, extra=(np.float32(0),)
        )
        return step.lower(*arguments).compile()

    def _initial_state(self, seed: int):
        """The state before the first step: made once a seed, the same for all ratios."""
        if seed not in self._initial:
            with self._timer.of("compiling"):
                config = copy.deepcopy(self.config)
                config.seed = seed
                make, _ = build.initial_state(config, self.built, self.mesh)
                self._initial = {seed: [np.asarray(leaf) for leaf in jax.tree.leaves(make())]}
        leaves = devices.put_replicated(self._initial[seed], self.mesh)
        return jax.tree.unflatten(self._structure, leaves)

    def train(self, seed: int, ratio: float = 0.0) -> Trained:
        """Trains for `config.training.num_steps` steps."""
        options, count = self.config.training, len(self.data.images)
        state, metrics = self._initial_state(seed), self._no_metrics()
        began = time.monotonic()
        with self._timer.of("training"):
            for n in range(options.num_steps):
                if n == options.num_steps * 3 // 4:
                    metrics = self._no_metrics()  # losses are reported of the last quarter
                indices = batch_indices(seed, n, options.batch_size, count)
                batch = devices.put_split(indices, self.mesh)
                state, metrics = self._step(
                    state, metrics, (self._stored, batch), np.uint32(seed), (np.float32(ratio),)
                )
                if n % 100 == 0:
                    jax.block_until_ready(state.step)
            jax.block_until_ready(state)
        settings.check_training(self.config, self.built.image_shape)
        params = choose_average(state, self.config.sampling.ema)
        facts = {
            "training_seconds": round(time.monotonic() - began, 2),
            "images_seen": options.num_steps * options.batch_size,
            "nonfinite_steps": int(state.nonfinite_total),
            **{name: float(value) for name, value in metrics.compute().items()},
        }
        return Trained(params, facts)

    def path_samplers(self, solvers: list[tuple[str, int]]) -> dict[tuple, drawing.Sampler]:
        """Samplers along the configuration's path, of the solvers that fit it."""
        found = {}
        for solver, num_steps in solvers:
            config = copy.deepcopy(self.config)
            config.sampling.solver, config.sampling.num_steps = solver, num_steps
            if solver == "multistep" and config.schedule.name == "cold":
                continue  # it needs a noise level that falls
            found[solver, num_steps] = build.sampler(config, self.built, self.mesh)
        return found


class RatioSamplers:
    """Samplers along paths of constant ratio, compiled once for all ratios."""

    def __init__(self, trainer: Trainer, solvers: list[tuple[str, int]]):
        """`solvers`: (solver, number of steps) each."""
        self._trainer, options = trainer, trainer.config.sampling
        self._solvers, self._batch, self._rho = solvers, options.batch_size, options.rho
        devices.check_batch_size("sampling.batch_size", self._batch, trainer.mesh)
        everywhere, split = devices.replicated(trainer.mesh), devices.split(trainer.mesh)

        def draw(params, seeds, ratio, how):
            return drawing.draw(trainer.built, params, seeds, self._path(ratio), how)

        self._draw = devices.jit(
            draw,
            trainer.mesh,
            static_argnums=(3,),
            in_shardings=(everywhere, split, everywhere),
            out_shardings=everywhere,
        )

    def _path(self, ratio) -> schedules.Schedule:
        return schedules.constant_bnr(ratio, **build.noise_range(self._trainer.config))

    def at(self, ratio: float) -> dict[tuple, drawing.Sampler]:
        """By (solver, number of steps)."""
        mesh = self._trainer.mesh

        def make(solver, num_steps):
            def draw(params, seeds, start):
                del start
                return self._draw(params, devices.put_split(seeds, mesh), np.float32(ratio), how)

            how = drawing.Settings(solver, num_steps, self._rho)
            return drawing.Sampler(draw, self._batch, how.num_calls, self._path(ratio))

        return {each: make(*each) for each in self._solvers}


def parse_solvers(texts: list[str]) -> list[tuple[str, int]]:
    """`heun:18` to ("heun", 18)."""
    found = []
    for text in texts:
        solver, _, steps = text.partition(":")
        if solver not in samplers.SOLVERS or not steps.isdigit() or int(steps) < 1:
            raise ValueError(
                f"--solvers must look like heun:18, of {', '.join(samplers.SOLVERS)}; got {text!r}"
            )
        found.append((solver, int(steps)))
    return found


def evaluate(
    trained: Trained,
    by_solver: dict[tuple, drawing.Sampler],
    judge: Judge,
    data: Dataset,
    timer: Timer,
    samples: int,
    compiled: set,
    pictures: pathlib.Path,
) -> Iterator[dict]:
    """A row a solver: its distances. `compiled` remembers which samplers have run before; the
    first images of each go to files whose names begin as `pictures`."""
    for (solver, num_steps), sampler in by_solver.items():
        if (solver, num_steps) not in compiled:  # one batch, not to count compiling as sampling
            with timer.of("compiling"):
                list(sampler.generate(trained.params, range(sampler.batch_size), data.images))
            compiled.add((solver, num_steps))
        began = time.monotonic()
        with timer.of("sampling"):
            drawn = sampler.generate(trained.params, range(samples), data.images)
            images = np.concatenate(list(drawn))
        seconds = time.monotonic() - began
        with timer.of("distances"):
            found = judge(images)
        pictures.parent.mkdir(exist_ok=True)
        name = f"{pictures.name}_{solver}_{sampler.num_calls}.png"
        save_png(pictures.with_name(name), grid(images[:64], min_side=32))
        yield {
            "solver": solver,
            "num_steps": num_steps,
            "nfe": sampler.num_calls,
            **found,
            "sampling_seconds": round(seconds, 2),
        }


# --- results -------------------------------------------------------------------------------------


class Results:
    """Rows in OUT/results.jsonl; a training counts when all its rows are there."""

    def __init__(self, out: pathlib.Path, config: ConfigDict, about: dict):
        """`about`: what besides the configuration must not change between starts.

        Raises:
          ValueError: OUT holds results of other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        # Every key counts here: a comparison is of equals.
        told = json.loads(json.dumps({**about, "config": json.loads(settings.to_json(config))}))
        path = out / "settings.json"
        if path.exists() and json.loads(path.read_text()) != told:
            raise ValueError(
                f"{out} holds results of other settings (see {path}): use another --out"
            )
        path.write_text(json.dumps(told, indent=2) + "\n")
        self.path = out / "results.jsonl"
        self.path.touch()
        text = self.path.read_text()
        if not text.endswith("\n"):  # a kill cut the last training's line short
            self.path.write_text(text[: text.rfind("\n") + 1])

    @property
    def rows(self) -> list[dict]:
        """All by now: another process may be adding to them."""
        complete = self.path.read_text().split("\n")[:-1]
        return [row for line in complete for row in json.loads(line)]

    def has(self, **key) -> bool:
        """Whether the training with this key is there."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, rows: list[dict]) -> None:
        """Appends the rows of one training, as one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(rows) + "\n")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison begins with."""

    config: ConfigDict
    out: pathlib.Path
    timer: Timer
    solvers: list[tuple[str, int]]
    results: Results
    data: Dataset
    judge: Judge
    budget: "Budget"


def begin(options, **about) -> Comparison:
    """Data, judge and the results so far, from the flags that every comparison has.

    Raises:
      ValueError: a solver that is not known; OUT holds results of other settings.
    """
    config, out = options.config, pathlib.Path(options.out).expanduser().absolute()
    settings.enable_compilation_cache(config.compilation_cache_dir)
    timer, solvers = Timer(), parse_solvers(options.solvers)
    about |= {
        "solvers": solvers,
        "samples": options.samples,
        "features": options.features,
        "classifier_steps": options.classifier_steps,
    }
    results = Results(out, config, about)
    data = build.dataset(config)
    with timer.of("classifier"):
        judge = Judge(config, data, out, options)
    budget = Budget(options.minutes, timer)
    return Comparison(config, out, timer, solvers, results, data, judge, budget)


def mean_and_deviation(rows: list[dict], name: str) -> tuple[float, float, int]:
    """Over seeds: mean, standard deviation (n - 1; 0 for one seed), number."""
    values = np.array([row[name] for row in rows])
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return float(values.mean()), deviation, len(values)


class Budget:
    """Stops before a training that the minutes left would not finish."""

    def __init__(self, minutes: float, timer: Timer):
        """`minutes` 0: no limit."""
        self._seconds, self._timer, self._longest = 60 * minutes, timer, 0.0

    def allows_another(self) -> bool:
        """Whether one more training like the longest so far fits."""
        return not self._seconds or self._timer.elapsed() + self._longest < self._seconds

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Measures one training with its sampling."""
        began = self._timer.elapsed()
        yield
        self._longest = max(self._longest, self._timer.elapsed() - began)
