"""The path of a run: chosen by name, its ratio by number or by the data."""

import json

import numpy as np
import pytest

from configs import default
from tests.test_benchmarks import tiny_config
from warm_diffusion import pretrained, schedules, spectra
from warm_diffusion.app import build
from warm_diffusion.app.train import train


def config_with(**options):
    config = default.get_config()
    config.data.source = "digits"
    config.update_from_flattened_dict({f"schedule.{k}": v for k, v in options.items()})
    return config


def auto(attenuation=0.05):
    config = config_with(**{"spectral.attenuation": attenuation})
    config.schedule.constant_bnr.bnr = "auto"
    return config


def test_auto_is_what_the_data_recommend():
    config = auto()
    expected = spectra.recommend_bnr(build.data_statistics(config).spectrum, 0.05)
    assert build.realised(config).schedule.constant_bnr.bnr == round(expected, 3)
    assert config.schedule.constant_bnr.bnr == "auto"  # the caller's is left alone
    assert float(build.schedule(config).bnr(1.0)) == pytest.approx(expected, abs=0.001)


def test_auto_follows_the_attenuation():
    gentle, strong = (build.realised(auto(a)).schedule.constant_bnr.bnr for a in (0.01, 0.2))
    assert gentle < 0.7 * strong


def test_a_number_stays():
    config = config_with(**{"constant_bnr.bnr": 2})
    assert build.realised(config) is config
    assert float(build.schedule(config).bnr(1.0)) == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hot", {"beta_max": 40.0}),
        ("any_bnr", {"bnr": 0.3, "bnr_range": (2.0, 3.0), "hot_share": 0.5}),
        ("blurring_diffusion", {"sigma_blur_max": 4.0}),
        ("cold", {"beta": 0.02}),
        ("spectral", {"attenuation": 0.1}),
    ],
)
def test_a_schedule_is_chosen_by_name_with_the_numbers_of_its_section(name, options):
    config = config_with(name=name, **{f"{name}.{key}": value for key, value in options.items()})
    if name == "spectral":
        options = options | {"spectrum": build.data_statistics(config).spectrum}
    assert build.schedule(config) == schedules.PATHS[name](**options)


def test_a_network_is_sampled_along_another_ratio_between_the_levels_of_its_path():
    config = config_with(name="any_bnr", **{"any_bnr.beta_max": 9.0})
    assert build.sampling_schedule(config) == schedules.any_bnr(beta_max=9.0)
    config.sampling.bnr = 2.0
    assert build.sampling_schedule(config) == schedules.constant_bnr(2.0, beta_max=9.0)


def test_every_path_has_a_section_with_arguments_of_its_own():
    sections = default.get_config().schedule.to_dict()
    del sections["name"]
    assert sections.keys() == schedules.PATHS.keys()
    for name, section in sections.items():
        spectrum = {"spectrum": np.ones((8, 8))} if name == "spectral" else {}
        assert isinstance(schedules.PATHS[name](**spectrum, **section), schedules.Schedule)


def quadratic(*, curvature, beta_min, beta_max):
    """Blur that grows with the square of the noise."""
    return schedules.from_functions(
        alpha=lambda t: curvature * t**2, beta=lambda t: t, t_min=beta_min, t_max=beta_max
    )


def test_a_new_schedule_needs_its_function_and_a_section_with_its_arguments_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(schedules.PATHS, "quadratic", quadratic)
    config = tiny_config()
    with config.unlocked():
        config.schedule.quadratic = {"curvature": 0.5, "beta_min": 0.01, "beta_max": 4.0}
    config.schedule.name, config.training.num_steps = "quadratic", 2
    assert int(train(config, str(tmp_path / "run")).step) == 2
    model = pretrained.load(tmp_path / "run")
    assert float(model.schedule.alpha(2.0)) == pytest.approx(0.5 * 2.0**2)
    config.schedule.quadratic.curvature = -1.0
    with pytest.raises(ValueError, match=r"schedule\.quadratic\.curvature must be"):
        train(config, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_run_with_auto_writes_resumes_and_samples_with_the_number(app, tmp_path):
    run = (f"--workdir={tmp_path}", "--config.schedule.constant_bnr.bnr=auto")
    out, _ = app.run(*run, "--config.training.num_steps=1")
    written = json.loads((tmp_path / "config.json").read_text())
    number = written["schedule"]["constant_bnr"]["bnr"]
    assert 0.2 < number < 0.35  # the digits'
    assert f"bnr      auto: {number}, at which no band" in out
    out, _ = app.run(*run, "--config.training.num_steps=2")
    assert f"bnr      auto: {number}, as this run began" in out
    app.run("--mode=sample", f"--workdir={tmp_path}", "--seeds=0-1", tiny=False)
    about = json.loads(next((tmp_path / "generated").rglob("sampling.json")).read_text())
    assert about["schedule"]["constant_bnr"]["bnr"] == number
