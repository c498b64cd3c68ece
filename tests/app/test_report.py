"""--mode=report: a run on one page that needs no other file."""

import html.parser
import itertools
import json
import re
import shutil

import numpy as np
import pytest

from tests import browser
from warm_diffusion.runtime import storage


@pytest.fixture(scope="module")
def run(app, trained, tmp_path_factory):
    """A copy of the tiny run, with two sample grids, an evaluation and an analysis."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(trained[0], folder)
    shutil.copy(folder / "samples" / "step_00000006.png", folder / "samples" / "step_00000003.png")
    app.run(
        "--mode=eval", f"--workdir={folder}", "--config.eval.num_samples=16",
        "--config.eval.seed_ranges=2", "--config.eval.report=True", tiny=False,
    )  # fmt: skip
    assert (folder / "report.html").exists()  # asked for by eval.report
    app.run("--mode=analyze", f"--workdir={folder}", tiny=False)
    # What a checkpoint's analysis writes, which test_manifold.py makes: its figures' part.
    rings = {key: [None, 0.5, 0.1] for key in ("spectral_departure", "denoiser", "deblurrer")}
    numbers = ("sliced_wasserstein", "sliced_wasserstein_of_forward", "consistency")
    step = {"alpha": 0.5, "beta": 1.0, **rings, **dict.fromkeys(numbers, 0.01)}
    told = {"title": "digits, three steps", "frequency": [0.0, 0.3, 0.6], "steps": [step] * 4}
    storage.write_json(folder / "analysis" / "sampling.json", told)
    shutil.copy(folder / "analysis" / "forward.png", folder / "analysis" / "film.png")
    out, err = app.run("--mode=report", f"--workdir={folder}", tiny=False)
    assert (err, f"{folder}/report.html" in out) == ("", True)
    return folder


def test_pictures_of_both_folders_are_shown(app, run, tmp_path):
    other = tmp_path / "elsewhere"
    shutil.copytree(run / "analysis", other / "analysis")
    app.run("--mode=report", f"--checkpoint={run}", f"--workdir={other}", tiny=False)
    text = (other / "report.html").read_text()
    for name in ("Forward process", "Sampling: states"):
        found = re.findall(rf"{name}[^<]*: (run|elsewhere)<", text)
        assert set(found) == {"run", "elsewhere"}


class Page(html.parser.HTMLParser):
    """Text and tags; fails on an end that has no start."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(text.strip())


@pytest.fixture(scope="module")
def page(run):
    return Page((run / "report.html").read_text())


def test_it_holds_all_that_it_shows(page):
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 4  # two grids, two film strips
    anchors = {a["href"] for tag, a in page.tags if tag == "a"}
    assert anchors == {f"#{a['id']}" for tag, a in page.tags if tag == "h2" and "id" in a}
    links = [
        value for _, a in page.tags for name, value in a.items()
        if name in ("href", "xlink:href") and not value.startswith(("#", "data:"))
    ]  # fmt: skip
    assert links == []


def test_it_tells_the_numbers_of_the_run(run, page):
    text = " ".join(page.words)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['loss']:.4f} (denoise {last['denoise']:.4f}" in text
    (path,) = (run / "eval").glob("step_*.json")
    report = json.loads(path.read_text())
    value, spread = (report[f"fd_pixels_16{end}"] for end in ("", "_std"))
    assert f"{value:.4g} ± {spread:.2g}" in text
    assert report["weights_sha256"] in text
    assert report["reference"]["sha256"] in text
    for word in ("model_channels", "data_sha256", "orbax-checkpoint"):
        assert word in text
    recommended = json.loads((run / "analysis" / "analysis.json").read_text())["recommended_bnr"]
    assert f"recommended blur-to-noise ratio {recommended:.2f}" in text
    assert text.count("digits, three steps") == 2
    svgs = [tag for tag, _ in page.tags if tag == "svg"]
    assert len(svgs) == 4 + 3  # losses, gradient, consistency, speed; spectrum, departure, heads


def test_identifiers_are_each_for_one_thing(run):
    text = (run / "report.html").read_text()
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = itertools.chain(*re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text))
    assert set(used) - {""} <= set(names)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_its_slider_goes_through_the_steps_and_it_fits_a_phone(run, scheme):
    phone = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with browser.opened(run / "report.html", **phone) as view:
        assert view.evaluate("document.documentElement.scrollWidth") <= 390
        shown = view.locator("#sample-figure img:visible")
        assert shown.evaluate_all("i => i.map((x) => x.dataset.step)") == ["6"]
        slider = view.locator("#sample-figure input")
        slider.evaluate("s => { s.value = 0; s.dispatchEvent(new Event('input')); }")
        assert shown.evaluate_all("i => i.map((x) => x.dataset.step)") == ["3"]
        assert "Step 3" in view.locator("#sample-figure figcaption").inner_text()
        colours = view.evaluate(
            "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
        )
        ink, paper = (np.mean([int(n) for n in re.findall(r"\d+", c)[:3]]) for c in colours)
        assert (ink < 100 < paper) if scheme == "light" else (paper < 100 < ink)


def test_a_run_on_gs_has_its_report_there(app, trained, store):
    place = storage.path("gs://bucket/reported")
    files = [path for path in trained[0].rglob("*") if path.is_file()]
    storage.write_files({place / str(p.relative_to(trained[0])): p.read_bytes() for p in files})
    app.run("--mode=report", f"--workdir={place}", tiny=False)
    text = (place / "report.html").read_bytes().decode()
    assert "samples at step 6" in text


def test_a_report_of_another_folder_goes_to_the_workdir(app, trained, tmp_path):
    app.run("--mode=report", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}", tiny=False)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("nowhere", "is not a training workdir: it has no config.json"),
     ("pretrained/digits", "is a model folder")],
)  # fmt: skip
def test_what_is_no_run_is_refused(app, tmp_path, checkpoint, message):
    _, err = app.run(
        "--mode=report", f"--checkpoint={checkpoint}", f"--workdir={tmp_path}", status=2, tiny=False
    )
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
