"""How good are samples for how many network calls? Distance against NFE for each solver and grid.

    python -m benchmarks.nfe_curve runs/digits runs/digits_hot --out=runs/nfe
    python -m benchmarks.nfe_curve pretrained/cifar10_16 --source=folder:cifar10/train \
        --out=runs/grids --grids edm spectral 8,3,1,0.28,0.002 --ratios 0 0.5 1 \
        --first_seeds 0 1000 --calls 4 8

Draws the same seeds from every network (model folder, training workdir, its checkpoints/STEP) along
its path, or along constant ratios, and compares them with the training data, in --features. `bnr`
of a row is the ratio sampled along, `schedule` the path trained on. A grid is `edm` (from noise),
`spectral` (from Gaussian data), or times, from Gaussian data too and for each solver, whatever
--calls says. Rows go to OUT/nfe.json as they come; what is there is not measured again. OUT/nfe.png
shows the mean over --first_seeds. A solver's number of calls is what it really needs: heun makes
2 n - 1 in n steps to the clean image, so of an even number one less.
"""

import argparse
import itertools
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import comparison
from benchmarks.train_step import machine
from configs import default, saved
from warm_diffusion import pretrained, samplers, schedules
from warm_diffusion.app import build, plots, settings
from warm_diffusion.data.images import to_uint8
from warm_diffusion.data.sources import short_name
from warm_diffusion.runtime import devices

_LINES = ("-", "--", ":", "-.")
_KEY = ("checkpoint", "weights_sha256", "schedule", "bnr", "grid", "solver", "nfe", "seeds")


def num_steps(solver: str, calls: int) -> int:
    """Steps that make at most this many network calls."""
    return (calls + 1) // 2 if solver == "heun" else calls


def configuration(checkpoint: str, arguments: argparse.Namespace) -> ConfigDict:
    """The checkpoint's, with the noise levels, data and features asked for.

    Raises:
      ValueError: no checkpoint there, or a range that its path cannot have.
    """
    folder = pretrained.split_checkpoint(checkpoint)[0]
    config = saved.get_config(str(folder / "config.json"))
    config.data.source = arguments.source or config.data.source
    config.eval.features, config.eval.reference = arguments.features, arguments.reference
    config.eval.inception_weights = arguments.inception_weights or config.eval.inception_weights
    if arguments.noise_range:
        levels = config.schedule[config.schedule.name]
        if "beta_min" not in levels:
            raise ValueError(
                f"{checkpoint}: schedule {config.schedule.name} has noise levels of its own; leave "
                "--noise_range out"
            )
        levels.beta_min, levels.beta_max = arguments.noise_range
        build.sampling_schedule(config)  # refuses a range that is none
    return config


class Network:
    """A network that draws along any ratio and grid, compiled once for a solver and grid size."""

    def __init__(self, checkpoint: str, config: ConfigDict):
        self.model, self._config = pretrained.load(checkpoint, config.sampling.ema), config
        self._compiled = devices.jit(self._draw, static_argnums=(4, 5))

    def path(self, bnr: float | None) -> schedules.Schedule:
        """The path of a constant ratio; None: the configuration's own."""
        if bnr is None:
            return build.schedule(self._config, self.model.statistics)
        return pretrained.at_ratio(build.chosen_path(self._config), bnr)

    def times(self, grid: str, path: schedules.Schedule, solver: str, calls: int) -> jax.Array:
        """The grid of that name."""
        steps = num_steps(solver, calls)
        if grid == "edm":
            return schedules.time_grid(path, steps, self._config.sampling.rho)
        if grid == "spectral":
            return schedules.spectral_grid(path, self.model.spectrum, steps, solver)
        return jnp.asarray([float(time) for time in grid.split(",")])

    def _draw(self, params, seeds, times, path, solver, from_noise):
        noise = samplers.initial_noise(seeds, self.model.image_shape)
        if from_noise:
            x = path.beta(times[0]) * noise
        else:
            x = samplers.gaussian_start(noise, path, times[0], self.model.mean, self.model.spectrum)
        denoise = self.model.seed_denoiser(params, seeds)
        return samplers.solve(denoise, x, path, times, solver=solver)

    def draw(self, seeds: np.ndarray, times, path, solver: str, from_noise: bool) -> np.ndarray:
        """uint8 images [N, H, W, C]."""
        size = self._config.sampling.batch_size
        images = []
        for batch in (seeds[first : first + size] for first in range(0, len(seeds), size)):
            drawn = self._compiled(
                self.model.params, np.resize(batch, size), times, path, solver, from_noise
            )
            images.append(to_uint8(drawn)[: len(batch)])
        return np.concatenate(images)


def cells(
    network: Network, arguments: argparse.Namespace
) -> Iterator[tuple[schedules.Schedule, dict]]:
    """Returns what to draw: the path, and the columns of its row that say how."""
    for first, bnr, solver, grid in itertools.product(
        arguments.first_seeds, arguments.ratios or [None], arguments.solvers, arguments.grids
    ):
        path = network.path(bnr)
        for calls in arguments.calls if grid in ("edm", "spectral") else [0]:
            times = network.times(grid, path, solver, calls)
            steps, clean = len(times) - 1, float(times[-1]) == 0
            yield (
                path,
                {
                    "bnr": float(f"{float(path.bnr(path.t_max)):.4g}"),
                    "grid": grid,
                    "solver": solver,
                    "nfe": 2 * steps - clean if solver == "heun" else steps,
                    "seeds": [first, first + arguments.samples - 1],
                    "times": [float(f"{t:.5g}") for t in times],
                },
            )


