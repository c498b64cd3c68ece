"""What matters besides the ratio? Parameterizations and schedules, each changed alone.

    python -m benchmarks.ablation --config=configs/digits.py --out=runs/ablation_digits
    python -m benchmarks.ablation --config=configs/cifar10.py:small --out=runs/ablation_cifar10 \
        --config.data.source=folder:DIR --config.data.resolution=16 \
        --config.schedule.constant_bnr.bnr=2 --variants=divide,clean,auto

Each variant changes what VARIANTS names of the configuration given (its ratio holds for those that
have one) and is trained on as many images, from the same seeds, on the same images in the same
order, as every other; then the same seeds are drawn by each solver. Writes OUT/table.md,
OUT/summary.json, OUT/summary.png and OUT/images after every training; start again to continue.

`cold` starts from blurred training images, which flatters it, and has no multistep solver.
"""

from absl import flags
from matplotlib.figure import Figure

from benchmarks import comparison
from benchmarks.train_step import run
from warm_diffusion.app import build, plots
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
GROUP = ("variant",)
FLAGS = flags.FLAGS


def ablate(options) -> None:
    """Trains and evaluates what is not there yet."""
    variants = []
    for name in options.variants:
        if name not in VARIANTS:
            raise ValueError(f"--variants must be some of {', '.join(VARIANTS)}; got {name!r}")
        config = options.config.copy_and_resolve_references()
        config.update_from_flattened_dict(VARIANTS[name])
        variants.append(comparison.Variant({"variant": name}, build.realised(config)))
    ratio = options.config.schedule.constant_bnr.bnr
    title = f"{short_name(options.config.data.source)}, BNR {ratio} where a variant has one"
    comparison.compare(
        options, variants, GROUP, lambda entries, metric: draw(entries, metric, title)
    )


@plots.styled
def draw(entries: list[dict], metric: str, title: str) -> Figure:
    """A row per variant, a colour per solver."""
    solvers = comparison.solvers_of(entries)
    names = list(dict.fromkeys(entry["variant"] for entry in entries))
    figure = Figure(figsize=(6.5, 1.9 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, (solver, nfe) in enumerate(solvers):
        chosen = [e for e in entries if (e["solver"], e["nfe"]) == (solver, nfe)]
        axes.errorbar(
            [e[metric] for e in chosen],
            [names.index(e["variant"]) + 0.15 * (i - (len(solvers) - 1) / 2) for e in chosen],
            xerr=[e[f"{metric}_std"] for e in chosen], linestyle="",
            label=f"{solver}, NFE {nfe}", **comparison.look(solvers, solver, nfe),
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plots.plain_log_ticks(axes.xaxis)
    axes.set_xlabel(f"{metric} (lower is better)")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1, handletextpad=0.4)
    return figure


if __name__ == "__main__":
    comparison.define_flags("configs/digits.py")
    flags.DEFINE_list("variants", list(VARIANTS), "Which.")
    run(lambda argv: ablate(FLAGS))
