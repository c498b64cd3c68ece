"""Figures: arrays in, PNG files out."""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from warm_diffusion import storage

# Nine steps of one hue, light to dark: the levels of a path have an order.
_LEVEL_COLOURS = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")


def _save(figure: Figure, path: pathlib.Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    storage.write_bytes(path, content.getvalue())


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
    _save(figure, path)


def _label_steps(axes, steps: Sequence[dict]) -> None:
    """Step numbers with their levels, some ten of them."""
    shown = range(0, len(steps), -(-len(steps) // 10))
    labels = [f"{i}\nα {steps[i]['alpha']:.2g}\nβ {steps[i]['beta']:.2g}" for i in shown]
    axes.set_xticks(list(shown), labels, fontsize=7)
    axes.set_xlim(-0.5, len(steps) - 0.5)


def _by_ring(figure: Figure, axes, frequency: np.ndarray, values: np.ndarray, **options) -> None:
    """A map of values [steps, K] over step and frequency."""
    edges = np.concatenate([[0.0], (frequency[1:] + frequency[:-1]) / 2, frequency[-1:]])
    columns = np.arange(len(values) + 1) - 0.5
    label = options.pop("label")
    mesh = axes.pcolormesh(columns, edges, np.ma.masked_invalid(values.T), **options)
    axes.set_ylabel("frequency (cycles per pixel)")
    figure.colorbar(mesh, ax=axes, label=label)


def departure(path: pathlib.Path, frequency: np.ndarray, steps: Sequence[dict], title: str) -> None:
    """How far a sampler's states are from the forward process, step by step.

    Args:
      path: PNG file to write.
      frequency: [K] cycles per pixel.
      steps: of each level alpha, beta, spectral_departure [K], sliced_wasserstein, and the same
        with `_of_forward` for other forward states.
      title: heading.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    values = np.array([step["spectral_departure"] for step in steps], float)
    limit = max(0.1, float(np.nanmax(np.abs(np.where(np.isfinite(values), values, np.nan)))))
    _by_ring(
        figure, above, frequency, values, cmap="RdBu_r", vmin=-limit, vmax=limit,
        label="spectral departure: ln (power / forward power)",
    )  # fmt: skip
    _label_steps(above, steps)
    above.set_title(title, fontsize=11)
    for name, label, style in (
        ("sliced_wasserstein", "sampler's states to forward states", "o-"),
        ("sliced_wasserstein_of_forward", "forward states to other forward states", "x--"),
    ):
        below.semilogy([step[name] for step in steps], style, label=label, color="#08519c")
    _label_steps(below, steps)
    below.set_xlabel("step, blur and noise there")
    below.set_ylabel("sliced Wasserstein distance")
    below.legend(fontsize=8)
    below.grid(alpha=0.25)
    _save(figure, path)


def heads(path: pathlib.Path, frequency: np.ndarray, steps: Sequence[dict], title: str) -> None:
    """What each head contributes to each step, and how consistent they are.

    Args:
      path: PNG file to write.
      frequency: [K] cycles per pixel.
      steps: of each step alpha, beta, denoiser [K], deblurrer [K] (mean squares), consistency.
      title: heading.
    """
    figure = Figure(figsize=(9, 9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    one, two = (np.array([step[name] for step in steps]) for name in ("denoiser", "deblurrer"))
    share = np.sqrt(two) / np.maximum(np.sqrt(one) + np.sqrt(two), 1e-30)
    _by_ring(
        figure, above, frequency, share, cmap="viridis", vmin=0.0, vmax=max(0.05, share.max()),
        label="deblurrer's share of the step (root mean squares)",
    )  # fmt: skip
    _label_steps(above, steps)
    above.set_title(title, fontsize=11)
    below.semilogy([step["consistency"] for step in steps], "o-", color="#08519c")
    _label_steps(below, steps)
    below.set_xlabel("step, blur and noise there")
    below.set_ylabel("consistency: mean square of D - B (D + R)")
    below.grid(alpha=0.25)
    _save(figure, path)


def comparison(path: pathlib.Path, panels: Sequence[tuple[str, np.ndarray]], title: str) -> None:
    """Images beside one another, each pixel of a small one a block.

    Args:
      path: PNG file to write.
      panels: title and uint8 [H, W, C] of each, of one size.
      title: heading.
    """
    height, width = panels[0][1].shape[:2]
    side = max(2.6, min(5.0, width / 120))
    figure = Figure(figsize=(side * len(panels), side * height / width + 0.7), layout="constrained")
    for axes, (name, image) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
