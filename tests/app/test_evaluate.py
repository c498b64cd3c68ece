"""Evaluation as a process: protocol, rounds, reference, waiting, damage."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from warm_diffusion.app import fid
from warm_diffusion.app.drawing import Sampler
from warm_diffusion.app.evaluate import checkpoint_choice


def report_of(workdir, step=6):
    return json.loads((workdir / "eval" / f"step_{step:08d}.json").read_text())


@pytest.fixture(scope="module")
def evaluated(app, trained, tmp_path_factory):
    """A workdir with the evaluation of three ranges of 24 seeds, and what was printed."""
    workdir = tmp_path_factory.mktemp("evaluated")
    out, err = app.run(
        "--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={workdir}",
        "--config.eval.num_samples=24", "--config.eval.repeats=3", tiny=False,
    )  # fmt: skip
    assert err == ""
    return workdir, out


# --- the report ----------------------------------------------------------------------------------


def test_a_report_states_its_protocol(app, trained, evaluated):
    report = report_of(evaluated[0])
    data = json.loads(next((app.folder / "cache").rglob("digits-*/dataset.json")).read_text())
    assert report["seeds"] == "0-71"
    assert [r["seeds"] for r in report["rounds"]] == ["0-23", "24-47", "48-71"]
    assert (report["solver"], report["network_calls"]) == ("heun", 3)  # two steps: 2 * 2 - 1
    assert report["bnr"] == 0.5
    assert report["weights"] == "EMA, half-life 100 images"
    assert report["features"] == {"name": "pixels", "weights_hash": ""}
    assert report["reference"]["count"] == 1797
    assert report["reference"]["data_sha256"] == data["content_sha256"]
    assert len(report["reference"]["sha256"]) == len(report["weights_sha256"]) == 64
    assert "24 samples are few" in report["warning"]
    assert "warning  24 samples are few" in evaluated[1]


def test_a_range_is_the_png_files_of_its_seeds(app, trained, evaluated, tmp_path, capsys):
    """The same distance from what --mode=sample draws, by the command on folders."""
    app.run(
        "--mode=sample", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}", "--seeds=24-47",
        tiny=False,
    )  # fmt: skip
    folder = next((tmp_path / "generated").rglob("sampling.json")).parent
    statistics = next((evaluated[0] / "eval").glob("reference_*.npz"))
    capsys.readouterr()
    assert fid.main([str(folder), str(statistics)]) == 0
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("fd_pixels_24 "))
    expected = report_of(evaluated[0])["rounds"][1]["fd_pixels_24"]
    assert float(line.split()[1]) == pytest.approx(expected, rel=1e-5)


def test_eight_devices_and_other_batches_find_the_same_distance(app, trained, evaluated, tmp_path):
    """Another batch is another program: pixels may differ by one grey level of 255."""
    app.run(
        "--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
        "--config.eval.num_samples=24", "--config.sampling.batch_size=16", tiny=False,
        environment=[("XLA_FLAGS", "--xla_force_host_platform_device_count=8")],
    )  # fmt: skip
    report = report_of(tmp_path)
    assert report["device"] == "8 x cpu"
    expected = report_of(evaluated[0])["rounds"][0]["fd_pixels_24"]
    assert report["fd_pixels_24"] == pytest.approx(expected, rel=1e-3)


def test_the_same_evaluation_is_not_done_twice_and_another_loses_nothing(
    app, trained, evaluated, tmp_path
):
    workdir = tmp_path / "copy"
    shutil.copytree(evaluated[0], workdir)
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={workdir}",
              "--config.eval.num_samples=24")  # fmt: skip
    before = report_of(workdir)
    out, _ = app.run(*common, "--config.eval.repeats=3", tiny=False)
    assert "step 6 is evaluated already" in out
    assert report_of(workdir) == before
    out, _ = app.run(*common, "--solver=euler", tiny=False)
    assert "the report of another protocol is now" in out
    after = report_of(workdir)
    assert (after["solver"], after["network_calls"]) == ("euler", 2)
    aside = workdir / "eval" / f"step_00000006.{before['identity']}.json"
    assert json.loads(aside.read_text()) == before
    lines = (workdir / "eval" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2


def test_a_likelihood_is_added_to_the_samples_there_are(app, trained, evaluated, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(evaluated[0], workdir)
    before = report_of(workdir)
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={workdir}",
              "--config.eval.num_samples=24", "--config.eval.repeats=3",
              "--config.eval.likelihood=True", "--config.eval.likelihood_images=5")  # fmt: skip
    app.run(*common, tiny=False)
    report = report_of(workdir)
    assert report["rounds"] == before["rounds"]  # not drawn again
    # six steps of training: no better than the eight bits of a uniform density, by far no NaN
    assert 0 < report["bpd5_train"] < 16
    assert 0 < report["bpd5_train_standard_error"] < 2
    assert report["likelihood"] == {"images": 5, "trace": "hutchinson"}


def test_more_rounds_use_those_there_are(app, trained, evaluated, tmp_path, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(evaluated[0], workdir)
    drawn, original = [], Sampler.generate

    def generate(self, params, seeds, images):
        drawn.append(seeds)
        return original(self, params, seeds, images)

    monkeypatch.setattr(Sampler, "generate", generate)
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={workdir}",
              "--config.eval.num_samples=24")  # fmt: skip
    app.run(*common, "--config.eval.repeats=4", tiny=False)
    assert drawn == [range(72, 96)]
    report = report_of(workdir)
    assert report["rounds"][:3] == report_of(evaluated[0])["rounds"]
    assert report["seeds"] == "0-95"


def test_a_stopped_evaluation_loses_the_round_it_was_in(app, trained, tmp_path, monkeypatch):
    arguments = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
                 "--config.eval.num_samples=24", "--config.eval.repeats=2")  # fmt: skip
    original = Sampler.generate

    def generate(self, params, seeds, images):
        for n, batch in enumerate(original(self, params, seeds, images)):
            if n == 1 and seeds[0] == 24:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", generate)
        _, err = app.run(*arguments, tiny=False, status=75)
    assert "SIGTERM: stopped within the round of seeds 24-47" in err
    (kept,) = (tmp_path / "eval" / "rounds").iterdir()
    assert not list((tmp_path / "eval").glob("step_*.json"))
    app.run(*arguments, tiny=False)
    report = report_of(tmp_path)
    assert report["rounds"][0] == json.loads(kept.read_text())
    assert [r["seeds"] for r in report["rounds"]] == ["0-23", "24-47"]


# --- the reference -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(app, trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("statistics")
    out, err = app.run("--mode=fid_stats", f"--workdir={workdir}")
    assert err == ""
    assert "data_sha256" in out
    return workdir / "pixels_train_1797.npz"


def test_statistics_from_a_file_give_the_numbers_that_the_data_give(
    app, trained, evaluated, statistics, tmp_path
):
    app.run(
        "--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
        "--config.eval.num_samples=24", f"--config.eval.reference={statistics}",
        "--config.data.source=folder:not-there", tiny=False,
    )  # fmt: skip
    report, expected = report_of(tmp_path), report_of(evaluated[0])
    assert report["rounds"][0] == expected["rounds"][0]
    assert report["reference"] == expected["reference"]


def test_statistics_of_other_images_are_refused(app, trained, tmp_path):
    other = np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8)
    np.save(tmp_path / "other.npy", other)
    source = f"--config.data.source=npy:{tmp_path / 'other.npy'}"
    app.run("--mode=fid_stats", f"--workdir={tmp_path}", source)
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
              "--config.eval.num_samples=24")  # fmt: skip
    given = f"--config.eval.reference={tmp_path / 'pixels_train_50.npz'}"
    _, err = app.run(*common, given, tiny=False, status=2)
    assert "data_sha256 is" in err
    _, err = app.run(*common, source, tiny=False, status=2)
    assert "data_sha256 is" in err
    assert not (tmp_path / "eval" / "step_00000006.json").exists()
    # another part of the data, called so, is no mistake, and part of the name
    app.run(*common, source, "--config.eval.split=test", tiny=False)
    assert report_of(tmp_path)["metric"] == "fd_pixels_24_test"


def test_statistics_of_other_features_are_refused(app, trained, statistics, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def corners(images):\n    return images[:, ::7, ::7, 0].reshape(len(images), 4) / 255\n"
    )
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}",
              "--config.eval.num_samples=24", "--config.eval.features=mine:corners")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    _, err = app.run(*common, f"--config.eval.reference={statistics}", tiny=False, status=2)
    assert "features is 'pixels', expected 'mine:corners'" in err
    app.run(*common, tiny=False)
    assert report_of(tmp_path)["fd_mine.corners_24"] > 0


# --- checkpoints ---------------------------------------------------------------------------------


def test_every_checkpoint_is_evaluated_and_a_damaged_one_counted(app, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (run / "checkpoints" / "5").mkdir()  # half written: no array in it
    arguments = ("--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}", "--solver=euler",
                 "--config.eval.num_samples=8", "--config.eval.checkpoint=every")  # fmt: skip
    out, err = app.run(*arguments, tiny=False, status=4)
    assert "1 of 3 checkpoints" in err
    assert "(steps [5])" in err
    assert "skipped  step 5: checkpoint 5" in out
    assert [report_of(tmp_path, step)["step"] for step in (3, 6)] == [3, 6]
    assert report_of(tmp_path, 3)["fd_pixels_8"] != report_of(tmp_path, 6)["fd_pixels_8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.eval.checkpoint=4"], "there is no checkpoint of step 4"),
        (["--config.eval.checkpoint=best"], "evaluate with --config.eval.checkpoint=every first"),
        (["--config.eval.features=inception"], "is not there: fetch it with --download"),
        (["--config.eval.reference=gone.npz"], "--mode=fid_stats writes them"),
    ],
)
def test_a_mistake_is_refused_in_one_line(app, trained, tmp_path, arguments, message):
    common = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}")
    _, err = app.run(*common, *arguments, tiny=False, status=2)
    assert message in err
    assert len(err.splitlines()) == 1


def test_waiting_beside_a_training_run_evaluates_each_checkpoint_and_ends(
    app, trained, tmp_path, monkeypatch
):
    run, steps = tmp_path / "run", ["3", "6"]

    def sleep(seconds):
        """The run goes on meanwhile."""
        step = steps.pop(0)
        shutil.copytree(trained[0] / "checkpoints" / step, run / "checkpoints" / step)
        shutil.copy(trained[0] / "config.json", run)

    monkeypatch.setattr(checkpoint_choice.time, "sleep", sleep)
    common = (
        "--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}",
        "--config.eval.num_samples=8", "--config.training.num_steps=6",
        "--config.training.checkpoint_every=3", "--config.training.sample_every=6",
    )  # fmt: skip
    out, _ = app.run(*common, "--config.eval.checkpoint=every", "--wait=120")
    assert out.startswith("wait     for a checkpoint in")
    assert [report_of(tmp_path, step)["step"] for step in (3, 6)] == [3, 6]
    assert steps == []
    best = min((3, 6), key=lambda step: report_of(tmp_path, step)["fd_pixels_8"])
    out, _ = app.run(*common, "--config.eval.checkpoint=best")
    assert f"best     step {best} of 2: fd_pixels_8 " in out
    assert f"step {best} is evaluated already" in out


def test_a_run_of_another_configuration_is_not_evaluated_by_mistake(
    app, tmp_path, trained, monkeypatch
):
    """Started before the run's config.json is there, the job has only its own configuration."""
    run = tmp_path / "run"
    monkeypatch.setattr(
        checkpoint_choice.time, "sleep", lambda seconds: shutil.copytree(trained[0], run)
    )
    out, err = app.run(
        "--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}", "--wait=120",
        "--config.schedule.constant_bnr.bnr=0.3", "--config.training.num_steps=6", status=2,
    )  # fmt: skip
    assert out.startswith("wait     for a checkpoint")
    assert "bnr: 0.5 -> 0.3" in err
