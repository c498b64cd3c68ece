"""Which blur-to-noise ratio is best? One network for each ratio, and one for all of them.

    python -m benchmarks.bnr_sweep --config=configs/digits.py --out=runs/sweep_digits
    python -m benchmarks.bnr_sweep --config=configs/cifar10.py:small --out=runs/sweep_cifar10 \
        --config.data.source=folder:DIR --config.data.resolution=16 --config.training.num_steps=4000
    python -m benchmarks.bnr_sweep --config=configs/cifar10.py --out=runs/sweep_gpu --minutes=25 \
        --config.data.source=folder:DIR --config.model.dtype=bfloat16 \
        --config.model.model_channels=64 --config.training.num_steps=3000

trains at BNR 0, 0.1, 0.3, 0.5, 0.65, 1, 2 and 10 from equal seeds, on the same images in the same
order, and the any_bnr network likewise; draws the same seeds with each solver (heun:5 is 9 network
calls, multistep:18 18, heun:18 35) and writes OUT/table.md, OUT/summary.json, OUT/sweep.png and
OUT/images after every training. The any_bnr network is drawn from at --any_ratios. Start again to
continue.
"""

import json
import pathlib

from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

from benchmarks import comparison
from benchmarks.train_step import machine, run
from warm_diffusion import schedules
from warm_diffusion.app import plots
from warm_diffusion.app.plots import style
from warm_diffusion.data.sources import short_name

# arXiv 2511.16904: CIFAR-10, 55.7 M parameters, FID of 50,000 samples at NFE 35, best of three.
PAPER = {0.0: 1.97, 0.1: 1.97, 0.3: 1.90, 0.5: 1.85, 0.65: 1.91, 1.0: 2.01, 2.0: 2.57, 10.0: 11.97}
FLAGS = flags.FLAGS


def sweep(options) -> None:
    """Trains and evaluates what is not there yet."""
    any_ratios = [float(ratio) for ratio in options.any_ratios]
    begun = comparison.begin(options, any_ratios=any_ratios)
    config, out, timer, solvers = begun.config, begun.out, begun.timer, begun.solvers
    results, data, judge, budget = begun.results, begun.data, begun.judge, begun.budget
    levels = config.schedule.hot.to_dict()  # of noise, which both kinds of path have
    ranges = {key: config.schedule.any_bnr[key] for key in ("bnr_range", "hot_share")}
    paths = {
        "fixed": lambda ratio: schedules.constant_bnr(ratio, **levels),
        "any": lambda ratio: schedules.any_bnr(0.5, **ranges, **levels),
    }
    seeds, ratios = ([kind(text) for text in texts] for kind, texts in (
        (int, options.seeds), (float, options.ratios),
    ))  # fmt: skip
    trainers, drawer, compiled = {}, None, set()
    title = short_name(config.data.source)
    cells = [("fixed", seed, ratio) for seed in seeds for ratio in ratios]
    cells += [("any", seed, None) for seed in seeds] if any_ratios else []
    for network, seed, ratio in cells:
        key = {"network": network, "seed": seed} | ({} if ratio is None else {"bnr": ratio})
        if results.has(**key):
            continue
        if not budget.allows_another():
            print(f"{options.minutes:g} minutes are over: the same command continues")
            break
        with budget.training():
            if network not in trainers:
                trainers[network] = comparison.Trainer(config, data, timer, paths[network])
                drawer = drawer or comparison.RatioSamplers(trainers[network], solvers)
            trained = trainers[network].train(seed, ratio or 0.0)
            rows = [
                {"network": network, "bnr": at, "seed": seed, **row, **trained.facts}
                for at in ([ratio] if network == "fixed" else any_ratios)
                for row in comparison.evaluate(
                    trained,
                    drawer.at(at),
                    judge,
                    data,
                    timer,
                    options.samples,
                    compiled,
                    out / "images" / f"{network}_{at:g}_{seed}",
                )
            ]
        results.add(rows)
        for row in rows:
            distances = ", ".join(f"{name} {row[name]:.4f}" for name in judge.names)
            print(
                f"{network} BNR {row['bnr']:g} seed {seed} {row['solver']} NFE {row['nfe']}: "
                f"{distances} (trained {row['training_seconds']:.0f} s)", flush=True,
            )  # fmt: skip
        write(out, results.rows, judge.names, timer, title)
    write(out, results.rows, judge.names, timer, title)
    if results.rows:
        print((out / "table.md").read_text())
    print(timer.report())


def summarise(rows: list[dict], names: tuple[str, ...]) -> list[dict]:
    """One entry a network, ratio and solver: mean and standard deviation over seeds."""
    groups = {}
    for row in rows:
        key = (row["network"], row["bnr"], row["solver"], row["nfe"])
        groups.setdefault(key, []).append(row)
    found = []
    order = sorted(groups.items(), key=lambda item: (item[0][0] != "fixed", item[0]))
    for (network, bnr, solver, nfe), group in order:
        entry = {"network": network, "bnr": bnr, "solver": solver, "nfe": nfe}
        for name in names:
            mean, deviation, count = comparison.mean_and_deviation(group, name)
            entry |= {name: mean, f"{name}_std": deviation, "seeds": count}
        found.append(entry)
    return found


