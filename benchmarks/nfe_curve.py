"""How good are samples for how many network calls? Distance against NFE for each solver.

    python -m benchmarks.nfe_curve runs/digits runs/digits_hot --out nfe_curve

Draws the same seeds from every checkpoint (training workdir or its checkpoints/STEP) with euler,
heun and multistep at several numbers of calls, and compares them with the checkpoint's own training
data by the features of its configuration, or --features. Writes a table, OUT.json and OUT.png. A
solver's number of calls is what it really needs: heun makes 2 n - 1 in n steps, so of an even
number one less.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import saved
from warm_diffusion import factory, samplers, settings
from warm_diffusion.evaluation import features, metrics
from warm_diffusion.jobs import fid_stats
from warm_diffusion.jobs.sample import generate
from warm_diffusion.jobs.trained import load_trained, split_checkpoint
from warm_diffusion.training import devices

_COLOURS = {"euler": "#d95f02", "heun": "#1b9e77", "multistep": "#7570b3"}
_LINES = ("-", "--", ":", "-.")


def num_steps(solver: str, calls: int) -> int:
    """Steps that make at most this many network calls."""
    return (calls + 1) // 2 if solver == "heun" else calls


def measure(checkpoint: str, arguments: argparse.Namespace) -> list[dict]:
    """One row a solver and number of calls."""
    workdir, _ = split_checkpoint(checkpoint)
    config = saved.get_config(str(workdir / "config.json"))
    settings.enable_compilation_cache(config.compilation_cache_dir)
    for key in ("features", "inception_weights"):
        config.eval[key] = getattr(arguments, key) or config.eval[key]
    mesh = devices.make_mesh()
    trained = load_trained(config, checkpoint, mesh)
    data, extract = factory.dataset(config), fid_stats.make_extractor(config)
    reference = fid_stats.collect(data, extract, fid_stats.describe(config, data, extract))
    split = reference.provenance["split"]
    name = metrics.metric_name("fd", extract.name, arguments.samples, split)
    rows = []
    for solver in arguments.solvers:
        for calls in arguments.calls:
            config.sampling.solver, config.sampling.num_steps = solver, num_steps(solver, calls)
            sampler = factory.sampler(
                config, trained.network, trained.image_shape, config.sampling.batch_size, mesh
            )
            if rows and rows[-1]["network_calls"] == sampler.num_calls:
                continue  # heun at calls 4 and then 3
            batches = generate(sampler, trained.params, range(arguments.samples), data)
            began = time.monotonic()
            drawn = features.concatenate([extract(batch) for batch in batches])
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "step": trained.step,
                    "weights": trained.weights,
                    "schedule": config.schedule.name,
                    "bnr": config.schedule.bnr,
                    "solver": solver,
                    "num_steps": config.sampling.num_steps,
                    "network_calls": sampler.num_calls,
                    "seconds": round(time.monotonic() - began, 2),
                    "metric": name,
                    "distance": metrics.compare(drawn, reference)[name],
                }
            )
            row = rows[-1]
            print(
                f"{checkpoint:<32} {solver:<10}{row['network_calls']:>5}{row['distance']:>12.4f}"
                f"{row['seconds']:>9.1f}",
                flush=True,
            )
    return rows


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """A curve a checkpoint and solver."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, checkpoint in enumerate(dict.fromkeys(row["checkpoint"] for row in rows)):
        for solver in dict.fromkeys(row["solver"] for row in rows):
            curve = [r for r in rows if (r["checkpoint"], r["solver"]) == (checkpoint, solver)]
            curve.sort(key=lambda row: row["network_calls"])
            axes.loglog(
                [row["network_calls"] for row in curve],
                [row["distance"] for row in curve],
                color=_COLOURS[solver],
                linestyle=_LINES[index % len(_LINES)],
                marker="o",
                markersize=4,
                label=f"{solver}, {pathlib.Path(checkpoint).name} (BNR {curve[0]['bnr']})",
            )
    calls = sorted({row["network_calls"] for row in rows})
    axes.set_xticks(calls, [str(number) for number in calls], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("network calls an image (NFE)")
    axes.set_ylabel(rows[0]["metric"])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", nargs="+", help="training workdirs or their checkpoints/STEP"
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("nfe_curve"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 9, 13, 17, 25, 35, 51])
    parser.add_argument("--solvers", nargs="+", choices=samplers.SOLVERS, default=samplers.SOLVERS)
    parser.add_argument("--features", default="", help="pixels, inception or MODULE:FUNCTION")
    parser.add_argument("--inception-weights", default="", help="safetensors file")
    arguments = parser.parse_args()
    if min(arguments.calls) < 1 or arguments.samples < 2:
        parser.error("--calls must be at least 1, --samples at least 2")
    print(f"{'checkpoint':<32} {'solver':<10}{'NFE':>5}{'distance':>12}{'seconds':>9}")
    rows = []
    try:
        for checkpoint in arguments.checkpoints:
            rows += measure(checkpoint, arguments)
    except ValueError as error:
        parser.error(str(error))
    report = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "numpy": np.__version__,
        "samples": arguments.samples,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files = [arguments.out.with_name(arguments.out.name + end) for end in (".json", ".png")]
    files[0].write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, files[1])
    print(f"wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    main()
