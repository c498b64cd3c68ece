"""How good are samples for how many network calls? Distance against NFE for each solver.

    python -m benchmarks.nfe_curve runs/digits runs/digits_hot --out=runs/nfe
    python -m benchmarks.nfe_curve runs/digits --out=runs/nfe_narrow --noise_range 0.03 20

Draws the same seeds from every network (model folder, training workdir, its checkpoints/STEP) with
euler, heun and multistep at several numbers of calls, compares them with the training data, by the
features of a classifier trained on it (judge.py; kept in OUT) or by --features. Writes OUT/nfe.json
and OUT/nfe.png. A solver's number of calls is what it really needs: heun makes 2 n - 1 in n steps,
so of an even number one less.
"""

import argparse
import json
import pathlib
import time

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from ml_collections import ConfigDict

from benchmarks.judge import Judge
from benchmarks.train_step import machine
from configs import saved
from warm_diffusion import devices, factory, pretrained, samplers, settings
from warm_diffusion.data import Dataset

_COLOURS = {"euler": "#d95f02", "heun": "#1b9e77", "multistep": "#7570b3"}
_LINES = ("-", "--", ":", "-.")


def num_steps(solver: str, calls: int) -> int:
    """Steps that make at most this many network calls."""
    return (calls + 1) // 2 if solver == "heun" else calls


def configuration(checkpoint: str, arguments: argparse.Namespace) -> ConfigDict:
    """The checkpoint's, with the noise levels and Inception's weights asked for.

    Raises:
      ValueError: no checkpoint there, or a range that its path cannot have.
    """
    config = saved.get_config(str(pretrained.split_checkpoint(checkpoint)[0] / "config.json"))
    config.eval.inception_weights = arguments.inception_weights or config.eval.inception_weights
    if arguments.noise_range:
        config.schedule.beta_min, config.schedule.beta_max = arguments.noise_range
        path = factory.sampling_schedule(config)
        if not np.allclose([path.beta(path.t_min), path.beta(path.t_max)], arguments.noise_range):
            raise ValueError(
                f"{checkpoint}: schedule {config.schedule.name} has noise levels of its own; leave "
                "--noise_range out"
            )
    return config


def measure(
    checkpoint: str, config: ConfigDict, data: Dataset, judge: Judge, arguments: argparse.Namespace
) -> list[dict]:
    """One row a solver and number of calls."""
    mesh, rows = devices.make_mesh(), []
    model = pretrained.load(checkpoint, config.sampling.ema)
    params = devices.put_replicated(model.params, mesh)
    for solver in arguments.solvers:
        for calls in arguments.calls:
            config.sampling.solver, config.sampling.num_steps = solver, num_steps(solver, calls)
            sampler = factory.sampler(config, model.architecture, mesh)
            if rows and (rows[-1]["solver"], rows[-1]["nfe"]) == (solver, sampler.num_calls):
                continue  # heun at calls 4 and then 3
            began = time.monotonic()
            batches = sampler.generate(params, range(arguments.samples), data.images)
            images = np.concatenate(list(batches))
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "step": model.info.get("step"),
                    "weights": model.info["weights"],
                    "schedule": config.schedule.name,
                    "bnr": config.schedule.bnr,
                    "noise_range": [config.schedule.beta_min, config.schedule.beta_max],
                    "solver": solver,
                    "num_steps": config.sampling.num_steps,
                    "nfe": sampler.num_calls,
                    "seconds": round(time.monotonic() - began, 2),
                    **judge(images),
                }
            )
            row = rows[-1]
            print(
                f"{checkpoint:<32} {solver:<10}{row['nfe']:>5}{row[judge.names[0]]:>12.4f}"
                f"{row['seconds']:>9.1f}",
                flush=True,
            )
    return rows


def draw(rows: list[dict], metric: str, path: pathlib.Path) -> None:
    """A curve a checkpoint and solver."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, checkpoint in enumerate(dict.fromkeys(row["checkpoint"] for row in rows)):
        for solver in dict.fromkeys(row["solver"] for row in rows):
            curve = [r for r in rows if (r["checkpoint"], r["solver"]) == (checkpoint, solver)]
            curve.sort(key=lambda row: row["nfe"])
            axes.loglog(
                [row["nfe"] for row in curve],
                [row[metric] for row in curve],
                color=_COLOURS[solver],
                linestyle=_LINES[index % len(_LINES)],
                marker="o",
                markersize=4,
                label=f"{solver}, {pathlib.Path(checkpoint).name} (BNR {curve[0]['bnr']})",
            )
    calls = sorted({row["nfe"] for row in rows})
    axes.set_xticks(calls, [str(number) for number in calls], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_xlabel("network calls an image (NFE)")
    axes.set_ylabel(metric)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


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
    settings.enable_compilation_cache(first.compilation_cache_dir)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = factory.dataset(first)
    judge = Judge(first, data, arguments.out, arguments)
    print(f"{'checkpoint':<32} {'solver':<10}{'NFE':>5}  {judge.names[0]}, seconds")
    rows = []
    for checkpoint, config in configs.items():
        rows += measure(checkpoint, config, data, judge, arguments)
        report = {"machine": machine(), "samples": arguments.samples, "rows": rows}
        (arguments.out / "nfe.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(rows, judge.names[0], arguments.out / "nfe.png")
    print(f"wrote {arguments.out}/nfe.json and nfe.png")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", nargs="+", help="training workdirs or their checkpoints/STEP"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 9, 13, 18, 25, 35, 51])
    parser.add_argument("--solvers", nargs="+", choices=samplers.SOLVERS, default=samplers.SOLVERS)
    parser.add_argument(
        "--noise_range", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="smallest and first noise level (default: the checkpoint's)",
    )  # fmt: skip
    parser.add_argument(
        "--features", default="classifier", help="classifier, pixels, inception or MODULE:FUNCTION"
    )
    parser.add_argument("--classifier_steps", type=int, default=1500)
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
