"""What matters besides the ratio? Parameterizations, schedules and two experiments, each alone.

    python -m benchmarks.ablation --config=configs/digits.py --out=runs/ablation_digits
    python -m benchmarks.ablation --config=configs/cifar10.py:small --out=runs/ablation_cifar10 \
        --config.data.source=folder:DIR --config.data.resolution=16 --config.schedule.bnr=2 \
        --variants=divide,flow,flow_floor,spectral_preconditioning

Each variant changes what VARIANTS names of the configuration given (its ratio holds for those that
have one) and is trained on as many images, from the same seeds, on the same images in the same
order, as every other; then drawn from with the same seeds by each solver. Writes OUT/table.md,
OUT/summary.json and OUT/ablation.png after every training anew; start again to continue.

`cold` starts from blurred training images, which flatters it, and has no multistep solver.
"""

import copy
import json
import pathlib

from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks import comparison
from benchmarks.bnr_sweep import COLOURS, define_flags
from benchmarks.train_step import machine, run
from warm_diffusion import factory

VARIANTS = {
    # the paper's table 5
    "divide": {},
    "clean": {"model.parameterization": "clean"},
    "score": {"model.parameterization": "score"},
    # schedules (the paper's table 4, and ours)
    "hot": {"schedule.name": "hot"},
    "auto": {"schedule.bnr": "auto"},
    "spectral": {"schedule.name": "spectral"},
    "any_bnr": {"schedule.name": "any_bnr"},
    "blurring_diffusion": {"schedule.name": "blurring_diffusion", "sampling.rho": 1.0},
    "cold": {"schedule.name": "cold"},
    # experiments
    "flow": {"loss.residual_weight": "flow"},
    "flow_floor": {"loss.residual_weight": "flow", "loss.residual_floor": 0.05},
    "spectral_preconditioning": {"model.preconditioning": "spectral"},
}
FLAGS = flags.FLAGS


def variant(config: ConfigDict, name: str) -> ConfigDict:
    """The configuration with what the variant changes."""
    if name not in VARIANTS:
        raise ValueError(f"--variants must be of {', '.join(VARIANTS)}; got {name!r}")
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(VARIANTS[name])
    config.schedule.bnr = factory.bnr(config)
    return config


def ablate(options) -> None:
    """Trains and evaluates what is not there yet."""
    configs = {name: variant(options.config, name) for name in options.variants}
    begun = comparison.begin(options)
    out, timer, solvers, results = begun.out, begun.timer, begun.solvers, begun.results
    data, judge, budget = begun.data, begun.judge, begun.budget
    seeds = [int(seed) for seed in options.seeds]
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
                    {**key, "bnr": each.schedule.bnr, **row, **trained.facts}
                    for row in comparison.evaluate(
                        trained, by_solver, judge, data, timer, options.samples, compiled
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
            write(out, results.rows, judge.names, timer)
    write(out, results.rows, judge.names, timer)
    print((out / "table.md").read_text())
    print(timer.report())


def write(out: pathlib.Path, rows: list[dict], names: tuple[str, ...], timer) -> None:
    """table.md, summary.json and ablation.png of all rows so far."""
    if not rows:
        return
    solvers = sorted({(row["solver"], row["nfe"]) for row in rows}, key=lambda s: s[1])
    found = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    summary, lines = [], []
    for metric in names:
        lines += [f"`{metric}`, mean ± standard deviation over seeds (number of seeds)", ""]
        lines += ["| variant | " + " | ".join(f"{s}, NFE {n}" for s, n in solvers) + " |"]
        lines += ["| --- " * (len(solvers) + 1) + "|"]
        for name in found:
            cells = []
            for solver, nfe in solvers:
                group = [
                    row for row in rows
                    if (row["variant"], row["solver"], row["nfe"]) == (name, solver, nfe)
                ]  # fmt: skip
                if not group:
                    cells.append("-")
                    continue
                mean, deviation, count = comparison.mean_and_deviation(group, metric)
                cells.append(f"{mean:.4f} ± {deviation:.4f} ({count})")
                summary.append(
                    {"metric": metric, "variant": name, "solver": solver, "nfe": nfe, "mean": mean,
                     "std": deviation, "seeds": count}
                )  # fmt: skip
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    (out / "table.md").write_text("\n".join(lines))
    report = {
        "images_seen_by_each_network": rows[0]["images_seen"],
        "machine": machine(),
        "this_session": timer.report(),
        "variants": {name: VARIANTS[name] for name in found},
        "summary": summary,
    }
    (out / "summary.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(out / "ablation.png", summary, names[0], found, solvers)


def _draw(path: pathlib.Path, summary: list[dict], metric: str, names: list[str], solvers) -> None:
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, ((solver, nfe), colour) in enumerate(zip(solvers, COLOURS, strict=False)):
        chosen = [
            e for e in summary if (e["metric"], e["solver"], e["nfe"]) == (metric, solver, nfe)
        ]
        axes.errorbar(
            [e["mean"] for e in chosen],
            [names.index(e["variant"]) + 0.15 * (i - (len(solvers) - 1) / 2) for e in chosen],
            xerr=[e["std"] for e in chosen], fmt="o", capsize=3, color=colour,
            label=f"{solver}, NFE {nfe}",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(metric)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    define_flags("configs/digits.py")
    flags.DEFINE_list("variants", list(VARIANTS), "Which.")
    run(lambda argv: ablate(FLAGS))
