"""Figures: arrays in, matplotlib's figures out.

One thing has one colour everywhere, on white and on dark pages: noise and hot diffusion are orange,
blur and cold diffusion blue; a ratio lies between.
"""

import io
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from warm_diffusion.runtime import storage

_TEXT = 14  # pixels of a line of labels
INK = "#22262d"  # text and axes
NOISE, BLUR = "#d55e00", "#0072b2"
SAMPLER = "#009e73"
_RATIOS = LinearSegmentedColormap.from_list("ratios", [NOISE, "#b35c6e", BLUR])
_LEVELS = LinearSegmentedColormap.from_list("levels", ["#b8860b", "#2f9e6e", "#1f7fb0", "#7458bd"])
DEPARTURES, SHARES = "RdBu_r", "cividis"  # maps: too little (blue) to too much (red); 0 to 1

styled = matplotlib.rc_context(  # decorates what makes a figure
    {
        "figure.dpi": 120,
        "figure.facecolor": "white",
        "savefig.dpi": "figure",
        "font.size": 13,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 13.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#8a8f98",
        "grid.alpha": 0.3,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "legend.fontsize": 11.5,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
    }
)


def ratio_colour(bnr: float) -> str:
    """The colour of a blur-to-noise ratio: hot (0) is orange, cold (infinity) blue."""
    return to_hex(_RATIOS(1.0 if np.isinf(bnr) else bnr / (bnr + 1)))


def level_colours(count: int) -> list[str]:
    """Colours of levels along a path, in order."""
    return [to_hex(_LEVELS(x)) for x in np.linspace(0, 1, count)]


def plain(text: str) -> str:
    """Escapes dollars, which names of files may hold, so that they are no mathematics."""
    return text.replace("$", r"\$")


def number(value: float) -> str:
    """A level with two digits and no exponent, for a tick."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


@styled
def save(path: pathlib.Path, figure: Figure) -> None:
    """Writes a figure in the format of the path's suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    storage.write_bytes(path, content.getvalue())


# --- figures ------------------------------------------------------------------------------------


def plain_log_ticks(axis) -> None:
    """Numbers without exponents on a logarithmic axis, as many as there is room for."""

    def between(value, _):
        """The label of a minor tick: the more decades are shown, the fewer are labelled."""
        low, high = axis.get_view_interval()
        shown = "2346" if high < 12 * low else "25" if high < 1000 * low else ""
        return f"{value:g}" if f"{value:e}"[0] in shown else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)


@styled
def spectrum(
    frequency: np.ndarray,
    power: np.ndarray,
    levels: Sequence[tuple[float, float, np.ndarray]],
    title: str,
) -> Figure:
    """The data's radial power [K] with what blur and noise make of it along a path.

    `levels` are (alpha, beta, blurred power [K]) at a few times, in order. The first ring, the mean
    of the image, is left out.
    """
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.loglog(frequency[1:], power[1:], color=INK, linewidth=3, label="data")
    floor = power[1:].min() * 1e-2
    for (alpha, beta, blurred), colour in zip(levels, level_colours(len(levels)), strict=True):
        visible = np.maximum(blurred[1:], floor / 10)  # far below the axis, not minus infinity
        label = f"α {number(alpha)} px, β {number(beta)}"
        axes.loglog(frequency[1:], visible, color=colour, label=label)
        axes.axhline(beta**2, color=colour, linestyle="--", linewidth=1.2)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("frequency (cycles per pixel)")
    axes.set_ylabel("variance of a DCT coefficient")
    axes.set_title(plain(title))
    plain_log_ticks(axes.xaxis)
    axes.legend(title="solid: data after blur α\ndashed: noise floor β²", title_fontsize=11)
    return figure


