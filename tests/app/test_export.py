"""From a training run to a model folder and a program, and what other modes make of them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import default, saved
from warm_diffusion import app as modes
from warm_diffusion import pretrained
from warm_diffusion.evaluation import features


@pytest.fixture(scope="module")
def exported(app, trained, tmp_path_factory):
    """A model folder of the tiny run, evaluated before, with its program."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    pytest.importorskip("flatbuffers")
    checkpoint, evaluation = f"--checkpoint={trained[0]}", folder.with_name("evaluation")
    app.run(
        "--mode=eval", checkpoint, f"--workdir={evaluation}", "--config.eval.num_samples=24",
        tiny=False,
    )  # fmt: skip
    out, err = app.run(
        "--mode=export", checkpoint, f"--workdir={folder}",
        f"--config.export.evaluation={evaluation}", tiny=False,
    )  # fmt: skip
    assert err == ""
    assert "README.md, config.json, model.safetensors, samples.png" in out
    return folder


def images(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("0*.png"))])


def test_the_weights_are_the_runs_average_bit_for_bit(trained, exported):
    one, other = pretrained.load(trained[0]), pretrained.load(exported)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    np.testing.assert_array_equal(one.spectrum, other.spectrum)
    np.testing.assert_array_equal(one.mean, other.mean)
    for key in ("step", "images_seen", "weights", "weights_sha256", "data_sha256"):
        assert one.info[key] == other.info[key], key
    raw = pretrained.load(trained[0], ema=-1)
    assert raw.info["weights"] == "raw"
    assert raw.info["weights_sha256"] != one.info["weights_sha256"]


def test_the_card_tells_the_evaluation_with_its_protocol(exported):
    card = (exported / "README.md").read_text()
    assert "- `fd_pixels_24`: " in card
    assert "heun, 3 network calls, BNR 0.5, seeds 0-23)" in card


def test_a_folder_stands_for_its_run(app, exported, tmp_path):
    app.run(
        "--mode=eval", f"--checkpoint={exported}", f"--workdir={tmp_path}",
        "--config.eval.num_samples=24", tiny=False,
    )  # fmt: skip
    one, other = (
        json.loads((folder / "eval" / "step_00000006.json").read_text())
        for folder in (exported.with_name("evaluation"), tmp_path)
    )
    for key in ("rounds", "weights_sha256"):
        assert one[key] == other[key]


def test_the_network_can_be_trained_again_from_its_own_configuration(app, exported, tmp_path):
    out, _ = app.run(
        f"--config={exported / 'config.json'}", f"--workdir={tmp_path}",
        "--config.training.num_steps=1", tiny=False,
    )  # fmt: skip
    assert "10,810 parameters" in out


def test_another_network_than_was_trained_is_refused(app, exported, tmp_path):
    _, err = app.run(
        "--mode=sample", f"--checkpoint={exported}", f"--workdir={tmp_path}",
        "--config.model.num_blocks=2", tiny=False, status=2,
    )  # fmt: skip
    assert "the network was trained with other settings: model.num_blocks is 1, not 2" in err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_before_any_network_is_read(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="is not empty: a model is written to a new folder"):
        modes.export.export(default.get_config(), str(tmp_path), str(tmp_path / "nowhere"))


def test_a_script_with_jax_alone_draws_the_same_images(app, trained, tmp_path):
    pytest.importorskip("flatbuffers")
    folder, drawn = tmp_path / "model", tmp_path / "drawn"
    app.run(
        "--mode=export", f"--checkpoint={trained[0]}", f"--workdir={folder}",
        "--config.export.program=True", "--config.export.num_images=0", tiny=False,
    )  # fmt: skip
    about = json.loads((folder / "sampler.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert "6 months" in about["valid"]
    program = (
        "import sys, numpy, jax\n"
        f"content = open({str(folder / 'sampler.stablehlo')!r}, 'rb').read()\n"
        "call = jax.export.deserialize(bytearray(content)).call\n"
        f"numpy.save({str(tmp_path / 'images.npy')!r}, call(numpy.arange(4, dtype='uint32')))\n"
        "assert not any(name.startswith(('flax', 'warm_')) for name in sys.modules)\n"
    )
    # Elsewhere: the package must not be there to import.
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**app.environment, "PYTHONPATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    app.run(
        "--mode=sample", f"--checkpoint={trained[0]}", f"--workdir={drawn}", "--seeds=0-3",
        tiny=False,
    )  # fmt: skip
    difference = np.load(tmp_path / "images.npy")[..., 0].astype(int) - images(drawn)
    assert np.abs(difference).max() <= 1  # another batch is another program


def test_a_configuration_that_came_with_a_checkpoint_names_no_code(
    app, exported, tmp_path, monkeypatch
):
    """Neither features nor a cache of compiled programs; from the command line both count."""
    folder = tmp_path / "crafted"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["info"]["configuration"]["eval"]["features"] = "crafted:run"
    config["info"]["configuration"]["compilation_cache_dir"] = str(tmp_path / "programs")
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "crafted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    common = ("--mode=eval", f"--checkpoint={folder}", f"--workdir={tmp_path / 'out'}",
              "--config.eval.num_samples=8")  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    _, err = app.run(*common, tiny=False, status=2)
    assert "names code (crafted:run) as features" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "programs").exists()
    app.run(*common, "--config.eval.features=crafted:run", tiny=False, status=2)
    assert (tmp_path / "ran").exists()


