"""Many short trainings that differ in their path alone, and their distances, for `bnr_sweep.py`.

Seeds (of weights, noise and the order of images), number of images, samples and network calls are
equal for all of them. Training step, batches and sampler are the app's; a comparison needs no
checkpoints and no reports, so its loop is a few lines.

Every finished training adds its rows to OUT/results.jsonl; starting again skips what is there, and
a second process, of other seeds, may add to the same OUT at the same time.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from benchmarks.train_step import machine, variant
from warm_diffusion import samplers
from warm_diffusion.app import build, drawing, plots, settings
from warm_diffusion.app.train.loop import loader
from warm_diffusion.data import Dataset
from warm_diffusion.data.images import grid, save_png
from warm_diffusion.evaluation import distances, metrics, reference
from warm_diffusion.evaluation.distances import Moments
from warm_diffusion.runtime import devices
from warm_diffusion.training.step import TrainMetrics, choose_average, train_step

SOLVERS = {"euler": "#7d6bb5", "heun": "#009e73", "multistep": "#b8860b"}  # colours
FEWER = {"euler": "#6b4f3a", "heun": "#cc79a7", "multistep": "#5b6472"}  # with fewer calls
MARKERS = {"euler": "^", "heun": "o", "multistep": "s"}
GROUP = ("network", "bnr")  # columns that make an entry of the table


@dataclasses.dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
      key: what its rows are known by, such as {"network": "fixed", "bnr": 0.5}.
      config: what is trained.
      ratios: the blur-to-noise ratios to sample at; None: along the path of its training.
    """

    key: dict
    config: ConfigDict
    ratios: tuple[float, ...] | None = None


class Trainer:
    """Trainings that differ in seed, length and path, by one compiled step and one sampler."""

    def __init__(self, config: ConfigDict, data: Dataset):
        """Nothing is compiled before the first training."""
        self._config, self._data, self._mesh = config, data, devices.make_mesh()
        devices.check_batch_size("training.batch_size", config.training.batch_size, self._mesh)
        self._built = build.architecture(config, data.images.shape[1:])
        self._resident = build.resident(config, data)
        self._step = devices.jit(self._steps, self._mesh, donate_argnums=(1, 2))
        self._draw = devices.jit(self._built.draw, self._mesh, static_argnums=3)
        state = build.initial_state(config, self._built, self._mesh)[1]
        self._structure = jax.tree.structure(state)  # its optimizer is the one that is compiled

    def _steps(self, path, state, metrics, batch, seed):
        """The app's `step.jitted`, except that the path is an argument."""
        options = build.step_options(self._config)
        loss = build.loss(self._config, dataclasses.replace(self._built, schedule=path))
        stored, parts = batch if self._resident else (None, batch)
        on_cpu = devices.platform(self._mesh) == "cpu"

        def one(carry, part):
            if self._resident:
                part = jax.tree.map(lambda leaf: leaf[part], stored)
            return train_step(loss, options, *carry, part, seed, unroll=on_cpu), None

        if options.steps_per_call == 1:
            return one((state, metrics), parts)[0]
        unroll = options.steps_per_call if on_cpu else 1
        return jax.lax.scan(one, (state, metrics), parts, unroll=unroll)[0]

    def train(self, config: ConfigDict, seed: int) -> tuple[dict, dict]:
        """The averaged weights after `config.training.num_steps` steps, and facts by name."""
        config, options = variant(config, seed=seed), config.training
        path = build.schedule(config, self._built.statistics)
        make, _ = build.initial_state(config, self._built, self._mesh)
        state = jax.tree.unflatten(self._structure, jax.tree.leaves(make()))
        load, metrics, began = loader(config, self._data, self._mesh), TrainMetrics.empty(), 0.0
        for n in range(0, options.num_steps, options.steps_per_call):
            if n == options.num_steps * 3 // 4:
                metrics = TrainMetrics.empty()  # the losses are the last quarter's
            state, metrics = self._step(path, state, metrics, load(n), np.uint32(seed))
            if n % 100 == 0:
                jax.block_until_ready(state.step)
            began = began or time.monotonic()  # the first step compiles
        jax.block_until_ready(state)
        facts = {
            "training_seconds": round(time.monotonic() - began, 2),
            "images_seen": options.num_steps * options.batch_size,
            "nonfinite_steps": int(state.nonfinite_total),
            **{name: float(value) for name, value in metrics.compute().items()},
        }
        return choose_average(state, config.sampling.ema), facts

    def samplers(
        self, config: ConfigDict, solvers: list[tuple[str, int]], ratio: float | None
    ) -> Iterator[tuple]:
        """(solver, number of steps, sampler) of the solvers that fit the path."""
        bnr = config.sampling.bnr if ratio is None else ratio
        path = build.sampling_schedule(variant(config, sampling__bnr=bnr), self._built.statistics)
        size = devices.global_batch(config.sampling.batch_size, self._mesh)
        for solver, steps in solvers:
            if solver == "multistep" and path.needs_start:
                continue  # it needs a noise level that falls
            config = variant(config, sampling__solver=solver, sampling__num_steps=steps)
            sampling = build.sampling_settings(config)

            def program(params, seeds, start, sampling=sampling):
                return self._draw(params, seeds, path, sampling, start)

            yield (
                solver,
                steps,
                drawing.Sampler(program, (), size, sampling.num_calls, path, self._mesh),
            )


