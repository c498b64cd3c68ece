"""A trained network as one object: what is saved is what is loaded, bit for bit; nothing runs."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from warm_diffusion import pretrained, samplers, schedules
from warm_diffusion.data.images import to_uint8
from warm_diffusion.data.statistics import Statistics

DESCRIPTION = {
    "image_shape": [8, 8, 1],
    "model": {
        "name": "ddpmpp",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attention_resolutions": [],
        "dropout": 0.0,
    },
    "denoiser": {"parameterization": "divide", "sigma_data": 0.5},
    "augment": {"transforms": []},
    "schedule": {"name": "constant_bnr", "constant_bnr": {"bnr": 0.5, "beta_max": 80.0}},
}
NO_SAMPLES = np.zeros((0, 8, 8, 1), np.uint8)


def make_model(seed=0, **changes):
    """A small network of which no weight is zero, and statistics of no data."""
    rng = np.random.default_rng(seed)
    statistics = Statistics(
        rng.uniform(-1, 1, (8, 8, 1)).astype(np.float32),
        rng.uniform(0.1, 1, (8, 8)).astype(np.float32),
    )
    built = pretrained.build({**DESCRIPTION, **changes}, statistics)
    params = jax.tree.map(
        lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32),
        built.abstract_params,
    )
    info = {"weights": "EMA, half-life 100 images", "step": 7, "images_seen": 112}
    return pretrained.Model(**vars(built), params=params, info=info)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "small"
    pretrained.save(model, folder, samples=np.zeros((3, 8, 8, 1), np.uint8))
    return folder


def levels():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8, 8, 1)), jnp.float32)
    return x, jnp.array([0.0, 0.3, 0.5, 2.0]), jnp.array([0.1, 0.5, 1.0, 4.0])


# --- the folder ----------------------------------------------------------------------------------


def test_weights_statistics_and_path_come_back_bit_for_bit(saved, model):
    assert {path.name for path in saved.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png"
    }  # fmt: skip
    loaded = pretrained.load(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    np.testing.assert_array_equal(loaded.mean, model.mean)
    np.testing.assert_array_equal(loaded.spectrum, model.spectrum)
    assert loaded.image_shape == (8, 8, 1)
    assert loaded.info["weights"] == "EMA, half-life 100 images"
    assert loaded.description == model.description
    for t in (0.01, 1.0, 50.0):
        assert float(loaded.schedule.alpha(t)) == float(model.schedule.alpha(t))


def test_a_model_on_gs_is_the_model_and_without_its_last_file_none(model, store):
    """config.json comes last: a kill before it leaves no model."""
    url = "gs://bucket/pretrained"
    pretrained.save(model, url, samples=NO_SAMPLES)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(url).params, model.params)
    with pytest.raises(ValueError, match="gs://bucket/pretrained is not empty"):
        pretrained.save(model, url, samples=NO_SAMPLES)
    pretrained.storage.remove(pretrained.storage.path(url) / "config.json")
    with pytest.raises(ValueError, match=r"config\.json"):
        pretrained.load(url)


def test_a_model_is_saved_whole_or_not_at_all(model, place, monkeypatch):
    write = pretrained.storage.write_files

    def full(files):
        write(dict(list(files.items())[:2]))
        raise OSError("disk full")

    monkeypatch.setattr(pretrained.storage, "write_files", full)
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(model, place / "new", samples=NO_SAMPLES)
    assert list(place.glob("*")) == []


def test_a_card_shows_names_and_nothing_of_markup(model, tmp_path):
    tag = "<img src=x onerror=alert(1)>`\n"
    report = {key: tag for key in ("solver", "network_calls", "bnr", "seeds")}
    info = model.info | {"configuration": {"data": {"source": tag}}, "origin": tag, "weights": tag}
    info["evaluation"] = [{"metric": tag, tag: 1.5, **report}]
    folder = tmp_path / tag
    pretrained.save(dataclasses.replace(model, info=info), folder, samples=NO_SAMPLES)
    card = (folder / "README.md").read_text()
    assert "# _img src=x onerror=alert(1)___\n" in card
    assert "<" not in card
    assert card.count("`") % 2 == 0


@pytest.mark.parametrize(
    "name", ["digits", *(pytest.param(n, marks=pytest.mark.long) for n in ("photos", "cifar10_16"))]
)
def test_the_lines_of_a_shipped_card_run(name, monkeypatch):
    folder = pathlib.Path(pretrained.__file__).parents[1] / "pretrained" / name
    monkeypatch.chdir(folder.parents[1])  # the repository's root
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    if name == "cifar10_16":
        code = code.replace("range(16)", "range(2), num_steps=2")  # quicker
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    images = names["clean" if name == "photos" else "images"]
    assert images.shape[1:] == names["model"].image_shape
    assert np.all(np.isfinite(images))


# --- what is refused -----------------------------------------------------------------------------


def in_config(*keys, to):
    """Damage: another value, or none, of a key of config.json."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        *path, last = keys
        section = config
        for key in path:
            section = section[key]
        section[last] = to
        if to is None:
            del section[last]
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def in_arrays(name, change):
    """Damage: another array, or none, in model.safetensors."""

    def damage(folder):
        arrays = safetensors.numpy.load_file(folder / "model.safetensors")
        changed = change(arrays.pop(name, None))
        arrays |= {} if changed is None else {name: changed}
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")

    return damage


