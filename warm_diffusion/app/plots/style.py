"""How figures look: one colour for one thing everywhere, on white and on dark pages.

Colours have a contrast of 3 or more against white and against the dark page (tests/test_plots.py),
and those of one kind stay apart for colour-blind readers. Noise and hot diffusion are orange, blur
and cold diffusion blue; a ratio lies between.
"""

import io
import pathlib

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from warm_diffusion.runtime import storage

INK = "#22262d"  # text and axes
NOISE, BLUR = "#d55e00", "#0072b2"
SOLVERS = {"euler": "#7d6bb5", "heun": "#009e73", "multistep": "#b8860b"}
MARKERS = {"euler": "^", "heun": "o", "multistep": "s"}
_RATIOS = LinearSegmentedColormap.from_list("ratios", [NOISE, "#b35c6e", BLUR])
_LEVELS = LinearSegmentedColormap.from_list("levels", ["#b8860b", "#2f9e6e", "#1f7fb0", "#7458bd"])
DEPARTURES, SHARES = "RdBu_r", "cividis"  # maps: too little (blue) to too much (red); 0 to 1

styled = matplotlib.rc_context(  # decorates what makes a figure
    {
        "figure.dpi": 120,
        "figure.facecolor": "white",
        "savefig.dpi": "figure",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#8a8f98",
        "grid.alpha": 0.3,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 4.5,
    }
)


def ratio_colour(bnr: float) -> str:
    """Of a blur-to-noise ratio: hot (0) orange, cold (infinity) blue."""
    return to_hex(_RATIOS(1.0 if np.isinf(bnr) else bnr / (bnr + 1)))


def level_colours(count: int) -> list[str]:
    """Of levels along a path, in order."""
    return [to_hex(_LEVELS(x)) for x in np.linspace(0, 1, count)]


def plain(text: str) -> str:
    """Text that may hold names of files: its dollars are no mathematics."""
    return text.replace("$", r"\$")


def number(value: float) -> str:
    """A level with two digits and no exponent, for a tick."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


@styled
def save(path: pathlib.Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    storage.write_bytes(path, content.getvalue())