def measure(
    checkpoint: str,
    config: ConfigDict,
    judge: comparison.Judge,
    arguments: argparse.Namespace,
    report: dict,
) -> None:
    """Adds a row for each cell to the report that has none, and writes it each time."""
    network = Network(checkpoint, config)
    info = network.model.info
    about = {
        "checkpoint": checkpoint,
        "step": info.get("step"),
        "weights": info["weights"],
        "weights_sha256": info["weights_sha256"][:16],
        "schedule": build.chosen_path(config),
    }

    def key(row):
        return json.dumps([row[name] for name in _KEY])

    known = {key(row) for row in report["rows"]}
    for path, cell in cells(network, arguments):
        row = about | cell
        if key(row) in known:
            continue
        known.add(key(row))  # heun at calls 4 and then 3 are one
        began = time.monotonic()
        images = network.draw(
            np.arange(row["seeds"][0], row["seeds"][1] + 1, dtype=np.uint32),
            np.asarray(row["times"], np.float32), path, row["solver"], row["grid"] == "edm",
        )  # fmt: skip
        row |= {"seconds": round(time.monotonic() - began, 2), judge.name: judge(images)}
        print(
            f"{checkpoint[-24:]:<25}{row['bnr']:<6}{row['grid']:<24} {row['solver']:<10}"
            f"{row['nfe']:>4} {row['seeds'][0]:>6} {row[judge.name]:>10.4f}"
            f"{row['seconds']:>8.1f}",
            flush=True,
        )
        report["rows"].append(row)
        partial = arguments.out / "nfe.json.partial"
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(arguments.out / "nfe.json")


@plots.styled
def draw(rows: list[dict], metric: str, title: str) -> Figure:
    """A panel a checkpoint and ratio; a colour a solver, a line a grid; the mean over seeds."""
    panels = list(dict.fromkeys((row["checkpoint"], row["bnr"]) for row in rows))
    figure = Figure(figsize=(max(6, 3.4 * len(panels)), 4.6), layout="constrained")
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(every, panels, strict=True):
        chosen = [row for row in rows if (row["checkpoint"], row["bnr"]) == panel]
        for solver, grid in dict.fromkeys((row["solver"], row["grid"]) for row in chosen):
            curve = {}
            for row in chosen:
                if (row["solver"], row["grid"]) == (solver, grid):
                    curve.setdefault(row["nfe"], []).append(row[metric])
            calls = sorted(curve)
            axes.loglog(
                calls,
                [np.mean(curve[number]) for number in calls],
                color=comparison.SOLVERS[solver],
                linestyle=_LINES[grids.index(grid) % len(_LINES)],
                marker=comparison.MARKERS[solver],
                label=f"{solver}, {grid}" if len(grids) > 1 else solver,
            )
        calls = sorted({row["nfe"] for row in chosen})
        # 17 and 18 would be printed over one another.
        calls = [n for i, n in enumerate(calls) if i == 0 or n > 1.15 * calls[i - 1]]
        axes.set_xticks(calls, [str(number) for number in calls])
        axes.xaxis.minorticks_off()
        plots.plain_log_ticks(axes.yaxis)
        axes.set_title(f"{title}\nBNR {panel[1]:g}")
        axes.set_xlabel("calls per image (NFE)")
    every[0].set_ylabel(f"{metric} (lower is better)")
    every[0].legend()
    return figure


def compare(arguments: argparse.Namespace) -> None:
    """Measures, prints, writes and draws.

    Raises:
      ValueError: no checkpoints there, or of different images.
    """
    configs = {each: configuration(each, arguments) for each in arguments.checkpoints}
    first = next(iter(configs.values()))
    for checkpoint, config in configs.items():
        if config.data != first.data:
            raise ValueError(f"{checkpoint} was trained on other data than the first checkpoint")
        if arguments.batch_size:
            config.sampling.batch_size = arguments.batch_size
    settings.enable_compilation_cache(default.get_config().compilation_cache_dir)
    arguments.out.mkdir(parents=True, exist_ok=True)
    judge = comparison.Judge(first, build.dataset(first), arguments.out, arguments.samples)
    results = arguments.out / "nfe.json"
    report = json.loads(results.read_text()) if results.exists() else {"rows": []}
    report |= {"machine": machine(), "samples": arguments.samples}
    print(f"network, ratio, grid, solver, NFE, first seed, {judge.name}, seconds")
    for checkpoint, config in configs.items():
        measure(checkpoint, config, judge, arguments, report)
    rows = [row for row in report["rows"] if judge.name in row]
    figure = draw(rows, judge.name, short_name(first.data.source))
    plots.save(arguments.out / "nfe.png", figure)
    print(f"wrote {results} and nfe.png")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="model folders, workdirs, checkpoints/STEP")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 9, 13, 18, 25, 35, 51])
    parser.add_argument("--solvers", nargs="+", choices=samplers.SOLVERS, default=samplers.SOLVERS)
    parser.add_argument("--grids", nargs="+", default=["edm"], help="edm, spectral, T,...,T")
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="constant ratios (default: its path)"
    )
    parser.add_argument("--first_seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--source", default="", help="data (default: the first checkpoint's)")
    parser.add_argument("--batch_size", type=int, default=0, help="(default: the checkpoint's)")
    parser.add_argument(
        "--noise_range", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="smallest and first noise level (default: the checkpoint's)",
    )  # fmt: skip
    parser.add_argument("--features", default="auto", help="as config.eval.features")
    parser.add_argument("--reference", default="", help="as config.eval.reference")
    parser.add_argument("--inception_weights", default="", help="safetensors file")
    arguments = parser.parse_args()
    if min(arguments.calls) < 1 or arguments.samples < 8:
        parser.error("--calls must be at least 1, --samples at least 8")
    try:
        compare(arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