def as_text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def a_pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


NAME = "enc_8x8_block0.conv0.bias"
DAMAGE = [
    (lambda f: (f / "model.safetensors").unlink(), "no trained network"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (as_text("config.json", b"{"), "JSON"),
    (as_text("config.json", b'{"a":' * 9999), "JSON"),
    (in_config("version", to=99), "version 2 .* 99"),
    (in_config("denoiser", to=None), "lacks denoiser"),
    (in_config("model", "name", to="unet"), "unet"),
    (in_config("model", "colour", to=1), "no argument colour"),
    (in_config("model", "model_channels", to=10**8), "must be 4 to 2,048, got 100000000"),
    (in_config("image_shape", to=[8, 8]), "image_shape"),
    (in_config("schedule", "constant_bnr", "speed", to=1), "speed"),
    (as_text("model.safetensors", b"\x08" + b"\0" * 7), "safetensors"),
    (in_arrays(NAME, lambda a: None), f"missing {NAME}"),
    (as_text("config.json", b" " * 2**24 + b"{}"), "more than the 16,777,216 bytes"),
    (as_text("config.json", b"[]"), "an object that has info"),
    (a_pipe("config.json"), "is not a regular file: remove it"),
    (a_pipe("model.safetensors"), "is not a regular file: remove it"),
    (in_config("info", "step", to=[3]), r"info.step .* a whole number of at least 0, got \[3\]"),
    (in_config("info", "step", to=-1), "info.step"),
    (in_config("info", "images_seen", to="7"), "info.images_seen"),
    (in_config("info", "weights", to="a" * 10**6), "info.weights .* one line of text, got 'aaa"),
    (in_config("info", "weights", to="a\nb"), "info.weights"),
    (in_config("info", "configuration", to={"data": []}), "goes with data, step and images_seen"),
    (in_config("info", "evaluation", to=[{"metric": ["fid"]}]), "info.evaluation must have"),
    (in_config("model", "c" * 10**6, to=1), "no argument ccc"),
    (in_arrays("x", lambda a: np.zeros(1, np.float32)), "unknown x"),
    (in_arrays(NAME, lambda a: a[:3]), rf"{NAME} has shape \(3,\), expected \(8,\)"),
    (in_arrays(NAME, lambda a: a.astype(np.float16)), rf"{NAME} \(F16\)"),
    (in_arrays(NAME, lambda a: a * np.nan), f"finite .* {NAME}"),
    (in_arrays(NAME, lambda a: a + 1), "checksum"),
    (in_arrays("data.spectrum", lambda a: -a), "data.spectrum"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_folder_that_is_not_sound_gets_one_clear_error(saved, tmp_path, damage, message):
    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.load(tmp_path / "copy")
    assert str(tmp_path / "copy") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_no_pickle_is_run(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return pathlib.Path.mkdir, (tmp_path / "exploded",)

    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        pretrained.load(tmp_path / "copy")
    assert not (tmp_path / "exploded").exists()


def test_a_type_that_cannot_be_loaded_again_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got 'float16'"):
        pretrained.save(model, tmp_path / "half", samples=NO_SAMPLES, dtype="float16")
    assert not (tmp_path / "half").exists()


def test_a_model_saved_in_bfloat16_has_rounded_weights_and_half_the_file(model, saved, tmp_path):
    pretrained.save(model, tmp_path / "half", samples=NO_SAMPLES, dtype="bfloat16")
    loaded = pretrained.load(tmp_path / "half")
    for got, leaf in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_array_equal(got, leaf.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(loaded.spectrum, model.spectrum)  # in full
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", saved)]
    assert sizes[0] < 0.6 * sizes[1]


# --- its denoiser --------------------------------------------------------------------------------


def test_the_denoiser_works_under_jit_vmap_and_grad(model):
    x, alpha, beta = levels()
    expected = model.denoise(x, alpha, beta)
    jitted = jax.jit(model)(np.asarray(x), alpha, beta)
    mapped = jax.vmap(lambda x, a, b: model.denoise(x[None], a, b).clean[0])(x, alpha, beta)
    np.testing.assert_allclose(jitted.blurry, expected.blurry, atol=1e-5)
    np.testing.assert_allclose(mapped, expected.clean, atol=1e-4)
    total = jax.jit(lambda x: model.denoise(x, alpha, beta).clean.sum())
    step = 1e-2 * jnp.ones_like(x)
    change = (total(x + step) - total(x - step)) / 2
    np.testing.assert_allclose(jnp.sum(jax.grad(total)(x) * step), change, rtol=1e-2)


def test_the_network_receives_the_class():
    conditional = make_model(model={**DESCRIPTION["model"], "num_classes": 3})
    conditional.params["map_label"]["kernel"] *= 30  # shows in images of 8 bits
    x, alpha, beta = levels()
    by_class = [conditional.denoise(x, alpha, beta, labels=np.full(4, c)).clean for c in (0, 1)]
    assert np.abs(by_class[0] - by_class[1]).max() > 1e-4
    drawn = conditional.sample([3, 4], num_steps=2)  # classes 0 and 1
    asked = [conditional.sample([3, 4], num_steps=2, label=label) for label in (1, 2)]
    np.testing.assert_array_equal(drawn[1], asked[0][1])
    assert np.any(asked[1] != asked[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 8, 8, 1), np.uint8), 0.0, 1.0), "scale uint8 images by x / 127.5 - 1"),
        ((np.zeros((2, 8, 8, 1), np.float32), 0.0, 1.0, [0, 7]), "from -1 .none. to below 0"),
        ((np.zeros((2, 8, 8, 1), np.float32), 0.0, 1.0, [0, -2]), "from -1"),
    ],
)
def test_a_wrong_argument_of_a_denoiser_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(*arguments)


def test_a_height_and_width_that_cannot_be_halved_are_reflected():
    """Without blur nothing but the network mixes pixels."""
    model = make_model(model={**DESCRIPTION["model"], "channel_mult": [1, 1]})
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 9, 5, 1)), jnp.float32)
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), "symmetric")
    found, expected = model.denoise(x, 0.0, 0.3), model.denoise(padded, 0.0, 0.3)
    np.testing.assert_allclose(found.blurry, expected.blurry[:, :9, :5], atol=1e-5)


