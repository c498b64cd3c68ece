"""Draws the pictures of docs/images anew, from docs/results and the networks in pretrained/.

    python -m benchmarks.figures                     # all; a minute on a CPU
    python -m benchmarks.figures sweep_digits.png    # some

Nothing is trained or measured here; samples are drawn and a photograph is restored: scikit-learn's
china.jpg at half size. Seeds are 0 to 23, not chosen.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import ablation, bnr_sweep, comparison, nfe_curve
from warm_diffusion import dct, pretrained, process, samplers, spectra
from warm_diffusion.app import plots
from warm_diffusion.data.images import from_uint8, to_uint8
from warm_diffusion.evaluation import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"
SETS = {"digits": "digits", "cifar10_16": "CIFAR-10 at 16x16"}
DRAWS, RESTORES = ROOT / "pretrained" / "cifar10_16", ROOT / "pretrained" / "photos"
METRICS = {"digits": "fd_classifier_2000", "cifar10_16": "fd_classifier_1000"}

NOISE = (0.05, 0.15, 0.4, 1.2)  # beta of each column
RATIO = 10.0  # alpha of each column is ten times that: blur that can be seen
BLUR, GREY_LEVELS = 1.0, 12.75  # of the photograph to restore


# --- docs/results as pictures -------------------------------------------------------------------


def _rows(path: pathlib.Path) -> list[dict]:
    return [row for line in path.read_text().splitlines() for row in json.loads(line)]


def sweep(name: str):
    """Distance against ratio."""
    rows, metric = _rows(RESULTS / f"sweep_{name}.jsonl"), METRICS[name]
    entries = comparison.summarise(rows, (metric,), bnr_sweep.GROUP)
    return bnr_sweep.draw(entries, metric, SETS[name])


def ablation_digits():
    """Distance of each variant."""
    rows, metric = _rows(RESULTS / "ablation_digits.jsonl"), METRICS["digits"]
    entries = comparison.summarise(rows, (metric,), ablation.GROUP)
    return ablation.draw(entries, metric, f"digits, {ablation.title_of(0.5)}")


def nfe(name: str):
    """Distance against network calls."""
    rows = json.loads((RESULTS / f"nfe_{name}.json").read_text())["rows"]
    metric = rows[0].get("metric", METRICS[name])
    rows = [
        {"ratio": None, "grid": "edm", "nfe": row.get("network_calls"),
         metric: row.get("distance")} | row
        for row in rows
    ]  # fmt: skip
    return nfe_curve.draw(rows, metric, SETS[name])


def departure(name: str, bnr: str):
    """How far a sampler is from the forward process."""
    told = json.loads((RESULTS / f"analysis_{name}_bnr{bnr}.json").read_text())
    title = (
        f"{SETS[name]}, step {told['step']:,}: blur-to-noise ratio {bnr}, "
        f"{told['sampling']['solver']}, {told['network_calls']} network calls"
    )
    return plots.departure(np.asarray(told["frequency"]), told["steps"], title)


def spectrum():
    """Of the training data of the network for CIFAR-10, blurred and noisy along ratio 0.5."""
    data = pretrained.load(ROOT / "pretrained" / "cifar10_16").spectrum
    frequency, power = (np.asarray(a) for a in spectra.radial_mean(data))
    levels = []
    for beta in (0.05, 0.15, 0.5, 1.5, 5.0):
        m = np.asarray(dct.transfer(0.5 * beta, *data.shape))[..., 0]
        levels.append((0.5 * beta, beta, np.asarray(spectra.radial_mean(m**2 * data)[1])))
    title = "CIFAR-10 at 16x16 along blur-to-noise ratio 0.5"
    return plots.spectrum(frequency, power, levels, title)


@plots.styled
def ratios():
    """The same seeds along hot, warm and nearly cold paths, by the network of every ratio."""
    model = pretrained.load(DRAWS)
    rows = {0.0: "hot: 0", 0.5: "warm: 0.5", 2.0: "2", 10.0: "nearly cold: 10"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    grid = figure.subplots(len(rows), 12)
    for axes, (ratio, label) in zip(grid, rows.items(), strict=True):
        for one, image in zip(axes, model.sample(range(12), bnr=ratio), strict=True):
            show(one, image)
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
        axes[0].yaxis.label.set(color=plots.ratio_colour(ratio), fontweight="bold")
    figure.suptitle("CIFAR-10 at 16x16: one network, the same seeds, four blur-to-noise ratios")
    return figure


def restored():
    """A photograph blurred and noisy, its noise undone, and both."""
    alpha, beta = 1.0, 0.1
    clean = from_uint8(photograph())[None]
    noise = samplers.initial_noise([0], clean.shape[1:])
    y = process.perturb(clean, noise, alpha, beta)
    model = pretrained.load(RESTORES)
    versions = {
        "blurred and noisy": y,
        "noise alone undone (α = 0)": model.denoise(y, 0.0, beta).clean,
        "blur and noise undone": model.denoise(y, alpha, beta).clean,
        "clean": clean,
    }
    panels = []
    for name, x in versions.items():
        x = np.asarray(x)[0]
        scores = f"{pairs.psnr(x, clean[0]):.2f} dB, SSIM {pairs.ssim(x, clean[0]):.3f}"
        panels.append((f"{name}\n{scores if name != 'clean' else ' '}", to_uint8(x)))
    title = f"blur 1 pixel, noise {127.5 * beta:g} grey levels; posterior means of one network"
    return plots.comparison(panels, title)


# --- the README's picture -----------------------------------------------------------------------


def photograph() -> np.ndarray:
    """The tower of china.jpg, uint8 [96, 96, 3]."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return np.asarray(half)[22:118, 50:146]


