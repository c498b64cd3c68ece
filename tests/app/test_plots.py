"""Figures: pixels stay pixels, and names of files stay as they are."""

import io

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text
from PIL import Image

from warm_diffusion.app import plots
from warm_diffusion.data.images import grid


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


@pytest.mark.parametrize("name", ["a$5_$6", "100 % & <b>"])
def test_names_of_files_are_shown_as_they_are(name):
    """Dollars would be mathematics to matplotlib, and most names are none."""
    canvas = np.zeros((8, 40, 1), np.uint8)
    drawn = plots.labelled(canvas, [name], [name], name)
    beside = plots.comparison([(name, canvas), (name, canvas)], name)
    for figure in (drawn, beside):
        figure.canvas.draw()
        written = [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]
        assert written
        assert not any(is_math_text(text) for text in written)
        assert all(text.replace(r"\$", "$") == name for text in written)
