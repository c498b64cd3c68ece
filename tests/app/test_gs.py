"""The modes of main.py with everything on gs://: what a run there does is what it does on disk."""

import itertools

import numpy as np
import pytest

from tests.app.conftest import STEPS, assert_same_run, copy
from tests.object_store import LOST
from warm_diffusion import pretrained
from warm_diffusion.runtime import gcs, storage


@pytest.fixture(scope="module")
def run(trained, store):
    """The tiny run of 6 steps."""
    return copy(trained[0], "gs://bucket/trained")


def test_samples_of_a_run_on_gs_are_those_of_the_run_on_disk(app, trained, run, tmp_path):
    """Its configuration is found beside the checkpoint, too: no flag says how it was trained."""
    pictures = {}
    for source, place in ((trained[0], tmp_path), (run, storage.path("gs://bucket/samples"))):
        flags = ("--mode=sample", f"--checkpoint={source}", f"--workdir={place}", "--seeds=0-2")
        app.run(*flags, tiny=False)
        pictures[place] = {p.name: p.read_bytes() for p in (place / "generated").glob("*/*.png")}
    disk, gs = pictures.values()
    assert gs == disk
    assert len(gs) == 3


def test_an_evaluation_on_gs_keeps_its_report_and_its_reference(app, run):
    flags = ("--mode=eval", f"--checkpoint={run}", "--workdir=gs://bucket/eval",
             "--config.eval.repeats=1", "--config.eval.num_samples=16")  # fmt: skip
    _, err = app.run(*flags, tiny=False)
    assert err == ""
    folder = storage.path("gs://bucket/eval/eval")
    report = storage.read_json(folder / "step_00000006.json")
    assert np.isfinite(report["fd_pixels_16"])
    names = {path.name.partition(".")[0].partition("_")[0] for path in folder.iterdir()}
    assert names == {"step", "rounds", "reference", "metrics", "events"}  # and nothing partial
    out, _ = app.run(*flags[:-1], "--config.eval.num_samples=15", tiny=False)
    assert f"the report of another protocol is now {folder}/step_00000006." in out
    assert len(list(folder.glob("step_*.json"))) == 2


@pytest.mark.long
def test_an_analysis_is_written_to_gs(app, run):
    app.run("--mode=analyze", f"--checkpoint={run}", "--workdir=gs://bucket/analysis",
            "--config.analysis.num_images=16", tiny=False)  # fmt: skip
    folder = storage.path("gs://bucket/analysis/analysis")
    assert storage.read_json(folder / "analysis.json")["count"] == 1797
    assert storage.read_json(folder / "sampling.json")["step"] == 6
    for name in ("spectrum", "forward", "departure", "heads", "film"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_a_model_exported_to_gs_is_loaded_from_there(app, run):
    url = "gs://bucket/model"
    flags = ("--mode=export", f"--checkpoint={run}/checkpoints/3", f"--workdir={url}")
    app.run(*flags, "--config.export.num_images=1", tiny=False)
    model = pretrained.load(url)
    assert model.info["step"] == 3
    expected = pretrained.load(run / "checkpoints" / "3").info["weights_sha256"]
    assert model.info["weights_sha256"] == expected
    _, err = app.run(*flags, tiny=False, status=2)
    assert "gs://bucket/model is not empty: a model is written to a new folder" in err


def test_a_run_on_gs_goes_back_over_a_damaged_checkpoint_bit_for_bit(app, trained, run):
    """Trained on there from the step before, it is the run that was trained on disk."""
    place = copy(trained[0], "gs://bucket/damaged_run")
    data = place / "checkpoints" / "6" / "state" / "d"
    for path in data.iterdir():
        storage.write_bytes(path, path.read_bytes()[:100])
    out, err = app.run(f"--config={place}/config.json", f"--workdir={place}", tiny=False)
    assert err == ""
    assert f"checkpoint 6 of {place} cannot be restored" in out
    assert "continues at step 3 (48 images), in gs://" in out
    assert (place / "damaged" / "6" / "state").is_dir()
    assert_same_run(place, trained[0], step=6)
    picture = "samples/step_00000006.png"
    assert (place / picture).read_bytes() == (trained[0] / picture).read_bytes()
    assert len(list(place.glob("events.out.tfevents.*"))) == 2


@pytest.mark.long
def test_a_store_that_falters_changes_nothing(
    app, uninterrupted, faulty_store, tmp_path, monkeypatch
):
    """Every 40th answer is lost or an error, to orbax's threads as well."""
    monkeypatch.setattr(gcs, "_FIRST_PAUSE", 0.001)
    requests, faults = itertools.count(1), itertools.cycle([LOST, (503, "busy"), (429, "busy")])
    faulty_store.answer = lambda *_: None if next(requests) % 40 else next(faults)
    place = storage.path("gs://bucket/falters")
    _, err = app.run(f"--workdir={place}", *STEPS)
    assert err == ""
    assert next(requests) > 200
    faulty_store.answer = lambda *_: None
    assert_same_run(place, uninterrupted)
    names = {path.name.partition(".")[0] for path in place.iterdir()}
    assert names == {"checkpoints", "config", "events", "metrics"}


@pytest.mark.parametrize(
    ("method", "part", "message"),
    [
        ("POST", "metrics.jsonl", "gs://bucket/refused/metrics.jsonl: permission"),
        pytest.param(
            "POST", "/state/", "gs://bucket/refused/checkpoints/4/state", marks=pytest.mark.long
        ),
        ("DELETE", "", "gs://bucket/refused/lock.json.probe: permission"),
        ("GET", "config.json", "gs://bucket/refused/config.json: permission"),
    ],
)
def test_what_may_not_be_written_is_one_line_that_names_object_and_permission(
    app, faulty_store, method, part, message
):
    refusal = f"Permission 'storage.objects.{method.lower()}' denied on resource"
    faulty_store.answer = lambda verb, path: (
        (403, refusal) if verb == method and part in path else None
    )
    _, err = app.run("--workdir=gs://bucket/refused", *STEPS, status=2)
    assert message in err
    assert f"storage.objects.{method.lower()}" in err
    assert len(err.splitlines()) == 1
    faulty_store.answer = lambda *_: None
    storage.remove(storage.path("gs://bucket/refused"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=gs://no-bucket/run"], "there is no bucket gs://no-bucket"),
        (["--mode=sample", "--workdir=gs://bucket/0"], "there is no trained network in gs://"),
        (["--config=gs://bucket/x.json", "--workdir=w"], "gs://bucket/x.json: not a configuration"),
        (
            ["--workdir=gs://bucket/0", "--config.data.source=zip:gs://bucket/absent.zip"],
            "there is no file gs://bucket/absent.zip",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    app, store, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    _, err = app.run(*arguments, tiny=False, status=2)
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert not storage.path("gs://bucket/0").exists()
