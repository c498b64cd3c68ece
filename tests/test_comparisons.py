"""The comparisons of benchmarks/: their short training is the app's, and they can be stopped."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from benchmarks import ablation, bnr_sweep, comparison, nfe_curve
from benchmarks.judge import Judge
from configs import digits
from warm_diffusion import pretrained, samplers, schedules
from warm_diffusion.app import build
from warm_diffusion.app.train import train
from warm_diffusion.data.images import to_uint8


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny_config():
    config = digits.get_config()
    config.compilation_cache_dir = ""
    config.model.model_channels, config.model.channel_mult = 8, (1,)
    config.model.attention_resolutions = ()
    config.training.num_steps, config.training.batch_size = 3, 16
    config.training.ema_halflife_images, config.training.ema_rampup = (50,), 0.0
    config.optimizer.warmup_images = 0
    config.sampling.batch_size = 8
    return config


def options(out, **changes):
    """The flags of a comparison of two trainings."""
    values = {
        "config": tiny_config(), "out": str(out), "seeds": ["0"], "solvers": ["euler:2"],
        "samples": 16, "features": "pixels", "classifier_steps": 2, "minutes": 0.0,
        "ratios": ["0", "2"], "any_ratios": [],
    }  # fmt: skip
    return types.SimpleNamespace(**(values | changes))


@pytest.mark.long
def test_a_trained_ratio_has_the_weights_of_the_apps_own_run(tmp_path):
    config = tiny_config()
    config.schedule.constant_bnr.bnr, config.seed = 2.0, 5
    state = train(config, str(tmp_path / "run"))
    other = tiny_config()  # its own ratio and seed are arguments here
    trainer = comparison.Trainer(
        other, build.dataset(other), comparison.Timer(), schedules.constant_bnr
    )
    trained = trainer.train(seed=5, ratio=2.0)
    expected = jax.tree.leaves(state.ema[0])
    for got, leaf in zip(jax.tree.leaves(trained.params), expected, strict=True):
        np.testing.assert_allclose(got, leaf, atol=2e-5)
    assert trained.facts["images_seen"] == 48


def rows(out):
    """By cell, without the seconds."""
    lines = (out / "results.jsonl").read_text().splitlines()
    found = {}
    for row in (row for line in lines for row in json.loads(line)):
        key = (row["bnr"], row["seed"], row["solver"])
        assert key not in found
        found[key] = {name: x for name, x in row.items() if not name.endswith("seconds")}
    return found


@pytest.mark.long
def test_a_sweep_in_two_sittings_has_the_rows_of_one(tmp_path, capsys):
    bnr_sweep.sweep(options(tmp_path / "one"))
    bnr_sweep.sweep(options(tmp_path / "two", ratios=["2"]))
    bnr_sweep.sweep(options(tmp_path / "two"))
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert sorted(rows(tmp_path / "two")) == [(0.0, 0, "euler"), (2.0, 0, "euler")]
    pictures = sorted(path.name for path in (tmp_path / "two" / "images").iterdir())
    assert pictures == ["fixed_0_0_euler_2.png", "fixed_2_0_euler_2.png"]
    capsys.readouterr()
    bnr_sweep.sweep(options(tmp_path / "two"))  # nothing left to train
    assert "trained" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="results of other settings"):
        bnr_sweep.sweep(options(tmp_path / "two", samples=24))


def test_results_of_two_processes_lie_side_by_side_and_a_cut_line_is_forgotten(tmp_path):
    one = comparison.Results(tmp_path, tiny_config(), {})
    one.add([{"seed": 0}])
    with one.path.open("a") as file:
        file.write('[{"seed": 1')  # killed while it wrote
    other = comparison.Results(tmp_path, tiny_config(), {})
    other.add([{"seed": 2}])
    assert one.rows == other.rows == [{"seed": 0}, {"seed": 2}]
    assert one.has(seed=2)
    assert not one.has(seed=1)


def test_a_variant_that_is_not_known_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"--variants must be of divide.*got 'dvide'"):
        ablation.ablate(options(tmp_path / "out", variants=["dvide"]))
    assert not (tmp_path / "out").exists()


def curve_options(out, *checkpoints, **changes):
    """The command line of `nfe_curve`."""
    values = {
        "checkpoints": [str(path) for path in checkpoints], "out": pathlib.Path(out),
        "samples": 16, "calls": [3, 4], "solvers": ["euler", "heun"], "noise_range": [0.5, 3.0],
        "features": "pixels", "classifier_steps": 2, "inception_weights": "",
        "grids": ["edm"], "ratios": None, "first_seeds": [0], "source": "", "batch_size": 0,
    }  # fmt: skip
    return types.SimpleNamespace(**(values | changes))


@pytest.mark.long
def test_a_curve_has_each_number_of_calls_once_along_the_range_asked_for(tmp_path):
    config = tiny_config()
    train(config, str(tmp_path / "run"))
    nfe_curve.compare(curve_options(tmp_path / "curve", tmp_path / "run"))
    rows = json.loads((tmp_path / "curve" / "nfe.json").read_text())["rows"]
    assert [(row["solver"], row["nfe"]) for row in rows] == [
        ("euler", 3),
        ("euler", 4),
        ("heun", 3),
    ]
    # The pure sampler on the path of that range, with its two steps of Heun, draws the same.
    model = pretrained.load(tmp_path / "run")
    noise = samplers.initial_noise(np.arange(16, dtype=np.uint32), model.image_shape)
    images = samplers.sample(
        model.denoise,
        noise,
        schedules.constant_bnr(config.schedule.constant_bnr.bnr, beta_min=0.5, beta_max=3.0),
        num_steps=2,
    )
    judge = Judge(
        config, build.dataset(config), tmp_path, curve_options(tmp_path, tmp_path / "run")
    )
    for name, distance in judge(np.asarray(to_uint8(images))).items():
        assert rows[2][name] == pytest.approx(distance, rel=1e-3)
    # Started again, for another grid and ratio as well, it measures what it lacks.
    more = curve_options(
        tmp_path / "curve", tmp_path / "run", solvers=["euler"], calls=[3], ratios=[0.0],
        grids=["spectral", "2,1,0"],
    )  # fmt: skip
    nfe_curve.compare(more)
    nfe_curve.compare(more)
    after = json.loads((tmp_path / "curve" / "nfe.json").read_text())["rows"]
    assert after[:3] == rows
    assert [(row["grid"], row["ratio"], row["nfe"]) for row in after[3:]] == [
        ("spectral", 0.0, 3),
        ("2,1,0", 0.0, 2),
    ]
    found = samplers.sample(
        model.denoise, noise, schedules.hot(beta_min=0.5, beta_max=3.0), solver="euler",
        grid=[2.0, 1.0, 0.0], prior=(model.mean, model.spectrum),
    )  # fmt: skip
    for name, distance in judge(np.asarray(to_uint8(found))).items():
        assert after[4][name] == pytest.approx(distance, rel=1e-3)


def test_a_range_that_a_path_cannot_have_is_refused(tmp_path):
    config = tiny_config()
    config.schedule.name = "cold"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="schedule cold has noise levels of its own"):
        nfe_curve.compare(curve_options(tmp_path / "out", tmp_path))
    config.schedule.name = "hot"
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="expected 0 < beta_min < beta_max"):
        nfe_curve.compare(curve_options(tmp_path / "out", tmp_path, noise_range=[3.0, 0.5]))


def test_a_curve_of_checkpoints_of_different_images_is_refused(tmp_path):
    for name in ("one", "two"):
        config = tiny_config()
        config.data.channels = 1 if name == "one" else 3
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="two was trained on other data"):
        nfe_curve.compare(curve_options(tmp_path / "out", tmp_path / "one", tmp_path / "two"))
    assert not (tmp_path / "out").exists()