def test_a_configuration_that_came_with_a_checkpoint_names_no_folder_of_this_machine(tmp_path):
    """Data sets of TensorFlow Datasets name code of their own; a cache is written to."""
    config = default.get_config()
    config.data.data_dir, config.data.cache_dir = "/crafted/sets", "/crafted/cache"
    config.download, config.sampling.ema = True, 3
    told = json.loads(config.to_json_best_effort())
    run, model = tmp_path / "run.json", tmp_path / "model.json"
    run.write_text(json.dumps(told))
    folder = {"format": "x", "image_shape": [8, 8, 1], **told, "info": {"configuration": told}}
    model.write_text(json.dumps(folder))
    for path, average in ((run, 3), (model, 0)):  # a folder holds one average
        loaded = saved.get_config(str(path))
        assert (loaded.data.data_dir, loaded.data.cache_dir, loaded.download) == ("", "", False)
        assert loaded.sampling.ema == average


@pytest.fixture
def edm_file(shared_folder):
    """EDM's own layout, tiny."""
    return shared_folder / "golden" / "edm_ddpmpp_tiny.pkl"


@pytest.mark.long
def test_edms_network_statistics_and_inception_make_an_fid(
    app, edm_file, inception_weights, tmp_path, monkeypatch
):
    """The sequence of docs/reproduce.md at a tiny size; the distance again from the PNG files."""
    monkeypatch.setattr(features, "_BATCH", 6)
    mean, scale = 0.1 * np.ones(2048), 0.05 + 0.01 * np.arange(2048) / 2048
    np.savez(tmp_path / "reference.npz", mu=mean, sigma=np.diag(scale))
    common = (f"--checkpoint={edm_file}", f"--workdir={tmp_path}", "--steps=2")
    app.run(
        "--mode=eval", *common, f"--config.eval.reference={tmp_path / 'reference.npz'}",
        "--config.eval.features=inception", f"--config.eval.inception_weights={inception_weights}",
        "--config.eval.num_samples=6", "--config.eval.repeats=1", tiny=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "eval" / "model.json").read_text())
    assert report["reference"]["origin"] == "external"
    assert report["training_data_sha256"] == "not known"  # so no reference is refused for it
    app.run("--mode=sample", *common, "--seeds=0-5", tiny=False)
    extract = features.extractor("inception", weights=str(inception_weights))
    found = extract(images(tmp_path / "generated")).astype(np.float64)
    # tr sqrt(S diag(s)) over the five eigenvalues of six images, from their Gram matrix
    centred = (found - found.mean(0)) / np.sqrt(5)
    cross = np.linalg.eigvalsh((centred * scale) @ centred.T)
    expected = np.sum((found.mean(0) - mean) ** 2) + np.sum(centred**2) + scale.sum()
    expected -= 2 * np.sqrt(np.maximum(cross, 0)).sum()
    assert report["fid6_train"] == pytest.approx(expected, rel=1e-4)


def test_edms_network_is_sampled_and_exported(app, edm_file, tmp_path):
    checkpoint = f"--checkpoint={edm_file}"
    out, _ = app.run(
        "--mode=sample", checkpoint, f"--workdir={tmp_path / 'out'}", "--steps=2", "--seeds=0-1",
        tiny=False,
    )  # fmt: skip
    assert "weights  EDM's of" in out
    assert images(tmp_path / "out" / "generated").shape == (2, 16, 16, 3)
    app.run(
        "--mode=export", checkpoint, f"--workdir={tmp_path / 'm'}",
        "--config.export.num_images=0", tiny=False,
    )  # fmt: skip
    one, other = pretrained.load(edm_file), pretrained.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
