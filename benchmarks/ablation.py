"""What matters besides the ratio? Parameterizations, schedules and two experiments, each alone.

    python -m benchmarks.ablation --config=configs/digits.py --out=runs/ablation_digits
    python -m benchmarks.ablation --config=configs/cifar10.py:small --out=runs/ablation_cifar10 \
        --config.data.source=folder:DIR --config.data.resolution=16 \
        --config.schedule.constant_bnr.bnr=2 --variants=divide,clean,auto

Each variant changes what VARIANTS names of the configuration given (its ratio holds for those that
have one) and is trained on as many images, from the same seeds, on the same images in the same
order, as every other; then drawn from with the same seeds by each solver. Writes OUT/table.md,
OUT/summary.json, OUT/ablation.png and OUT/images after every training; start again to continue.

`cold` starts from blurred training images, which flatters it, and has no multistep solver.
"""

import copy
import json
import pathlib

from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import comparison
from benchmarks.bnr_sweep import define_flags
from benchmarks.train_step import machine, run
from warm_diffusion.app import build, plots
from warm_diffusion.app.plots import style
from warm_diffusion.data.sources import short_name

VARIANTS = {
    # the paper's table 5
    "divide": {},
    "clean": {"denoiser.parameterization": "clean"},
    "score": {"denoiser.parameterization": "score"},
    # schedules (the paper's table 4, and ours)
    "hot": {"schedule.name": "hot"},
    "auto": {"schedule.constant_bnr.bnr": "auto"},
    "spectral": {"schedule.name": "spectral"},
    "any_bnr": {"schedule.name": "any_bnr"},
    "blurring_diffusion": {"schedule.name": "blurring_diffusion", "sampling.rho": 1.0},
    "cold": {"schedule.name": "cold"},
}
FLAGS = flags.FLAGS


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The configuration with what the variant changes."""
    if name not in VARIANTS:
        raise ValueError(f"--variants must be of {', '.join(VARIANTS)}; got {name!r}")
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(VARIANTS[name])
    return build.realised(config)


def ablate(options) -> None:
    """Trains and evaluates what is not there yet."""
    configs = {name: variant(options.config, name) for name in options.variants}
    begun = comparison.begin(options)
    out, timer, solvers, results = begun.out, begun.timer, begun.solvers, begun.results
    data, judge, budget = begun.data, begun.judge, begun.budget
    seeds = [int(seed) for seed in options.seeds]
    data_name = short_name(options.config.data.source)
    ratio = options.config.schedule.constant_bnr.bnr
    title = f"{data_name}, blur-to-noise ratio {ratio} where a variant has one"
    # A variant's seeds follow one another: its programs are compiled once and then dropped.
    for name, each in configs.items():
        trainer, by_solver, compiled = None, {}, set()
        for seed in seeds:
            if results.has(variant=name, seed=seed):
                continue
            if not budget.allows_another():
                print(f"{options.minutes:g} minutes are over: the same command continues")
                break
            with budget.training():
                if trainer is None:
                    trainer = comparison.Trainer(each, data, timer)
                    by_solver = trainer.path_samplers(solvers)
                trained = trainer.train(seed)
                key = {"variant": name, "seed": seed}
                rows = [
                    {**key, "bnr": each.schedule.constant_bnr.bnr, **row, **trained.facts}
                    for row in comparison.evaluate(
                        trained, by_solver, judge, data, timer, options.samples, compiled,
                        out / "images" / f"{name}_{seed}",
                    )
                ]  # fmt: skip
            results.add(rows)
            for row in rows:
                distances = ", ".join(f"{metric} {row[metric]:.4f}" for metric in judge.names)
                print(
                    f"{name} seed {seed} {row['solver']} NFE {row['nfe']}: {distances} "
                    f"(trained {row['training_seconds']:.0f} s)",
                    flush=True,
                )
            write(out, results.rows, judge.names, timer, title)
    write(out, results.rows, judge.names, timer, title)
    if results.rows:
        print((out / "table.md").read_text())
    print(timer.report())


def summarise(rows: list[dict], names: tuple[str, ...]) -> list[dict]:
    """One entry a metric, variant and solver: mean and standard deviation over seeds."""
    groups, found = {}, []
    for row in rows:
        groups.setdefault((row["variant"], row["solver"], row["nfe"]), []).append(row)
    order = sorted(groups, key=lambda key: (list(VARIANTS).index(key[0]), key[2]))
    for metric in names:
        for variant, solver, nfe in order:
            mean, deviation, count = comparison.mean_and_deviation(
                groups[variant, solver, nfe], metric
            )
            found.append(
                {"metric": metric, "variant": variant, "solver": solver, "nfe": nfe, "mean": mean,
                 "std": deviation, "seeds": count}
            )  # fmt: skip
    return found


def _table(summary: list[dict]) -> str:
    """A table a metric: a row a variant, a column a solver."""
    solvers = sorted({(e["solver"], e["nfe"]) for e in summary}, key=lambda s: s[1])
    cells = {
        (e["metric"], e["variant"], e["solver"], e["nfe"]): (
            f"{e['mean']:.4f} ± {e['std']:.4f} ({e['seeds']})"
        )
        for e in summary
    }
    lines = []
    for metric in dict.fromkeys(entry["metric"] for entry in summary):
        lines += [f"`{metric}`, mean ± standard deviation over seeds (number of seeds)", ""]
        lines += ["| variant | " + " | ".join(f"{s}, NFE {n}" for s, n in solvers) + " |"]
        lines += ["| --- " * (len(solvers) + 1) + "|"]
        for name in dict.fromkeys(entry["variant"] for entry in summary):
            row = [cells.get((metric, name, *solver), "-") for solver in solvers]
            lines.append(f"| {name} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def write(out: pathlib.Path, rows: list[dict], names: tuple[str, ...], timer, title: str) -> None:
    """table.md, summary.json and ablation.png of all rows so far."""
    if not rows:
        return
    summary = summarise(rows, names)
    (out / "table.md").write_text(_table(summary))
    report = {
        "images_seen_by_each_network": rows[0]["images_seen"],
        "machine": machine(),
        "this_session": timer.report(),
        "variants": {entry["variant"]: VARIANTS[entry["variant"]] for entry in summary},
        "summary": summary,
    }
    (out / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    style.save(out / "ablation.png", draw(summary, title))


@style.styled
def draw(summary: list[dict], title: str) -> Figure:
    """A row a variant, a colour a solver; of the first metric in the summary."""
    metric = summary[0]["metric"]
    summary = [entry for entry in summary if entry["metric"] == metric]
    solvers = sorted({(e["solver"], e["nfe"]) for e in summary}, key=lambda s: s[1])
    names = list(dict.fromkeys(entry["variant"] for entry in summary))
    figure = Figure(figsize=(8, 1.6 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (solver, nfe) in enumerate(solvers):
        chosen = [e for e in summary if (e["solver"], e["nfe"]) == (solver, nfe)]
        most = max(calls for each, calls in solvers if each == solver)
        axes.errorbar(
            [e["mean"] for e in chosen],
            [names.index(e["variant"]) + 0.15 * (i - (len(solvers) - 1) / 2) for e in chosen],
            xerr=[e["std"] for e in chosen], linestyle="", capsize=3, color=style.SOLVERS[solver],
            marker=style.MARKERS[solver] if nfe == most else "v", label=f"{solver}, NFE {nfe}",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plots.plain_log_ticks(axes.xaxis)
    axes.set_xlabel(f"{metric} (lower is better)")
    axes.set_title(title)
    axes.legend()
    return figure


if __name__ == "__main__":
    define_flags("configs/digits.py")
    flags.DEFINE_list("variants", list(VARIANTS), "Which.")
    run(lambda argv: ablate(FLAGS))
