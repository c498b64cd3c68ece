"""The ratio that the data choose: at start, in the run's configuration, and from then on."""

import copy
import json

import jax
import numpy as np
import pytest

from configs import default
from warm_diffusion import schedules, spectra
from warm_diffusion.app import build
from warm_diffusion.app.train.ratio import realise_bnr


def config_with(**options):
    config = default.get_config()
    config.data.source = "digits"
    config.schedule.update(options)
    return config


def test_auto_is_what_the_data_recommend():
    config = config_with(bnr="auto")
    expected = spectra.recommend_bnr(build.data_statistics(config).spectrum, 0.05)
    assert abs(build.bnr(config) - expected) <= 0.0005
    assert float(build.schedule(config).bnr(1.0)) == pytest.approx(expected, abs=0.001)


def test_auto_follows_the_attenuation():
    gentle, strong = (build.bnr(config_with(bnr="auto", attenuation=a)) for a in (0.01, 0.2))
    assert gentle < 0.7 * strong


def test_the_number_takes_the_place_of_auto_and_the_curve_comes_with_it(capsys):
    config = config_with(bnr="auto")
    realised, report = realise_bnr(config, None)
    assert realised.schedule.bnr == report["recommended_bnr"] == build.bnr(config)
    assert config.schedule.bnr == "auto"  # the caller's is left alone
    # 5 % of the worst band is lost at the recommended ratio: less below it, more above.
    curve = report["least_kept_by_bnr"]
    assert curve["0.1"] > 0.95 > curve["0.5"] > curve["10.0"]
    assert f"auto: {realised.schedule.bnr}" in capsys.readouterr().out


def test_a_run_that_has_begun_keeps_its_number():
    began = {"schedule": {"bnr": 0.123}}
    config, report = realise_bnr(config_with(bnr="auto"), began)
    assert config.schedule.bnr == 0.123
    assert report is None


@pytest.mark.parametrize("bnr", [0.5, 0, 2])
def test_a_number_stays(bnr):
    config = config_with(bnr=bnr)
    assert realise_bnr(config, None) == (config, None)
    assert build.bnr(config) == bnr


@pytest.mark.parametrize("bnr", ["atuo", None, True, (0.1, 0.5)])
def test_what_is_neither_a_number_nor_auto_is_refused(bnr):
    config = config_with()
    config.schedule.bnr = bnr
    with pytest.raises(ValueError, match=r"schedule\.bnr must be a number or auto, got"):
        build.schedule(config)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "hot"}, schedules.hot()),
        ({"name": "any_bnr", "bnr": 0.3}, schedules.constant_bnr(0.3)),
        (
            {"name": "blurring_diffusion", "sigma_blur_max": 4.0},
            schedules.blurring_diffusion(sigma_blur_max=4.0),
        ),
        ({"name": "cold", "cold_beta": 0.02}, schedules.cold(beta=0.02)),
    ],
)
def test_a_schedule_is_chosen_by_name(options, expected):
    path = build.schedule(config_with(**options))
    for t in (path.t_min, 0.3 * path.t_max, path.t_max):
        assert float(path.alpha(t)) == pytest.approx(float(expected.alpha(t)))
        assert float(path.beta(t)) == pytest.approx(float(expected.beta(t)))


def test_the_spectral_schedule_is_that_of_the_data():
    config = config_with(name="spectral", attenuation=0.1)
    expected = schedules.spectral(build.data_statistics(config).spectrum, 0.1)
    for t in (0.01, 0.5, 50.0):
        assert float(build.schedule(config).alpha(t)) == pytest.approx(float(expected.alpha(t)))


def test_any_bnr_trains_over_the_range_and_the_share_asked_for():
    path = build.schedule(config_with(name="any_bnr", bnr_range=(2.0, 3.0), hot_share=0.5))
    alpha, beta = path.sample_levels(jax.random.key(0), (1000,))
    ratios = np.asarray(alpha / beta)
    assert abs(np.mean(ratios == 0) - 0.5) < 5 * 0.5 / 1000**0.5
    assert 2.0 - 1e-5 <= ratios[ratios > 0].min() < ratios.max() <= 3.0 + 1e-5


def test_training_any_bnr_can_be_sampled_at_another_ratio():
    config = config_with(name="any_bnr")
    assert float(build.sampling_schedule(config).bnr(1.0)) == pytest.approx(0.5)
    config = copy.deepcopy(config)
    config.sampling.bnr = 2.0
    assert float(build.sampling_schedule(config).bnr(1.0)) == pytest.approx(2.0)


@pytest.mark.long
def test_a_run_with_auto_writes_resumes_and_samples_with_the_number(app, tmp_path):
    run = (f"--workdir={tmp_path}", "--config.schedule.bnr=auto")
    out, _ = app.run(*run, "--config.training.num_steps=1")
    number = json.loads((tmp_path / "config.json").read_text())["schedule"]["bnr"]
    assert json.loads((tmp_path / "bnr.json").read_text())["recommended_bnr"] == number
    assert 0.2 < number < 0.35  # the digits'
    assert f"bnr      auto: {number}, at which no band" in out
    out, _ = app.run(*run, "--config.training.num_steps=2")
    assert f"bnr      auto: {number}, as this run began" in out
    app.run("--mode=sample", f"--workdir={tmp_path}", "--seeds=0-1", tiny=False)
    about = next((tmp_path / "generated").rglob("sampling.json"))
    assert json.loads(about.read_text())["schedule"]["bnr"] == number


def test_the_ratio_is_a_number_or_auto_on_the_command_line(app, tmp_path):
    out, _ = app.run("--mode=info", "--details", "--config.schedule.bnr=0.3")
    assert '"bnr": 0.3' in out
    _, err = app.run(
        f"--workdir={tmp_path}", "--config.schedule.bnr=atuo", tiny=False, status=2
    )  # fmt: skip
    assert err == "error: schedule.bnr must be a number of at least 0 or auto, got 'atuo'\n"
