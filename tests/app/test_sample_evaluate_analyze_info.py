"""The other modes of main.py, from a trained workdir."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import warm_diffusion
from warm_diffusion import pretrained
from warm_diffusion.app.sample import parse_seeds
from warm_diffusion.data import statistics


def pngs(folder):
    return {p.stem: np.asarray(Image.open(p)) for p in folder.glob("0*.png")}


def sampled(workdir):
    return next((workdir / "generated").rglob("sampling.json")).parent


@pytest.fixture(scope="module")
def samples(app, trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("samples")
    out, err = app.run(
        "--mode=sample", f"--checkpoint={trained[0]}", f"--workdir={workdir}", "--seeds=0-9",
        tiny=False,
    )  # fmt: skip
    assert err == ""
    return sampled(workdir), out


def test_sampling_writes_a_png_for_each_seed_and_a_grid(samples):
    folder, out = samples
    images = pngs(folder)
    assert set(images) == {f"{seed:06d}" for seed in range(10)}
    assert all(image.shape == (8, 8) for image in images.values())
    assert folder.with_name(f"{folder.name}.png").exists()
    about = json.loads((folder / "sampling.json").read_text())
    assert about["seeds"] == "0-9"
    assert about["network_calls"] == 3  # Heun, two steps: 2 * 2 - 1
    assert "10 images" in out
    assert "trained at" not in out  # sampled along the path trained on


def test_solver_steps_grid_and_ratio_are_chosen_by_short_flags(app, trained, tmp_path):
    out, _ = app.run(
        "--mode=sample", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}", "--seeds=0,7",
        "--solver=multistep", "--steps=3", "--time_grid=spectral", "--bnr=0", tiny=False,
    )  # fmt: skip
    assert "note     the network was trained at BNR 0.5, not 0: images may be poor" in out
    folder = sampled(tmp_path)
    assert folder.name.endswith("_multistep3_bnr0_spectral")
    about = json.loads((folder / "sampling.json").read_text())
    assert (about["network_calls"], about["sampling"]["time_grid"]) == (3, "spectral")
    expected = pretrained.load(trained[0]).sample([0, 7], "multistep", 3, 0.0, time_grid="spectral")
    drawn = np.stack([pngs(folder)[name] for name in ("000000", "000007")])
    assert np.abs(drawn.astype(int) - expected[..., 0]).max() <= 1


def test_a_seed_gives_the_same_image_in_any_batch_with_any_other_seeds(app, trained, samples):
    app.run(
        "--mode=sample", f"--workdir={trained[0]}", "--seeds=9,3", tiny=False,
    )  # fmt: skip
    again = pngs(sampled(trained[0]))
    np.testing.assert_array_equal(again["000009"], pngs(samples[0])["000009"])
    app.run(
        "--mode=sample", f"--workdir={trained[0]}", "--seeds=3", "--config.sampling.batch_size=3",
        tiny=False,
    )  # fmt: skip
    # another batch size is another program: the same to one grey level
    difference = pngs(sampled(trained[0]))["000003"].astype(int) - pngs(samples[0])["000003"]
    assert np.abs(difference).max() <= 1


def test_images_of_other_settings_do_not_join_those_of_a_folder(app, samples, tmp_path):
    shutil.copytree(samples[0].parents[1], tmp_path / "own")
    folder = sampled(tmp_path / "own")
    checkpoint = json.loads((folder / "sampling.json").read_text())["checkpoint"]
    common = (
        "--mode=sample", f"--checkpoint={checkpoint}", f"--workdir={tmp_path / 'own'}",
        "--seeds=10-11",
    )  # fmt: skip
    _, err = app.run(*common, "--config.schedule.constant_bnr.beta_max=20", tiny=False, status=2)
    assert len(err.splitlines()) == 1
    assert f"{folder} holds images drawn with other settings" in err
    assert not (folder / "000010.png").exists()
    app.run(*common, tiny=False)  # other seeds may
    assert set(pngs(folder)) == {f"{seed:06d}" for seed in range(12)}


def test_analysis_recommends_a_ratio_and_draws(app, tmp_path):
    out, err = app.run("--mode=analyze", f"--workdir={tmp_path}")
    folder = tmp_path / "analysis"
    report = json.loads((folder / "analysis.json").read_text())
    assert report["count"] == 1797
    assert f"recommended {report['recommended_bnr']:.3f}" in out
    # 8 enlarged to 64; clean and six levels wide, six images high, gaps of 2; and labels
    width, height = Image.open(folder / "forward.png").size
    assert 7 * 66 < width < 7 * 66 + 120
    assert 6 * 66 < height < 6 * 66 + 120
    assert Image.open(folder / "spectrum.png").size[0] > 500
    assert err == ""


def test_the_spectrum_in_chunks_is_that_of_all_images():
    """numpy's variance of scipy's DCT over images and channels."""
    scipy_fft = pytest.importorskip("scipy.fft")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5000, 4, 5, 3), np.uint8)
    images[2500:] //= 3  # the chunks have different means
    coefficients = scipy_fft.dctn(images / 127.5 - 1, axes=(1, 2), norm="ortho")
    mean, variance = statistics(images)
    np.testing.assert_allclose(mean, (images / 127.5 - 1).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(variance, coefficients.var(axis=(0, 3)), rtol=1e-4)


def test_info_prints_config_parameters_and_shapes(app):
    short, _ = app.run("--mode=info")
    out, _ = app.run("--mode=info", "--details")
    assert out.startswith(short)  # the summary first, and no more unless asked for
    assert '"residual_weight": 1.0' in out
    assert "dec_8x8_aux_conv/kernel" in out
    assert "dec_8x8" not in short
    assert "x (16, 8, 8, 1), c_noise and c_blur (16,) -> (16, 8, 8, 2): 2 head(s)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.dropuot=1"], "unknown configuration key 'model.dropuot'; did you mean"),
        (
            ["--mode=trian", "--workdir=w"],
            "should be one of <train|sample|eval|fid_stats|analyze|export|restore|info>",
        ),
        (["--mode=train"], "set --workdir=DIR"),
        (["--mode=sample", "--workdir=nowhere"], "there is no trained network in"),
        (["train", "--workdir=w"], "unexpected argument 'train'"),
        (["--workdir=w", "--checkpoint=runs/a"], "start from its weights set --config.init_from"),
        (["--workdir=w", "--steps=5"], "got train: the length of training is --config.training"),
        (["--mode=eval", "--workdir=w", "--seeds=3"], "--seeds is for --mode=sample, got eval"),
        (
            ["--workdir=w", "--config.data.source=cifar"],
            "data.source must be digits, photos, cifar10",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(app, arguments, message):
    _, err = app.run(*arguments, tiny=False, status=2)
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")


def test_the_version_is_the_packages_and_no_configuration_is_read(app):
    out, err = app.run("--version", "--config=nowhere.py", tiny=False)
    assert out.splitlines()[0] == f"warm-diffusion {warm_diffusion.__version__}"
    assert err == ""


def test_seeds_are_ranges_and_lists():
    assert parse_seeds("3") == [range(3, 4)]
    assert parse_seeds("0-3,7,9-10") == [range(4), range(7, 8), range(9, 11)]
    assert parse_seeds("0-4294967295") == [range(2**32)]  # no list of them is made


@pytest.mark.parametrize(
    "text",
    ["", "a", "3-1", "-4", "0-4294967296", "0-9,3", "1" * 5000, "\u0663"],
)
def test_seeds_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="--seeds "):
        parse_seeds(text)
