"""The README's figure (hero.png) and its left half alone (process.png), for `benchmarks.figures`.

The photograph is scikit-learn's china.jpg at half size; seeds are 0 to 23, not chosen.
"""

import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from warm_diffusion import pretrained, process
from warm_diffusion.data.images import from_uint8, to_uint8

ROOT = pathlib.Path(__file__).resolve().parents[1]
DRAWS, RESTORES = ROOT / "pretrained/cifar10_16", ROOT / "pretrained/photos"

NOISE = (0.05, 0.15, 0.4, 1.2)  # beta of each column
RATIO = 10.0  # alpha of each column is ten times that: blur that can be seen
BLUR, GREY_LEVELS = 1.0, 12.75  # of the photograph to restore


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


def restored(clean: np.ndarray, model: pretrained.Model) -> list[tuple[str, np.ndarray]]:
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
    images = restored(clean, pretrained.load(RESTORES))
    for axes, (title, image) in zip(below.subplots(1, 3), images, strict=True):
        show(axes, image, title)
    return figure