def forward(clean: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Rows of images at the levels of the columns: noise alone, both, blur alone."""
    x0 = from_uint8(clean)[None]
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    rows = {}
    for name, blur, noisy in (("hot", 0, 1), ("warm", 1, 1), ("cold", 1, 0)):
        states = [process.perturb(x0, noise, blur * RATIO * b, noisy * b) for b in NOISE]
        # Noise above the range of pixels would be clipped: scaled as the eye expects it.
        scales = [(1 + (noisy * b) ** 2) ** -0.5 for b in NOISE]
        rows[name] = [to_uint8(s * x)[0] for s, x in zip(scales, states, strict=True)]
    return rows


def restored_photograph(clean: np.ndarray, model: pretrained.Model) -> list[tuple[str, np.ndarray]]:
    """The photograph with blur and noise, restored by a network, and clean."""
    x0, beta = from_uint8(clean)[None], GREY_LEVELS / 127.5
    y = process.perturb(x0, jax.random.normal(jax.random.key(1), x0.shape), BLUR, beta)
    mean = model.denoise(y, BLUR, beta).clean
    return [
        ("blurred and noisy", to_uint8(y)[0]),
        ("restored", to_uint8(mean)[0]),
        ("clean", clean),
    ]


def show(axes, image: np.ndarray, title: str = "", label: str = "") -> None:
    """One image, its pixels as blocks, with a title above and a label at its left."""
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=10)


def draw_forward(figure, clean: np.ndarray) -> None:
    """A row per kind of diffusion, a column per level."""
    figure.suptitle("Images become noise, blur, or both", fontsize=12, weight="bold")
    labels = {"hot": "hot: noise", "warm": "warm: both", "cold": "cold: blur"}
    for axes, (name, images) in zip(figure.subplots(3, 5), forward(clean).items(), strict=True):
        show(axes[0], clean, "clean" if name == "hot" else "", labels[name])
        for one, image, beta in zip(axes[1:], images, NOISE, strict=True):
            blur = "0" if name == "hot" else f"{RATIO * beta:.3g}"
            noise = "0" if name == "cold" else f"{beta:g}"
            show(one, image, f"α {blur} px\nβ {noise}")


def new_figure(width: float) -> Figure:
    """A white figure, readable on a dark page, without room between its parts."""
    figure = Figure(figsize=(width, 5.3), layout="constrained", facecolor="white", dpi=100)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0.0, wspace=0.0)
    return figure


def strips() -> Figure:
    """The forward process alone."""
    figure = new_figure(6)
    draw_forward(figure, photograph())
    return figure


def hero() -> Figure:
    """The forward process, samples, a restored photograph."""
    clean, model = photograph(), pretrained.load(DRAWS)
    figure = new_figure(12)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1), wspace=0.03)
    draw_forward(left, clean)
    above, below = right.subfigures(2, 1, height_ratios=(1.12, 1))
    title = "One small network draws images (16x16, CIFAR-10) …"
    above.suptitle(title, fontsize=12, weight="bold")
    for axes, image in zip(above.subplots(3, 8).flat, model.sample(range(24)), strict=True):
        show(axes, image)
    below.suptitle("… and another restores photographs", fontsize=12, weight="bold")
    images = restored_photograph(clean, pretrained.load(RESTORES))
    for axes, (title, image) in zip(below.subplots(1, 3), images, strict=True):
        show(axes, image, title)
    return figure


FIGURES = {
    "hero.png": hero,
    "process.png": strips,
    "sweep_digits.png": lambda: sweep("digits"),
    "sweep_cifar10_16.png": lambda: sweep("cifar10_16"),
    "ablation_digits.png": ablation_digits,
    "nfe_digits.png": lambda: nfe("digits"),
    "nfe_cifar10_16.png": lambda: nfe("cifar10_16"),
    "departure_digits_bnr10.png": lambda: departure("digits", "10"),
    "departure_cifar10_16_bnr0.5.png": lambda: departure("cifar10_16", "0.5"),
    "ratios_cifar10_16.png": ratios,
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