class Judge:
    """The Frechet distance of generated images to all images of the data set.

    Attributes:
      name: of the metric.
    """

    def __init__(self, config: ConfigDict, data: Dataset, out: pathlib.Path, samples: int):
        """Features are `config.eval.features`; statistics of the data are kept in `out`, unless
        `config.eval.reference` names their file."""
        self._extract = build.extractor(config, data.images.shape[1:])
        facts = build.provenance(config, data, self._extract)
        path = pathlib.Path(config.eval.reference or out / "reference.npz")
        if not path.exists():
            images = reference.in_batches(data.images)
            reference.save(path, reference.collect(self._extract, images, facts))
        self._real = reference.load(path)
        expected = {fact: facts[fact] for fact in ("features", "weights_hash", "data_sha256")}
        reference.check(self._real.provenance, expected, str(path))
        self.name = metrics.main_metric(samples, self._real)

    def __call__(self, images: np.ndarray) -> float:
        """The distance of uint8 images [N, H, W, C]."""
        own, real = Moments.of(self._extract(images)), self._real
        return distances.frechet(own.mean, own.covariance, real.mean, real.covariance)


def parse_solvers(texts: list[str]) -> list[tuple[str, int]]:
    """`heun:18` to ("heun", 18)."""
    found = []
    for text in texts:
        solver, _, steps = text.partition(":")
        if solver not in samplers.SOLVERS or not steps.isdigit() or int(steps) < 1:
            raise ValueError(
                f"--solvers must look like heun:18 with one of {', '.join(samplers.SOLVERS)}; got "
                f"{text!r}"
            )
        found.append((solver, int(steps)))
    return found


class Results:
    """Rows in OUT/results.jsonl; a training counts when all its rows are there."""

    def __init__(self, out: pathlib.Path, about: dict):
        """`about`: what must not change between starts.

        Raises:
          ValueError: OUT holds results of other settings.
        """
        out.mkdir(parents=True, exist_ok=True)
        about, path = json.loads(json.dumps(about)), out / "settings.json"
        if path.exists() and json.loads(path.read_text()) != about:
            raise ValueError(
                f"{out} holds results of other settings (see {path}): use another --out"
            )
        path.write_text(json.dumps(about, indent=2) + "\n")
        self._path = out / "results.jsonl"
        self._path.touch()
        text = self._path.read_text()
        if not text.endswith("\n"):  # a kill cut the last training's line short
            self._path.write_text(text[: text.rfind("\n") + 1])

    @property
    def rows(self) -> list[dict]:
        """All rows so far: another process may be adding to them."""
        complete = self._path.read_text().split("\n")[:-1]
        return [row for line in complete for row in json.loads(line)]

    def has(self, **key) -> bool:
        """Returns whether the training with this key is finished."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, rows: list[dict]) -> None:
        """Appends the rows of one training, as one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(rows) + "\n")


