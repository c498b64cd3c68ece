"""A trained network as one object: what is saved is what is loaded, bit for bit; nothing runs."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.core.closed_forms import dct, eigenvalues, idct, transfer
from warm_diffusion import architecture, card, pretrained, samplers, schedules
from warm_diffusion.data.images import to_uint8
from warm_diffusion.data.statistics import Statistics

DESCRIPTION = {
    "image_shape": [8, 8, 1],
    "network": {
        "name": "ddpmpp",
        "resolution": 8,
        "channels": 1,
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attention_resolutions": [],
        "dropout": 0.0,
        "num_classes": 0,
        "augment_dim": 0,
        "heads": 2,
        "label_dropout": 0.0,
        "dtype": "float32",
    },
    "parameterization": "divide",
    "preconditioning": "edm",
    "sigma_data": 0.5,
    "schedule": {"name": "constant_bnr", "bnr": 0.5, "beta_min": 0.002, "beta_max": 80.0},
}


def make_model(seed=0, **changes):
    """A small network of which no weight is zero, and statistics of no data."""
    rng = np.random.default_rng(seed)
    statistics = Statistics(
        rng.uniform(-1, 1, (8, 8, 1)).astype(np.float32),
        rng.uniform(0.1, 1, (8, 8)).astype(np.float32),
    )
    built = architecture.build({**DESCRIPTION, **changes}, statistics)
    shapes = built.abstract_params
    params = jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32), shapes
    )
    info = {"weights": "ema 100 images", "step": 7, "images_seen": 112}
    return pretrained.Model(built, params, info)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "small"
    pretrained.save(model, folder, samples=model.sample([0, 1, 2], num_steps=2))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    import shutil

    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def levels():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 8, 1)), jnp.float32)
    return x, jnp.array([0.0, 0.3, 0.5, 2.0]), jnp.array([0.1, 0.5, 1.0, 4.0])


# --- the folder ----------------------------------------------------------------------------------


def test_a_model_folder_holds_weights_description_card_and_picture(saved, model):
    assert {path.name for path in saved.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png"
    }  # fmt: skip
    arrays = safetensors.numpy.load_file(saved / "model.safetensors")
    assert "enc_8x8_block0.conv0.kernel" in arrays
    np.testing.assert_array_equal(arrays["data.spectrum"], model.spectrum)
    np.testing.assert_array_equal(arrays["data.mean"], model.mean)
    config = json.loads((saved / "config.json").read_text())
    assert config["schedule"]["bnr"] == 0.5
    assert config["network"]["model_channels"] == 8
    assert config["info"]["images_seen"] == 112
    card = (saved / "README.md").read_text()
    assert "![3 samples](samples.png)" in card


def test_weights_come_back_bit_for_bit(saved, model):
    loaded = pretrained.load(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    np.testing.assert_array_equal(loaded.mean, model.mean)
    np.testing.assert_array_equal(loaded.spectrum, model.spectrum)
    assert loaded.image_shape == (8, 8, 1)
    assert loaded.info["weights"] == "ema 100 images"
    for t in (0.01, 1.0, 50.0):
        assert float(loaded.schedule.alpha(t)) == float(model.schedule.alpha(t))


def test_the_lines_of_the_card_load_the_model(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)  # the card names the folder as it stands beside the user
    (code,) = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (16, 8, 8, 1)
    assert names["images"].dtype == np.uint8


@pytest.mark.parametrize(
    "name", ["digits", "photos", pytest.param("cifar10_16", marks=pytest.mark.long)]
)
def test_the_lines_of_a_shipped_card_run(name, monkeypatch):
    folder = pathlib.Path(pretrained.__file__).parents[1] / "pretrained" / name
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    images = names["clean" if name == "photos" else "images"]
    assert images.shape == (16, *names["model"].image_shape)
    assert np.all(np.isfinite(images))


def test_a_network_whose_path_ends_in_images_is_shown_restoring(saved):
    config = json.loads((saved / "config.json").read_text())
    any_bnr = config | {"schedule": config["schedule"] | {"name": "any_bnr"}}
    draws, restores, starts = (
        str(card.files("m", each, np.zeros(0), "", draws=draws)["README.md"], "utf8")
        for each, draws in ((any_bnr, True), (any_bnr, False), (config, False))
    )
    assert "model.sample(" not in starts
    assert "starts from training\nimages" in starts
    assert "--mode=restore" not in starts
    assert "model.sample(" in draws
    assert "--mode=restore" not in draws
    assert "model.denoise(" in restores
    assert "--mode=restore --checkpoint=m " in restores
    assert "--mode=sample" not in restores


def test_the_card_of_a_run_that_was_stopped_trains_as_many_steps(saved):
    config = json.loads((saved / "config.json").read_text())
    configuration = {"data": {"source": "digits"}, "training": {"num_steps": 9, "batch_size": 2}}
    for step, expected in ((9, "RUN\n"), (4, "RUN --config.training.num_steps=4\n")):
        info = {"configuration": configuration, "step": step, "weights_sha256": "0" * 64}
        found = card.files("m", config | {"info": info}, np.zeros(0), "", draws=True)
        assert f"python main.py --config=m/config.json --workdir={expected}" in str(
            found["README.md"], "utf8"
        )


def test_a_folder_that_holds_something_is_left_alone(saved, model):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match="is not empty: a model is written to a new folder"):
        pretrained.save(model, saved)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


NO_SAMPLES = np.zeros((0, 8, 8, 1), np.uint8)


def test_a_model_is_saved_whole_or_not_at_all(model, place, monkeypatch):
    write = pretrained.storage.write_files

    def full(files):
        write(dict(list(files.items())[:2]))
        raise OSError("disk full")

    monkeypatch.setattr(pretrained.storage, "write_files", full)
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(model, place / "new", samples=NO_SAMPLES)
    assert list(place.glob("*")) == []


def test_a_model_on_gs_is_the_model(model, store):
    url = "gs://bucket/pretrained"
    pretrained.save(model, url, samples=NO_SAMPLES)
    loaded = pretrained.load(url)
    assert loaded.info["weights_sha256"] == pretrained.storage.digest(model.params)
    np.testing.assert_array_equal(loaded.spectrum, model.spectrum)
    with pytest.raises(ValueError, match="gs://bucket/pretrained is not empty"):
        pretrained.save(model, url, samples=NO_SAMPLES)


def test_a_model_whose_writing_on_gs_was_killed_is_none(model, store):
    """config.json comes last: without it there is no model."""
    url = "gs://bucket/killed_model"
    pretrained.save(model, url, samples=NO_SAMPLES)
    pretrained.storage.remove(pretrained.storage.path(url) / "config.json")
    with pytest.raises(ValueError, match="its model cannot be read"):
        pretrained.load(url)


# --- what is refused -----------------------------------------------------------------------------


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_arrays(folder, change):
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


NAME = "enc_8x8_block0.conv0.bias"
DAMAGE = {
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "broken JSON": lambda f: (f / "config.json").write_text("{"),
    "binary config": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "JSON of a list": lambda f: (f / "config.json").write_text("[1]"),
    "newer version": lambda f: edit(f, lambda c: c.update(version=99)),
    "another format": lambda f: edit(f, lambda c: c.update(format="other")),
    "lacking key": lambda f: edit(f, lambda c: c.pop("sigma_data")),
    "unknown network": lambda f: edit(f, lambda c: c["network"].update(name="unet")),
    "unknown argument": lambda f: edit(f, lambda c: c["network"].update(colour=1)),
    "text as width": lambda f: edit(f, lambda c: c["network"].update(model_channels="x")),
    "no levels": lambda f: edit(f, lambda c: c["network"].update(channel_mult=[])),
    "bad shape": lambda f: edit(f, lambda c: c.update(image_shape=[8, 8])),
    "list as network": lambda f: edit(f, lambda c: c.update(network=[1])),
    "list as info": lambda f: edit(f, lambda c: c.update(info=[1])),
    "deep JSON": lambda f: (f / "config.json").write_text('{"a":' * 9999),
    "huge network": lambda f: edit(f, lambda c: c["network"].update(model_channels=10**8)),
    "text as sigma": lambda f: edit(f, lambda c: c.update(sigma_data="0.5")),
    "changed spectrum": lambda f: edit_arrays(
        f, lambda a: a.update({"data.spectrum": a["data.spectrum"] * 2})
    ),
    "unknown path": lambda f: edit(f, lambda c: c["schedule"].update(name="warm")),
    "unknown number": lambda f: edit(f, lambda c: c["schedule"].update(speed=1)),
    "cut file": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:100]
    ),
    "missing array": lambda f: edit_arrays(f, lambda a: a.pop(NAME)),
    "extra array": lambda f: edit_arrays(f, lambda a: a.update(x=np.zeros(1, np.float32))),
    "misshaped array": lambda f: edit_arrays(f, lambda a: a.update({NAME: a[NAME][:3]})),
    "narrow array": lambda f: edit_arrays(
        f, lambda a: a.update({NAME: a[NAME].astype(np.float16)})
    ),
    "NaN": lambda f: edit_arrays(f, lambda a: a.update({NAME: a[NAME] * np.nan})),
    "changed number": lambda f: edit_arrays(f, lambda a: a.update({NAME: a[NAME] + 1})),
}
NAMED = {
    "missing array": rf"missing {NAME}",
    "extra array": r"unknown x",
    "misshaped array": rf"{NAME} has shape \(3,\), expected \(8,\)",
    "narrow array": rf"{NAME} is float16, expected float32",
    "NaN": rf"{NAME} has numbers that are not finite",
    "changed number": "is damaged: its checksum does not fit",
    "newer version": r"of version 99, this release reads up to 1: update",
    "unknown argument": "ddpmpp has no argument colour; it has",
    "lacking key": "lacks sigma_data",
    "changed spectrum": "is damaged: its checksum does not fit",
    "huge network": "model.model_channels must be 4 to 2,048, got 100000000",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_folder_that_is_not_sound_gets_one_clear_error(folder, kind):
    DAMAGE[kind](folder)
    with pytest.raises(ValueError, match=NAMED.get(kind, ".")) as caught:
        pretrained.load(folder)
    assert str(folder) in str(caught.value)


def test_no_code_is_run_and_no_pickle_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return pathlib.Path.mkdir, (tmp_path / "exploded",)

    import pickle

    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        pretrained.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_holds_one_set_of_weights(saved):
    with pytest.raises(ValueError, match=r"holds one set of weights \(ema 100 images\)"):
        pretrained.load(saved, ema=1)


def test_nothing_there_is_said_with_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no trained network in .*: expected a model folder"):
        pretrained.load(tmp_path / "nowhere")


# --- its denoiser --------------------------------------------------------------------------------


def test_the_denoiser_works_under_jit_vmap_and_grad(model):
    x, alpha, beta = levels()
    expected = model.denoise(x, alpha, beta)
    jitted = jax.jit(model.denoise)(x, alpha, beta)
    one = lambda x, a, b: model.denoise(x[None], a, b).clean[0]  # noqa: E731
    mapped = jax.vmap(one)(x, alpha, beta)
    np.testing.assert_allclose(jitted.blurry, expected.blurry, atol=1e-5)
    np.testing.assert_allclose(mapped, expected.clean, atol=1e-4)
    slope = jax.grad(lambda x: model.denoise(x, alpha, beta).clean.sum())(x)
    step = 1e-2 * jnp.ones_like(x)
    change = (
        model.denoise(x + step, alpha, beta).clean.sum()
        - model.denoise(x - step, alpha, beta).clean.sum()
    ) / 2
    np.testing.assert_allclose(jnp.sum(slope * step), change, rtol=1e-2)


def test_images_of_another_size_pass(model):
    x = jnp.zeros((2, 12, 10, 1))
    assert model.denoise(x, 0.2, 0.4).clean.shape == x.shape


def test_a_level_may_be_a_plain_number_and_an_image_a_numpy_array(model):
    x = np.zeros((2, 8, 8, 1), np.float32)
    both = model.denoise(x, 0.2, 0.4), model.denoise(jnp.asarray(x), jnp.full(2, 0.2), 0.4)
    np.testing.assert_allclose(both[0].clean, both[1].clean, atol=1e-6)


def test_a_class_is_told_to_the_network():
    network = {**DESCRIPTION["network"], "num_classes": 3}
    conditional = make_model(network=network)
    conditional.params["map_label"]["kernel"] *= 30  # shows in images of 8 bits
    x, alpha, beta = levels()
    by_class = [conditional.denoise(x, alpha, beta, labels=np.full(4, c)).clean for c in (0, 1)]
    assert np.abs(by_class[0] - by_class[1]).max() > 1e-4
    drawn = conditional.sample([3, 4])  # classes 0 and 1
    asked = [conditional.sample([3, 4], label=label) for label in (0, 1, 2)]
    np.testing.assert_array_equal(drawn[1], asked[1][1])
    assert np.any(asked[2] != asked[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 8, 8, 1), np.uint8), 0.0, 1.0), "of uint8 images take x / 127.5 - 1"),
        ((np.zeros((8, 8, 1), np.float32), 0.0, 1.0), r"expected float images \[B, H, W, C\]"),
        ((np.zeros((2, 8, 8, 1), np.float32), 0.0, 1.0, [0, 7]), "labels must be below 0"),
        ((np.zeros((2, 8, 8, 1), np.float32), 0.0, 1.0, [0.5, 1]), "labels must be integers"),
    ],
)
def test_what_a_denoiser_does_not_take_is_said(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(*arguments)


def test_a_model_is_a_denoiser(model):
    x, alpha, beta = levels()
    np.testing.assert_array_equal(model(x, alpha, beta).clean, model.denoise(x, alpha, beta).clean)


# --- its samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bnr", [None, 0.0, 2.0])
def test_samples_are_the_pure_samplers(model, bnr):
    seeds = jnp.array([5, 9], jnp.uint32)
    path = schedules.constant_bnr(0.5 if bnr is None else bnr)
    noise = samplers.initial_noise(seeds, (8, 8, 1))
    expected = samplers.sample(model.denoise, noise, path, solver="multistep", num_steps=5)
    got = model.sample([5, 9], "multistep", 5, bnr)
    assert got.dtype == np.uint8
    # another program: to one grey level
    assert np.abs(got.astype(int) - to_uint8(expected)).max() <= 1


def test_samples_on_the_spectral_grid_start_from_the_training_datas_mean_and_spectrum(model):
    seeds = jnp.array([5, 9], jnp.uint32)
    path = schedules.constant_bnr(0.5)
    expected = samplers.sample(
        model.denoise,
        samplers.initial_noise(seeds, (8, 8, 1)),
        path,
        solver="multistep",
        grid=schedules.spectral_grid(path, model.spectrum, 3, "multistep"),
        prior=(model.mean, model.spectrum),
    )
    got = model.sample([5, 9], "multistep", 3, grid="spectral")
    assert np.abs(got.astype(int) - to_uint8(expected)).max() <= 1


def test_grids_that_are_none_are_refused(model):
    with pytest.raises(ValueError, match="grid must be one of edm, spectral, got 'cosine'"):
        model.sample([0], grid="cosine")
    built = architecture.build(model.architecture.description)
    unknown = pretrained.Model(built, model.params, {})
    with pytest.raises(ValueError, match="does not carry the spectrum of its training data"):
        unknown.sample([0], grid="spectral")


def test_an_image_depends_on_its_seed_alone(model):
    together = model.sample(range(5), num_steps=2, batch_size=2)
    np.testing.assert_array_equal(together[3], model.sample([9, 3], num_steps=2)[1])
    alone = model.sample(3, num_steps=2).astype(int)
    assert np.abs(alone[0] - together[3]).max() <= 1


@pytest.mark.parametrize("seeds", [[], [-1], [2**32], [0.5], [[1, 2]], "01"])
def test_seeds_that_are_none_are_refused(model, seeds):
    with pytest.raises(ValueError, match="seeds must"):
        model.sample(seeds)


def test_samples_that_are_not_finite_are_no_images(model):
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, model.params)
    broken = pretrained.Model(model.architecture, params, model.info)
    with pytest.raises(ValueError, match="images are not finite"):
        broken.sample([0], num_steps=2)


def test_churn_changes_images_and_repeats_by_seed(model):
    drawn = [model.sample([1], "euler", 4, churn=churn) for churn in (None, 3.0, 3.0)]
    np.testing.assert_array_equal(drawn[1], drawn[2])
    assert np.any(drawn[0] != drawn[1])


def test_a_path_that_ends_in_blurred_images_says_how_to_start():
    cold = make_model(schedule={"name": "cold"})
    with pytest.raises(ValueError, match="path ends in blurred images, not in noise: start from"):
        cold.sample([0])
    assert cold.sample([0], num_steps=2, bnr=0.5).shape == (1, 8, 8, 1)


# --- spectral preconditioning and path -----------------------------------------------------------


def test_a_model_by_the_spectrum_needs_no_data(tmp_path):
    spectral = make_model(preconditioning="spectral", schedule={"name": "spectral"})
    pretrained.save(spectral, tmp_path / "m", samples=np.zeros((0, 8, 8, 1), np.uint8))
    loaded = pretrained.load(tmp_path / "m")
    x, alpha, beta = levels()
    np.testing.assert_array_equal(
        loaded.denoise(x, alpha, beta).clean, spectral.denoise(x, alpha, beta).clean
    )
    expected = schedules.spectral(spectral.spectrum)
    assert float(loaded.schedule.alpha(0.3)) == float(expected.alpha(0.3))


# --- any height and width ------------------------------------------------------------------------


def test_a_height_and_width_that_cannot_be_halved_are_reflected():
    """Without blur nothing but the network mixes pixels."""
    model = make_model(network={**DESCRIPTION["network"], "channel_mult": [1, 1]})
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 9, 5, 1)), jnp.float32)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), "symmetric")
    found, expected = model.denoise(x, 0.0, 0.3), model.denoise(padded, 0.0, 0.3)
    np.testing.assert_allclose(found.blurry, expected.blurry[:, :9, :5], atol=1e-5)


@pytest.mark.parametrize("size", [(11, 6), (24, 40)])
def test_on_photographic_data_a_network_of_zeros_is_the_wiener_filter_at_every_size(size):
    def spectrum(height, width):
        eigen = eigenvalues(height, width)
        eigen[0, 0] = 1 / (height * width)  # the mean has variance 1
        return 1 / eigen

    statistics = Statistics(np.zeros((8, 8, 1), np.float32), spectrum(8, 8).astype(np.float32))
    built = architecture.build({**DESCRIPTION, "preconditioning": "spectral"}, statistics)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), built.abstract_params)
    x = np.random.default_rng(4).standard_normal((2, *size, 1))
    # Method section 7: D + R = (m S / v) x without a mean.
    m, power = transfer(0.8, *size), spectrum(*size)[..., None]
    expected = idct(m * power / (m**2 * power + 0.2**2) * dct(x))
    found = built.denoiser(zeros)(jnp.asarray(x, jnp.float32), 0.8, 0.2)
    np.testing.assert_allclose(found.clean, expected, atol=2e-5)


def test_the_memory_of_the_network_is_that_of_a_tile():
    """XLA's count: sixteen times the pixels, and far from sixteen times the memory."""
    model = make_model(network={**DESCRIPTION["network"], "channel_mult": [1, 1]})

    def megabytes(side):
        x = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        compiled = jax.jit(lambda x: model.denoise(x, 0.5, 0.3).clean).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    # A dozen copies of the image itself, in float32, and the matrices of the DCT.
    tile, large = megabytes(128), megabytes(512)
    assert large < tile + 12 * 512**2 * 4 / 2**20


# --- what it loads -------------------------------------------------------------------------------


def test_loading_is_quiet_and_needs_neither_the_app_nor_its_libraries(saved):
    """In a process of its own: here, other tests have loaded them."""
    heavy = ("orbax", "ml_collections", "clu", "absl.app", "matplotlib", "sklearn", "optax")
    program = (
        "import sys; from warm_diffusion import pretrained; "
        f"model = pretrained.load({str(saved)!r}); "
        f"loaded = [name for name in {heavy!r} if name in sys.modules]; "
        "sys.exit(' '.join(loaded) or None)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        cwd=pathlib.Path(pretrained.__file__).parents[1],
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