@pytest.mark.long
def test_the_memory_of_the_network_is_that_of_a_tile(model):
    """XLA's count: sixteen times the pixels, and far from sixteen times the memory."""

    def megabytes(side):
        x = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        compiled = jax.jit(lambda x: model.denoise(x, 0.5, 0.3).clean).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    # A dozen copies of the image itself, in float32, and the matrices of the DCT.
    assert megabytes(512) < megabytes(128) + 12 * 512**2 * 4 / 2**20


# --- its samples ---------------------------------------------------------------------------------


def test_samples_are_the_pure_samplers_also_on_another_path(model):
    seeds, bnr = jnp.array([5, 9], jnp.uint32), 2.0
    path = schedules.constant_bnr(bnr)
    noise = samplers.initial_noise(seeds, (8, 8, 1))
    expected = samplers.sample(model.denoise, noise, path, solver="multistep", num_steps=5)
    found = model.sample([5, 9], "multistep", 5, bnr)
    assert found.dtype == np.uint8
    # another program: to one grey level
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1


def test_samples_on_the_spectral_grid_start_from_the_training_datas_mean_and_spectrum(model):
    seeds = jnp.array([5, 9], jnp.uint32)
    path = schedules.constant_bnr(0.5)
    times = schedules.spectral_grid(path, model.spectrum, 3, "multistep")
    noise = samplers.initial_noise(seeds, (8, 8, 1))
    start = samplers.gaussian_start(noise, path, times[0], model.mean, model.spectrum)
    expected = samplers.solve(model.denoise, start, path, times, solver="multistep")
    found = model.sample([5, 9], "multistep", 3, time_grid="spectral")
    assert np.abs(found.astype(int) - to_uint8(expected)).max() <= 1


def test_an_image_depends_on_its_seed_alone(model):
    together = model.sample(range(5), num_steps=2, batch_size=2)
    np.testing.assert_array_equal(together[3], model.sample([9, 3], num_steps=2)[1])
    alone = model.sample(3, num_steps=2).astype(int)
    assert np.abs(alone[0] - together[3]).max() <= 1


def test_what_cannot_be_drawn_is_refused(model):
    with pytest.raises(ValueError, match="grid must be one of edm, spectral, got 'cosine'"):
        model.sample([0], time_grid="cosine")
    unknown = dataclasses.replace(model, statistics=None)
    with pytest.raises(ValueError, match="does not carry the spectrum of its training data"):
        unknown.sample([0], time_grid="spectral")
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, model.params)
    with pytest.raises(ValueError, match="images are not finite"):
        dataclasses.replace(model, params=nan).sample([0], num_steps=2)
    cold = make_model(schedule={"name": "cold"})
    with pytest.raises(ValueError, match="path ends in blurred images, not in noise"):
        cold.sample([0])


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
