"""Which blur-to-noise ratio is best? One network for each ratio, and one for all of them.

    python -m benchmarks.bnr_sweep --config=configs/digits.py --out=runs/sweep_digits
    python -m benchmarks.bnr_sweep --config=configs/cifar10.py:small --out=runs/sweep_cifar10 \
        --config.data.source=folder:DIR --config.data.resolution=16 --config.training.num_steps=4000

Trains at BNR 0, 0.1, 0.3, 0.5, 0.65, 1, 2 and 10 from equal seeds, on the same images in the same
order, and the any_bnr network likewise; draws the same seeds with each solver (heun:5 is 9 network
calls, multistep:18 18, heun:18 35) and writes OUT/table.md, OUT/summary.json, OUT/summary.png and
OUT/images after every training. The any_bnr network is sampled at --any_ratios; `bnr` of a row is
the ratio sampled along. Start again to continue. For a GPU see `card.py`.
"""

from absl import flags
from matplotlib.figure import Figure

from benchmarks import comparison
from benchmarks.train_step import run, variant
from warm_diffusion.app import plots
from warm_diffusion.data.sources import short_name

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.65, 1.0, 2.0, 10.0)
FLAGS = flags.FLAGS


def sweep(options) -> None:
    """Trains and evaluates what is not there yet."""
    config, variants = options.config, []
    for ratio in map(float, options.ratios):
        changed = variant(config, schedule__name="constant_bnr", schedule__constant_bnr__bnr=ratio)
        variants.append(comparison.Variant({"network": "fixed", "bnr": ratio}, changed))
    if options.any_ratios:
        changed = variant(config, schedule__name="any_bnr")
        ratios = tuple(map(float, options.any_ratios))
        variants.append(comparison.Variant({"network": "any"}, changed, ratios))
    title = short_name(config.data.source)
    comparison.compare(options, variants, lambda entries, metric: draw(entries, metric, title))


@plots.styled
def draw(entries: list[dict], metric: str, title: str) -> Figure:
    """Distance against ratio: a network for each, and one for all."""
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes, solvers = figure.subplots(), comparison.solvers_of(entries)
    entries = sorted(entries, key=lambda entry: entry["bnr"])
    for solver, nfe in solvers:
        for network, line in (("fixed", "-"), ("any", "--")):
            chosen = [
                e
                for e in entries
                if (e["network"], e["solver"], e["nfe"]) == (network, solver, nfe)
            ]
            if not chosen:
                continue
            axes.errorbar(
                [e["bnr"] for e in chosen], [e[metric] for e in chosen],
                yerr=[e[f"{metric}_std"] for e in chosen], linestyle=line,
                label=f"{solver}, {nfe} calls" if network == "fixed" else None,
                **comparison.look(solvers, solver, nfe),
            )  # fmt: skip
    ratios = sorted({e["bnr"] for e in entries})
    axes.set_xscale("function", functions=(lambda x: x / (1 + x), lambda y: y / (1 - y)))
    axes.set_xlim(-0.04, 16)
    # Neighbours stand at two heights: 0.5 and 0.65 would be printed over one another.
    axes.set_xticks(ratios, ["\n" * (i % 2) + f"{ratio:g}" for i, ratio in enumerate(ratios)])
    for label, ratio in zip(axes.get_xticklabels(), ratios, strict=True):
        label.set(color=plots.ratio_colour(ratio), fontweight="bold")
    axes.set_yscale("log")
    plots.plain_log_ticks(axes.yaxis)
    axes.set_xlabel("blur-to-noise ratio: 0 is hot (EDM), high is cold")
    axes.set_ylabel(f"{metric} (lower is better)")
    axes.grid(axis="y", which="both")
    axes.set_title(title)
    if any(e["network"] == "any" for e in entries):
        axes.plot([], [], "--", color="grey", label="dashed: one network for all ratios")
    axes.legend(handlelength=4)
    return figure


if __name__ == "__main__":
    comparison.define_flags()
    flags.DEFINE_list("ratios", [f"{ratio:g}" for ratio in RATIOS], "A network for each.")
    flags.DEFINE_list(
        "any_ratios", ["0", "0.5", "1", "2"], "Ratios to sample the network for all at; or none."
    )
    run(lambda argv: sweep(FLAGS))