def compare(
    options,
    variants: list[Variant],
    draw: Callable[[list[dict], str], Figure],
) -> None:
    """Trains and evaluates what is not there yet; writes the table, summary and picture each time.

    Args:
      options: see `define_flags`.
      variants: all of them are trained from one seed before the next.
      draw: entries (`summarise`) and the name of a metric to a figure.

    Raises:
      ValueError: no variant; a solver that is not known; OUT holds results of other settings.
    """
    if not variants:
        raise ValueError("--ratios and --any_ratios are both empty: give one of them")
    config, out = options.config, pathlib.Path(options.out).expanduser().absolute()
    settings.enable_compilation_cache(config.compilation_cache_dir)
    solvers = parse_solvers(options.solvers)
    about = {"solvers": options.solvers, "samples": options.samples}
    results = Results(out, about | {"config": json.loads(settings.to_json(config))})
    data = build.dataset(config)
    judge = Judge(config, data, out, options.samples)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    longest = 0.0
    trainer = Trainer(variants[0].config, data)

    def train(each: Variant, seed: int) -> Iterator[dict]:
        params, facts = trainer.train(each.config, seed)
        for ratio in each.ratios or (None,):
            at = each.key if ratio is None else each.key | {"bnr": ratio}
            for solver, steps, sampler in trainer.samplers(each.config, solvers, ratio):
                list(sampler.generate(params, range(sampler.batch_size), data.images))  # compiles
                began = time.monotonic()
                drawn = sampler.generate(params, range(options.samples), data.images)
                images = np.concatenate(list(drawn))
                seconds = round(time.monotonic() - began, 2)
                row = {**at, "seed": seed, "solver": solver, "num_steps": steps}
                row |= {"nfe": sampler.num_calls, judge.name: judge(images), **facts}
                row["sampling_seconds"] = seconds
                name = "_".join(str(row[n]) for n in (*GROUP, "seed", "solver", "nfe"))
                (out / "images").mkdir(exist_ok=True)
                save_png(out / "images" / f"{name}.png", grid(images[:64], min_side=32))
                print(", ".join(f"{key} {row[key]}" for key in row if key in at), end=" ")
                print(f"seed {seed} {solver} NFE {sampler.num_calls}:", end=" ")
                print(f"{judge.name} {row[judge.name]:.4f}", flush=True)
                yield row

    table = functools.partial(write, out, judge.name, draw)
    for seed, each in itertools.product(map(int, options.seeds), variants):
        if results.has(**each.key, seed=seed):
            continue
        began = time.monotonic()
        if began + longest > end:
            print(f"{options.minutes:g} minutes are over: the same command continues")
            return
        results.add(list(train(each, seed)))
        longest = max(longest, time.monotonic() - began)
        table(results.rows)
    if results.rows:
        table(results.rows)
        print((out / "table.md").read_text())


def summarise(rows: list[dict], name: str) -> list[dict]:
    """An entry per `GROUP` and solver: mean and standard deviation (n - 1) over seeds."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[n] for n in (*GROUP, "solver", "nfe")), []).append(row)
    found = []
    for key, members in groups.items():
        entry = dict(zip((*GROUP, "solver", "nfe"), key, strict=True)) | {"seeds": len(members)}
        values = np.array([row[name] for row in members])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        found.append(entry | {name: float(values.mean()), f"{name}_std": deviation})
    return found


def solvers_of(entries: list[dict]) -> list[tuple[str, int]]:
    """(solver, number of network calls) of the entries, in order."""
    return sorted({(entry["solver"], entry["nfe"]) for entry in entries}, key=lambda s: s[1])


def look(solvers: list[tuple[str, int]], solver: str, nfe: int) -> dict:
    """Returns the style of a solver's curve: another colour where it has fewer calls than most."""
    most = nfe == max(calls for each, calls in solvers if each == solver)
    colours = SOLVERS if most else FEWER
    return {"color": colours[solver], "marker": MARKERS[solver] if most else "v", "capsize": 3}


def write(out: pathlib.Path, name: str, draw, rows: list[dict]) -> None:
    """table.md, summary.json and summary.png of the metric of that name."""
    entries = summarise(rows, name)
    solvers, cells = solvers_of(entries), {}
    heads = [*GROUP, *(f"{solver}, NFE {nfe}" for solver, nfe in solvers)]
    lines = [f"`{name}`, mean ± standard deviation over seeds (number of seeds)", ""]
    lines += [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for e in entries:
        row = cells.setdefault(tuple(str(e[n]) for n in GROUP), dict.fromkeys(solvers, "-"))
        row[e["solver"], e["nfe"]] = f"{e[name]:.4f} ± {e[f'{name}_std']:.4f} ({e['seeds']})"
    lines += [f"| {' | '.join([*key, *row.values()])} |" for key, row in cells.items()]
    (out / "table.md").write_text("\n".join([*lines, ""]))
    report = {"machine": machine(), "summary": entries}
    (out / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    plots.save(out / "summary.png", draw(entries, name))


def define_flags() -> None:
    """The flags of a comparison."""
    config_flags.DEFINE_config_file("config", "configs/digits.py", "Data, network, training.")
    flags.DEFINE_string("out", None, "Folder of the results.", required=True)
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds of weights, noise and the order of images.")
    flags.DEFINE_list("solvers", ["heun:5", "multistep:18", "heun:18"], "SOLVER:STEPS each.")
    flags.DEFINE_integer("samples", 2000, "Images drawn for each distance.", lower_bound=8)
    flags.DEFINE_float("minutes", 0.0, "Begin no training that would end later; 0: no limit.")