def _over_steps(
    frequency: np.ndarray, steps: Sequence[dict], values: np.ndarray, title: str, label: str, **look
) -> tuple[Figure, Axes]:
    """A map of values [steps, K] over step and frequency, and axes below for curves over steps."""
    figure = Figure(figsize=(7, 9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    edges = np.concatenate([[0.0], (frequency[1:] + frequency[:-1]) / 2, frequency[-1:]])
    columns = np.arange(len(values) + 1) - 0.5
    masked = np.ma.masked_invalid(values.T)
    # Rasterized: thousands of rectangles would make an SVG of megabytes.
    mesh = above.pcolormesh(columns, edges, masked, rasterized=True, **look)
    above.set_ylabel("frequency (cycles per pixel)")
    above.grid(False)
    above.set_title(plain(title))
    figure.colorbar(mesh, ax=above, label=label)
    shown = range(0, len(steps), -(-len(steps) // 6))
    labels = [f"{i}\nα {number(steps[i]['alpha'])}\nβ {number(steps[i]['beta'])}" for i in shown]
    for axes in (above, below):
        axes.set_xticks(list(shown), labels, fontsize=11)
        axes.set_xlim(-0.5, len(steps) - 0.5)
    below.set_yscale("log")
    plain_log_ticks(below.yaxis)
    below.set_xlabel("step, with blur α (pixels) and noise β there")
    return figure, below


@styled
def departure(frequency: np.ndarray, steps: Sequence[dict], title: str) -> Figure:
    """Draws the departure of a sampler's states from the forward process, step by step.

    Each of `steps` has alpha, beta, spectral_departure [K], sliced_wasserstein, and the same with
    `_of_forward` for other forward states.
    """
    values = np.array([step["spectral_departure"] for step in steps], float)
    limit = max(0.1, float(np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)))))
    figure, below = _over_steps(
        frequency, steps, values, title, "spectral departure: ln (power / forward power)",
        cmap=DEPARTURES, vmin=-limit, vmax=limit,
    )  # fmt: skip
    for name, label, look, colour in (
        ("sliced_wasserstein", "sampler's states to forward states", "o-", SAMPLER),
        ("sliced_wasserstein_of_forward", "forward states to other forward states", "x--",
         INK),
    ):  # fmt: skip
        below.plot([step[name] for step in steps], look, label=label, color=colour)
    below.set_ylabel("sliced Wasserstein distance")
    below.legend()
    return figure


@styled
def heads(frequency: np.ndarray, steps: Sequence[dict], title: str) -> Figure:
    """Draws the contribution of each head to each step, and their consistency.

    Each of `steps` has alpha, beta, denoiser [K], deblurrer [K] (mean squares), consistency.
    """
    one, two = (np.array([step[name] for step in steps]) for name in ("denoiser", "deblurrer"))
    share = np.sqrt(two) / np.maximum(np.sqrt(one) + np.sqrt(two), 1e-30)
    figure, below = _over_steps(
        frequency, steps, share, title, "deblurrer's share of the step (root mean squares)",
        cmap=SHARES, vmin=0.0, vmax=max(0.05, share.max()),
    )  # fmt: skip
    below.plot([step["consistency"] for step in steps], "o-", color=INK)
    below.set_ylabel("consistency: mean square of D - B (D + R)")
    return figure


@styled
def comparison(panels: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """Titles and images uint8 [H, W, C] of one size beside one another, enlarged by blocks."""
    height, width = panels[0][1].shape[:2]
    side = max(2.6, min(5.0, width / 120))
    figure = Figure(figsize=(side * len(panels), side * height / width + 0.7), layout="constrained")
    for axes, (name, image) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(plain(name), fontsize=9)
        axes.set_axis_off()
    figure.suptitle(plain(title), fontsize=10)
    return figure


@styled
def labelled(canvas: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """A grid of images, as `data.images.grid` makes it, with a label for each row and column.

    Its pixels are the figure's. Labels of rows have one line, lines of columns an image's width.
    """
    height, width = canvas.shape[:2]
    left = 10 + 7 * max(map(len, rows), default=0)
    lines = max((label.count("\n") + 1 for label in columns), default=0)
    top = 12 + _TEXT * (lines + 2 * bool(title))
    size = max(left + width + 8, int(6.2 * len(title)) + 16), top + height + 8
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100)
    grey = canvas.shape[-1] == 1
    figure.figimage(canvas[..., 0] if grey else canvas, left, 8, cmap="gray", vmin=0, vmax=255)

    def write(x, y, text, **options):
        figure.text(x / size[0], 1 - y / size[1], plain(text), fontsize=8, **options)

    for i, label in enumerate(columns):
        x = left + (i + 0.5) * (width + 2) / len(columns)
        write(x, top - 4, label, ha="center", va="bottom")
    for i, label in enumerate(rows):
        y = top + (i + 0.5) * (height + 2) / len(rows)
        write(left - 5, y, label, ha="right", va="center")
    figure.text(0.5, 1 - 6 / size[1], plain(title), fontsize=9, ha="center", va="top")
    return figure
