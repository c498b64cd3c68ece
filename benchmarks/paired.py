"""Is one blur-to-noise ratio better than another? Networks of equal seeds, compared in pairs.

    python -m benchmarks.paired docs/results/announced_cifar10_16.jsonl
    python -m benchmarks.paired ROWS.jsonl --runs=RUNS --reference=FILE.npz     # judges first

Prints, for each solver and each ratio against --base, the mean over seeds of ln(distance / distance
at the base), its standard error, the p-value of a two-sided paired t-test, and the number of seeds
in which the ratio is nearer. Rows are those of `bnr_sweep` or of --runs: training workdirs with
images of seeds 0, 1, ... in drawn_SOLVER_STEPS.npy, uint8 [N, H, W, C]. Each that has no row yet is
compared with the statistics that --mode=fid_stats wrote, and its row is appended.
"""

import argparse
import json
import pathlib

import numpy as np
import scipy.stats

from warm_diffusion.evaluation import distances, features, metrics, reference
from warm_diffusion.evaluation.distances import Moments
from warm_diffusion.pretrained import Sampling


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file that has one, or a list of them, on each line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for line in lines for row in (line if isinstance(line, list) else [line])]


def judge(path: pathlib.Path, runs: pathlib.Path, real: reference.FeatureStatistics) -> None:
    """Appends a row for each array of images that has none."""
    extract = features.extractor(real.provenance["features"])
    path.touch()
    known = {(row["seed"], row["bnr"], row["solver"], row["nfe"]) for row in read(path)}
    for drawn in sorted(runs.glob("*/drawn_*_*.npy")):
        config = json.loads((drawn.parent / "config.json").read_text())
        levels = config["schedule"].get(
            "constant_bnr", config["schedule"]
        )  # older runs lack the section
        _, solver, steps = drawn.stem.split("_")
        key = config["seed"], levels["bnr"], solver, Sampling(solver, int(steps)).num_calls
        if key in known:
            continue
        images, training = np.load(drawn), config["training"]
        own = Moments.of(extract(images))
        distance = distances.frechet(own.mean, own.covariance, real.mean, real.covariance)
        row = dict(zip(("seed", "bnr", "solver", "nfe"), key, strict=True))
        row |= {metrics.main_metric(len(images), real): distance}
        row |= {"images_seen": training["num_steps"] * training["batch_size"]}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def compare(distances_: dict[int, float], base: dict[int, float]) -> dict[str, float]:
    """Statistics of ln(distance / distance at the base) over the seeds that both have."""
    logs = np.array([np.log(distances_[seed] / base[seed]) for seed in distances_.keys() & base])
    found = {"seeds": len(logs), "nearer": int(np.sum(logs < 0)), "mean": float(logs.mean())}
    if len(logs) < 2:
        return found | {"standard_error": float("nan"), "p": float("nan")}
    error = float(logs.std(ddof=1) / np.sqrt(len(logs)))
    return found | {"standard_error": error, "p": float(scipy.stats.ttest_1samp(logs, 0).pvalue)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=pathlib.Path, help="file of rows, .jsonl")
    parser.add_argument("--base", type=float, default=0.0, help="ratio to compare with")
    parser.add_argument("--runs", type=pathlib.Path, help="folder of training workdirs")
    parser.add_argument("--reference", help="statistics of the data, .npz")
    options = parser.parse_args()
    if options.runs:
        judge(options.rows, options.runs, reference.load(options.reference))
    rows, groups = read(options.rows), {}
    for row in rows:
        if row.get("network", "fixed") == "fixed":
            metric = next(name for name in row if name.startswith("fd_"))
            group = groups.setdefault((metric, row["solver"], row["nfe"]), {})
            group.setdefault(row["bnr"], {})[row["seed"]] = row[metric]
    for (metric, solver, nfe), ratios in groups.items():
        base = ratios.pop(options.base, {})
        for bnr in sorted(bnr for bnr in ratios if ratios[bnr].keys() & base):
            found = compare(ratios[bnr], base)
            print(
                f"{metric}, {solver}, NFE {nfe}: BNR {bnr:g} against {options.base:g}: "
                f"{found['mean']:+.4f} ± {found['standard_error']:.4f}, p = {found['p']:.3g}, "
                f"nearer in {found['nearer']} of {found['seeds']} seeds"
            )


if __name__ == "__main__":
    main()
