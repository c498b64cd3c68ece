"""Figures: arrays in, PNG files out."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

# Nine steps of one hue, light to dark: the levels of a path have an order.
_LEVEL_COLOURS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def spectrum(
    path: pathlib.Path,
    frequency: np.ndarray,
    power: np.ndarray,
    levels: Sequence[tuple[float, float, np.ndarray]],
    title: str,
) -> None:
    """The data's radial power with what blur and noise make of it along a path.

    Args:
      path: PNG file to write.
      frequency: [K] cycles per pixel; the first, the mean of the image, is left out.
      power: [K] mean variance of a DCT coefficient in each ring.
      levels: (alpha, beta, blurred power [K]) at a few times, in order.
      title: heading.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.loglog(frequency[1:], power[1:], color="black", linewidth=2.5, label="data")
    colours = np.array(_LEVEL_COLOURS)[
        np.linspace(0, len(_LEVEL_COLOURS) - 1, len(levels)).round().astype(int)
    ]
    floor = power[1:].min() * 1e-2
    for (alpha, beta, blurred), colour in zip(levels, colours, strict=True):
        visible = np.maximum(blurred[1:], floor / 10)  # far below the axis, not minus infinity
        axes.loglog(frequency[1:], visible, color=colour, label=f"α {alpha:.2g} px, β {beta:.2g}")
        axes.axhline(beta**2, color=colour, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("frequency (cycles per pixel)")
    axes.set_ylabel("variance of a DCT coefficient")
    axes.set_title(title, fontsize=11)
    axes.legend(title="solid: blurred data, dashed: noise β²", fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
