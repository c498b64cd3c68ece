"""Figures: colours that can be told apart, pixels that stay pixels."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from warm_diffusion.app import plots
from warm_diffusion.app.plots import style
from warm_diffusion.data.images import grid

PAGES = {"light": "#ffffff", "dark": "#16181d"}
KINDS = {
    "solvers": list(style.SOLVERS.values()),
    "heads": [style.NOISE, style.BLUR],
    "ratios": [style.ratio_colour(bnr) for bnr in (0, 1, np.inf)],
}
COLOURS = sorted({c for kind in KINDS.values() for c in kind} | set(style.level_colours(6)))


def linear(colour):
    """sRGB to linear light (IEC 61966-2-1)."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("colour", COLOURS)
def test_lines_have_contrast_3_on_light_and_dark_pages(colour, page):
    # WCAG 2.2, 1.4.11: contrast of graphics
    one, two = (float(linear(c) @ (0.2126, 0.7152, 0.0722)) + 0.05 for c in (colour, page))
    assert max(one, two) / min(one, two) >= 3


# What dichromats see, of linear light: Vienot, Brettel and Mollon 1999.
SEEN = {
    "protanope": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranope": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("eyes", [None, *SEEN])
@pytest.mark.parametrize("kind", KINDS)
def test_colours_of_one_kind_differ_for_colour_blind_readers(kind, eyes):
    matrix = np.eye(3) if eyes is None else np.array(SEEN[eyes])
    seen = [np.clip(matrix @ linear(c), 0, 1) ** (1 / 2.4) for c in KINDS[kind]]
    for one, two in itertools.combinations(seen, 2):
        assert np.abs(one - two).max() > 0.2


def png(figure):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return np.asarray(Image.open(content).convert("RGB"))


def test_images_of_a_labelled_grid_are_not_resampled():
    images = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3), np.uint8)
    canvas = grid(images, columns=3)
    found = png(plots.labelled(canvas, ["one", "two"], ["a", "b", "c"], "title"))
    height, width = canvas.shape[:2]
    corner = np.argwhere((found[:, :, None] == canvas[0, 0]).all(-1)[..., 0])
    assert any(
        np.array_equal(found[y : y + height, x : x + width], canvas) for y, x in corner.tolist()
    )


def test_a_level_in_a_tick_has_two_digits_and_no_exponent():
    assert [style.number(x) for x in (800.0, 0.00751, 1 / 3, 0.0, 11.4)] == [
        "800", "0.0075", "0.33", "0", "11",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a$5_$6", "$HOME$", "100 % & <b>"])
def test_names_of_files_are_shown_as_they_are(name):
    """Dollars would be mathematics to matplotlib, and most names are none."""
    canvas = np.zeros((8, 40, 1), np.uint8)
    drawn = plots.labelled(canvas, [name], [name], name)
    beside = plots.comparison([(name, canvas), (name, canvas)], name)
    for figure in (drawn, beside):
        figure.canvas.draw()
        written = [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]
        assert written
        assert all(text.replace(r"\$", "$") == name for text in written)
