"""Draws the pictures of docs/images from docs/results and the networks in pretrained/.

    python -m benchmarks.figures                     # all; a minute on a CPU
    python -m benchmarks.figures sweep_digits.png    # some

Nothing is trained or measured here; samples are drawn (seeds 0 to 5, not chosen), and a
photograph is restored: scikit-learn's china.jpg.
"""

import argparse
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import bnr_sweep, comparison
from warm_diffusion import dct, pretrained, process, samplers, spectra
from warm_diffusion.app import plots
from warm_diffusion.data.images import from_uint8, to_uint8
from warm_diffusion.evaluation import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
SETS = {"digits": "digits", "cifar10_16": "CIFAR-10 at 16x16"}
DRAWS, RESTORES = ROOT / "pretrained" / "cifar10_16", ROOT / "pretrained" / "photos"
METRICS = {"digits": "fd_classifier_2000", "cifar10_16": "fd_classifier_1000"}

LEVELS = ((0, 0), (3, 0.15), (10, 0.5), (30, 1.5))  # alpha and beta of each column: BNR 20


# --- docs/results as pictures -------------------------------------------------------------------


def _rows(path: pathlib.Path) -> list[dict]:
    return [row for line in path.read_text().splitlines() for row in json.loads(line)]


def sweep(name: str):
    """Distance against ratio."""
    rows, metric = _rows(RESULTS / f"sweep_{name}.jsonl"), METRICS[name]
    entries = comparison.summarise(rows, metric)
    return bnr_sweep.draw(entries, metric, SETS[name])


def departure(name: str, bnr: str):
    """Draws the departure of a sampler from the forward process."""
    report = json.loads((RESULTS / f"analysis_{name}_bnr{bnr}.json").read_text())
    sampling = f"{report['sampling']['solver']}, {report['network_calls']} calls"
    title = f"{SETS[name]}: BNR {bnr}, {sampling}"
    return plots.departure(np.asarray(report["frequency"]), report["steps"], title)


def spectrum():
    """Power of CIFAR-10's frequencies, blurred and noisy along ratio 0.5."""
    data = pretrained.load(ROOT / "pretrained" / "cifar10_16").spectrum
    frequency, power = (np.asarray(a) for a in spectra.radial_mean(data))
    levels = []
    for beta in (0.05, 0.15, 0.5, 1.5, 5.0):
        m = np.asarray(dct.transfer(0.5 * beta, *data.shape))[..., 0]
        levels.append((0.5 * beta, beta, np.asarray(spectra.radial_mean(m**2 * data)[1])))
    title = "CIFAR-10 at 16x16 along blur-to-noise ratio 0.5"
    return plots.spectrum(frequency, power, levels, title)


@plots.styled
def few_calls():
    """The same seeds by Heun on EDM's grid and by few calls of multistep on the spectral grid."""
    model, seeds = pretrained.load(DRAWS), range(6)
    heun = model.sample(seeds, "heun", 18, bnr=0.5)
    few = model.sample(seeds, "multistep", 6, bnr=0.5, time_grid="spectral")
    labels = {"35 calls": plots.INK, "6 calls": plots.INK}
    return wide([list(heun), list(few)], [f"seed {seed}" for seed in seeds], labels)


def restored():
    """A photograph blurred and noisy, its noise undone, and both."""
    alpha, beta = 1.0, 0.1
    clean = from_uint8(photograph())[None]
    noise = samplers.initial_noise([0], clean.shape[1:])
    y = process.perturb(clean, noise, alpha, beta)
    model = pretrained.load(RESTORES)
    versions = {
        "blur and noise": y,
        "noise undone": model.denoise(y, 0.0, beta).clean,
        "both undone": model.denoise(y, alpha, beta).clean,
        "clean": clean,
    }
    images = {name: np.asarray(x)[0] for name, x in versions.items()}
    scores = [f"{pairs.psnr(x, clean[0]):.2f} dB" for x in images.values()][:-1]
    titles = [f"{name}\n{score}" for name, score in zip(images, [*scores, " "], strict=True)]
    return wide([[to_uint8(x) for x in images.values()]], titles, {})


# --- the README's pictures ----------------------------------------------------------------------


def photograph() -> np.ndarray:
    """The tower of china.jpg at half size, uint8 [96, 96, 3]."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return np.asarray(half)[22:118, 50:146]


def show(axes, image: np.ndarray) -> None:
    """One image without axes."""
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def wide(rows: list[list[np.ndarray]], titles: list[str], labels: dict[str, str]) -> Figure:
    """Rows of images over the width of a page, with letters that a phone can show."""
    height, width = rows[0][0].shape[:2]
    # Of 1,200 pixels.
    left, top = (60 if labels else 0), 20 + 40 * max(title.count("\n") + 1 for title in titles)
    side = (1200 - left) / len(titles)
    total = top + len(rows) * side * height / width
    figure = Figure(figsize=(12, total / 100), facecolor="white", dpi=100)
    grid = figure.subplots(
        len(rows), len(titles), squeeze=False,
        gridspec_kw={"left": left / 1200, "right": 1, "bottom": 0, "top": 1 - top / total,
                     "wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    for axes, image in zip(grid.flat, [image for row in rows for image in row], strict=True):
        show(axes, image)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=25)
    for axes, (label, colour) in zip(grid[:, 0], labels.items(), strict=False):
        axes.set_ylabel(label, fontsize=25, color=colour, weight="bold")
    return figure


def hero() -> Figure:
    """One photograph under noise, under both, under blur, at rising levels."""
    x0 = from_uint8(load_sample_image("china.jpg")[10:360, 20:440])[None]
    noise = samplers.initial_noise([0], x0.shape[1:])
    rows = []
    for blurs, noises in ((0, 1), (1, 1), (1, 0)):
        states = [
            (process.perturb(x0, noise, blurs * a, noises * b), noises * b) for a, b in LEVELS
        ]
        # Noise beyond the range of pixels would be clipped, so each state is scaled to unit size.
        rows.append([to_uint8(x * (1 + b**2) ** -0.5)[0] for x, b in states])
    titles = ["clean"] + [f"α {alpha}  β {beta}" for alpha, beta in LEVELS[1:]]
    labels = {"hot": plots.NOISE, "warm": plots.ratio_colour(1), "cold": plots.BLUR}
    return wide(rows, titles, labels)


def before_after() -> Figure:
    """A photograph blurred and noisy, and restored."""
    x0 = from_uint8(load_sample_image("china.jpg")[20:200, 76:346])[None]
    y = process.perturb(x0, samplers.initial_noise([0], x0.shape[1:]), 1.0, 0.1)
    mean = pretrained.load(RESTORES).denoise(y, 1.0, 0.1).clean
    return wide([[to_uint8(y)[0], to_uint8(mean)[0]]], ["blur and noise", "restored"], {})


FIGURES = {
    "hero.jpg": hero,
    "before_after.jpg": before_after,
    "sweep_digits.png": lambda: sweep("digits"),
    "sweep_cifar10_16.png": lambda: sweep("cifar10_16"),
    "departure_digits_bnr10.png": lambda: departure("digits", "10"),
    "departure_cifar10_16_bnr0.5.png": lambda: departure("cifar10_16", "0.5"),
    "few_calls_cifar10_16.png": few_calls,
    "spectrum.png": spectrum,
    "restoration.png": restored,
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], help="which (default: all)")
    for name in parser.parse_args().names or FIGURES:
        plots.save(IMAGES / name, FIGURES[name]())
        print(IMAGES / name)


if __name__ == "__main__":
    main()
