"""docs/tutorial.py runs from top to bottom, and the notebook beside it has the same text."""

import json
import pathlib
import re

import numpy as np
import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
TEXT = (DOCS / "tutorial.py").read_text()


def cells():
    """(kind, source) of each cell of the percent format."""
    parts = re.split(r"^# %%(.*)\n", TEXT, flags=re.M)[1:]
    return [
        ("markdown" if "markdown" in kind else "code", source.strip("\n"))
        for kind, source in zip(parts[::2], parts[1::2], strict=True)
    ]


def test_the_tutorial_runs_and_what_it_says_holds(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures, names = [], {}
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()) or plt.close("all"))
    monkeypatch.chdir(DOCS.parent)
    for kind, source in cells():
        if kind == "code":
            short = source.replace("STEPS = 1500", "STEPS = 60")
            with matplotlib.rc_context():
                exec(compile(short, "docs/tutorial.py", "exec"), names)
    assert "STEPS = 1500" in TEXT
    assert len(figures) == 7
    assert float(names["nearest"].max()) < 1e-3  # the exact heads lead to one of the ten digits
    history = np.asarray(names["history"])
    assert history[-10:].sum() < 0.8 * history[:10].sum()  # both heads learn
    psnr = [names["psnr"](x) for x in names["versions"].values()]
    assert psnr == sorted(psnr)  # input, noise undone, both undone
    assert abs(float(names["beta"][0]) - 0.1) < 0.01


def test_the_notebook_has_this_text():
    """`make tutorial` makes it; what it shows was computed by the cells that it shows."""
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook]
    plain = re.compile(r"^# ?", re.M)
    expected = [
        (kind, plain.sub("", source) if kind == "markdown" else source) for kind, source in cells()
    ]
    assert found == expected, "docs/tutorial.py has changed: make tutorial"
    shown = [cell for cell in notebook if cell["cell_type"] == "code" and cell["outputs"]]
    assert len(shown) == 8  # seven with a figure, one with numbers alone
    kinds = {out["output_type"] for cell in shown for out in cell["outputs"]}
    assert kinds <= {"display_data", "stream"}  # and no error