def write(out: pathlib.Path, rows: list[dict], names: tuple[str, ...], timer, title: str) -> None:
    """table.md, summary.json and sweep.png of all rows so far."""
    if not rows:
        return
    entries = summarise(rows, names)
    facts = {
        "images_seen_by_each_network": rows[0]["images_seen"],
        "training_seconds": [row["training_seconds"] for row in rows],
        "machine": machine(),
        "this_session": timer.report(),
    }
    text = json.dumps({**facts, "summary": entries, "paper_fid": PAPER}, indent=2)
    (out / "summary.json").write_text(text + "\n")
    solvers = sorted({(entry["solver"], entry["nfe"]) for entry in entries}, key=lambda s: s[1])
    lines = []
    for name in names:
        lines += [f"`{name}`, mean ± standard deviation over seeds (number of seeds)", ""]
        lines += [
            "| network | BNR | " + " | ".join(f"{s}, NFE {n}" for s, n in solvers)
            + " | paper: FID, NFE 35 |",
            "| --- " * (len(solvers) + 3) + "|",
        ]  # fmt: skip
        for network, bnr in dict.fromkeys((e["network"], e["bnr"]) for e in entries):
            cells = []
            for solver in solvers:
                match = [
                    e for e in entries
                    if (e["network"], e["bnr"], (e["solver"], e["nfe"])) == (network, bnr, solver)
                ]  # fmt: skip
                cells += [
                    f"{e[name]:.4f} ± {e[f'{name}_std']:.4f} ({e['seeds']})" for e in match
                ] or ["-"]
            paper = PAPER.get(bnr, "-") if network == "fixed" else "-"
            lines.append(f"| {network} | {bnr:g} | " + " | ".join(cells) + f" | {paper} |")
        lines.append("")
    (out / "table.md").write_text("\n".join(lines))
    style.save(out / "sweep.png", draw(entries, names[0], title))


@style.styled
def draw(entries: list[dict], name: str, title: str) -> Figure:
    """Distance against ratio: a network for each, and beside them one for all."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    solvers = sorted({(entry["solver"], entry["nfe"]) for entry in entries}, key=lambda s: s[1])

    def line(axes, network, solver, **look):
        chosen = [
            e for e in entries if e["network"] == network and (e["solver"], e["nfe"]) == solver
        ]
        most = max(nfe for each, nfe in solvers if each == solver[0])
        if chosen:
            axes.errorbar(
                [e["bnr"] for e in chosen], [e[name] for e in chosen],
                yerr=[e[f"{name}_std"] for e in chosen], capsize=3,
                color=style.SOLVERS[solver[0]],
                marker=style.MARKERS[solver[0]] if solver[1] == most else "v", **look,
            )  # fmt: skip

    for solver in solvers:
        # Colours and markers are explained on the left, lines on the right, once.
        kinds = ("a network for each", "one for all") if solver == solvers[-1] else (None, None)
        line(left, "fixed", solver, label=f"{solver[0]}, NFE {solver[1]}")
        line(right, "fixed", solver, label=kinds[0])
        line(right, "any", solver, label=kinds[1], linestyle="--", markerfacecolor="white")
    ratios = sorted({e["bnr"] for e in entries})
    for axes, part in ((left, "a network for each ratio"), (right, "one for all, dashed")):
        axes.set_xscale("function", functions=(lambda x: x / (1 + x), lambda y: y / (1 - y)))
        axes.set_xlim(-0.04, 16)
        axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        for label, ratio in zip(axes.get_xticklabels(), ratios, strict=True):
            label.set(color=style.ratio_colour(ratio), fontweight="bold")
        axes.set_yscale("log")
        plots.plain_log_ticks(axes.yaxis)
        axes.set_xlabel("blur-to-noise ratio: 0 is hot (EDM), high is cold")
        axes.grid(axis="y", which="both")
        axes.set_title(f"{title}: {part}")
        axes.legend(handlelength=4)
    left.set_ylabel(f"{name} (lower is better)")
    return figure


def define_flags(config: str) -> None:
    """Those that both comparisons have."""
    config_flags.DEFINE_config_file("config", config, "Data, network, training; any key.")
    flags.DEFINE_string("out", None, "Folder of the results.", required=True)
    flags.DEFINE_list("seeds", ["0", "1"], "Of weights, noise and the order of images.")
    flags.DEFINE_list("solvers", ["heun:5", "multistep:18", "heun:18"], "SOLVER:STEPS each.")
    flags.DEFINE_integer("samples", 2000, "Images drawn for each distance.", lower_bound=8)
    flags.DEFINE_string("features", "classifier", "classifier, pixels, inception, MODULE:FUNCTION.")
    flags.DEFINE_integer("classifier_steps", 1500, "Of the classifier's training, 128 images each.")
    flags.DEFINE_float("minutes", 0.0, "Begin no training that would end later; 0: no limit.")


if __name__ == "__main__":
    define_flags("configs/digits.py")
    flags.DEFINE_list("ratios", [f"{ratio:g}" for ratio in PAPER], "Of the fixed networks.")
    flags.DEFINE_list("any_ratios", ["0", "0.5", "1", "2"], "Drawn of any_bnr; empty: not trained.")
    run(lambda argv: sweep(FLAGS))
