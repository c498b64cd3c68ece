"""From a file of EDM's weights to a model folder, and back into a model."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from warm_diffusion import denoiser, pretrained, samplers
from warm_diffusion.models import by_name, ddpmpp, edm_weights, from_edm, ncsnpp
from warm_diffusion.models.edm import edm_hyperparameters

NETWORKS = {"ddpmpp": ddpmpp, "ncsnpp": ncsnpp}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=NETWORKS)
def golden(request, shared_folder):
    """(name, EDM's own arrays, inputs and outputs of EDM's own network): see golden/README."""
    arrays = dict(np.load(shared_folder / "golden" / f"edm_{request.param}_tiny.npz"))
    weights = {name[2:]: a for name, a in arrays.items() if name.startswith("w/")}
    return request.param, weights, arrays


@pytest.fixture
def command(capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def run(*argv):
        status = edm_weights.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def write(path, weights):
    if path.suffix == ".npz":
        np.savez(path, **weights)
    else:
        arrays = {name: np.ascontiguousarray(a) for name, a in weights.items()}
        safetensors.numpy.save_file(arrays, path)
    return path


def denoise(network, params, arrays, **conditions):
    """Our denoiser at no blur, on the golden inputs."""

    @jax.jit
    def run(x, sigma):
        def apply(x, c_noise, c_blur):
            return network.apply({"params": params}, x, c_noise, c_blur, **conditions)

        return denoiser.precondition(apply)(x, 0.0, sigma)

    return run(jnp.asarray(arrays["x"]), jnp.asarray(arrays["sigma"]).ravel())


# --- the way through the command -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_the_command_makes_of_edms_file_a_warm_model_that_is_edm_at_no_blur(
    golden, command, tmp_path, suffix
):
    name, weights, arrays = golden
    # EDM's pickles hold the preconditioner, whose network is called `model`.
    weights = {f"model.{key}": array for key, array in weights.items()}
    status, out, _ = command(write(tmp_path / f"edm{suffix}", weights))
    assert status == 0
    assert f"name={name}" in out
    assert str(tmp_path / "edm") in out
    model = pretrained.load(tmp_path / "edm")
    labels = jnp.asarray(arrays["augment_labels"])
    got = denoise(model.architecture.network, model.params, arrays, augment_labels=labels)
    expected = arrays["denoised"]
    assert np.abs(got.blurry - expected).max() < 2e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(got.residual, np.zeros_like(expected))
    assert model.spectrum is None  # what EDM's images were like is not in the file


def test_the_converted_model_draws_the_images_of_edms_own_sampler(golden, command, tmp_path):
    """EDM's deterministic sampler of 6 steps, run by its authors' code in float64."""
    _, weights, arrays = golden
    command(write(tmp_path / "edm.npz", weights), f"--out={tmp_path / 'model'}")
    model = pretrained.load(tmp_path / "model")
    latents = jnp.asarray(arrays["latents"], jnp.float32)
    run = jax.jit(lambda x: samplers.sample(model.denoise, x, model.schedule, num_steps=6))
    expected = arrays["samples_6_steps"]
    assert np.abs(run(latents) - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_command_reads_the_network_off_the_arrays(golden):
    # Origin: golden/README.
    assert edm_hyperparameters(golden[1]) == dict(
        name=golden[0], resolution=16, channels=3, model_channels=16, channel_mult=(1, 2),
        num_blocks=1, attention_resolutions=(8,), num_classes=0, augment_dim=9,
    )  # fmt: skip


def edm_arrays(name, **options):
    """Zeros under EDM's names, in torch's layout, that take no memory.

    The renaming is written out here once more: which names and layouts are EDM's is settled by the
    golden arrays.
    """
    network = NETWORKS[name](**options, heads=1)
    level = jnp.zeros((1,))
    image = jnp.zeros((1, network.resolution, network.resolution, network.channels))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image, level, level)["params"]
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        *module, kind = (part.key for part in path)
        if module and module[0] in ("blur0", "blur1"):
            continue
        key = ".".join([*module, "bias" if kind == "bias" else "weight"])
        key = re.sub("^(enc|dec)_", r"\1.", key) if module else "map_noise.freqs"
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}[leaf.ndim] if kind == "kernel" else (0,)
        arrays[key] = np.broadcast_to(np.float32(0), [leaf.shape[axis] for axis in axes])
    return arrays


CIFAR10 = dict(
    resolution=32, channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
    attention_resolutions=(16,), num_classes=0, augment_dim=9,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        CIFAR10,
        {**CIFAR10, "num_classes": 10},
        {**CIFAR10, "resolution": 64, "channel_mult": (1, 2, 2, 2)},
        {**CIFAR10, "num_blocks": 0, "attention_resolutions": (), "augment_dim": 0},
        {**CIFAR10, "attention_resolutions": (32, 8), "channels": 1},
    ],
    ids=["cifar10", "conditional", "ffhq64", "no blocks", "attention twice"],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_hyperparameters_are_recovered_from_shapes(name, options):
    assert edm_hyperparameters(edm_arrays(name, **options)) == {"name": name, **options}


def test_edms_cifar10_network_has_its_published_number_of_parameters():
    arrays = edm_arrays("ddpmpp", **CIFAR10)
    assert sum(array.size for array in arrays.values()) == 55_732_739 + 9 * 128


# --- conditioning --------------------------------------------------------------------------------


def test_a_class_label_adds_its_column_to_the_embedding(golden):
    """EDM adds sqrt(n) W[:, label] + b to the noise embedding; that is a shift of the next bias."""
    _, weights, arrays = golden
    rng, num_classes, label = np.random.default_rng(0), 3, 2
    first, bias = weights["map_layer0.weight"], weights["map_layer0.bias"]
    matrix = rng.standard_normal((first.shape[1], num_classes)).astype(np.float32)
    offset = rng.standard_normal(first.shape[1]).astype(np.float32)
    conditional = {**weights, "map_label.weight": matrix, "map_label.bias": offset}
    shift = first @ (np.sqrt(num_classes) * matrix[:, label] + offset)
    shifted = {**weights, "map_layer0.bias": bias + shift}

    def run(weights, **conditions):
        network = by_name(**edm_hyperparameters(weights))
        variables = from_edm(network, weights, jax.random.key(0))
        return denoise(network, variables["params"], arrays, **conditions).blurry

    labels = jnp.full(len(arrays["x"]), label)
    expected = run(shifted)
    np.testing.assert_allclose(
        run(conditional, labels=labels), expected, atol=1e-4 * np.abs(expected).max()
    )
    assert np.abs(expected - run(weights)).max() > 1e-2 * np.abs(expected).max()


def test_one_head_holds_the_denoiser_alone(golden, command, tmp_path):
    _, weights, _ = golden
    source = write(tmp_path / "edm.npz", weights)
    assert command(source, "--parameterization=score", f"--out={tmp_path / 'one'}")[0] == 0
    output = pretrained.load(tmp_path / "one").params["dec_16x16_aux_conv"]["kernel"]
    np.testing.assert_array_equal(
        output, weights["dec.16x16_aux_conv.weight"].transpose(2, 3, 1, 0)
    )


def test_the_seed_draws_the_blur_embedding_alone(golden, command, tmp_path):
    source = write(tmp_path / "edm.npz", golden[1])
    params = []
    for seed in (0, 1):
        assert command(source, f"--seed={seed}", f"--out={tmp_path / str(seed)}")[0] == 0
        params.append(pretrained.load(tmp_path / str(seed)).params)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *params)
    different = [path for path, equal in jax.tree_util.tree_leaves_with_path(same) if not equal]
    assert [[part.key for part in path] for path in different] == [["blur0", "kernel"]]


# --- what cannot be used -------------------------------------------------------------------------


def test_a_pickle_is_never_loaded_and_the_way_out_is_told(command, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in ("edm.pkl", "edm.pth", "edm.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        status, _, err = command(tmp_path / name)
        assert status == 2
        assert re.fullmatch(r"error: .*is a pickle.*numpy\.savez.*state_dict.*\n", err)
    np.savez(tmp_path / "edm.npz", a=np.array([Bomb()], object))
    status, _, err = command(tmp_path / "edm.npz")
    assert status == 2
    assert "allow_pickle=False" in err
    assert not (tmp_path / "exploded").exists()


def dropped(weights):
    del weights["enc.16x16_block0.conv1.bias"]
    return r"missing enc\.16x16_block0\.conv1\.bias"


def added(weights):
    weights["enc.16x16_block7.conv0.bias"] = np.zeros(16, np.float32)
    return r"unknown enc\.16x16_block7\.conv0\.bias"


def cut(weights):
    weights["map_layer1.weight"] = weights["map_layer1.weight"][:5]
    return r"map_layer1\.weight has shape \(5, 64\), expected \(64, 64\)"


def no_output(weights):
    del weights["dec.16x16_aux_conv.weight"]
    return "no weights of EDM's DDPM.. or NCSN.."


def other_filter(weights):
    weights["enc.8x8_down.conv0.resample_filter"] = np.ones((1, 1, 6, 6), np.float32)
    return r"enc\.8x8_down\.conv0\.resample_filter is not the filter \[1, "


def not_finite(weights):
    weights["map_layer0.bias"] = np.full(64, np.nan, np.float32)
    return r"not finite floating-point numbers: map_layer0\.bias"


def integers(weights):
    weights["map_layer0.bias"] = np.zeros(64, np.int64)
    return r"not finite floating-point numbers: map_layer0\.bias"


def first_layer_missing(weights):
    del weights["enc.16x16_conv.weight"]
    return r"missing enc\.16x16_conv\.weight"


@pytest.mark.parametrize(
    "damage",
    [dropped, added, cut, no_output, other_filter, not_finite, integers, first_layer_missing],
)
def test_arrays_that_do_not_fit_are_named_in_one_line(golden, command, tmp_path, damage):
    weights = dict(golden[1])
    message = damage(weights)
    status, _, err = command(write(tmp_path / "edm.npz", weights))
    assert status == 2
    assert re.fullmatch(f"error: .*{message}.*\n", err)
    assert not (tmp_path / "edm").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("edm.npz", b"PK\x03\x04 cut short"),
        ("edm.npz", b""),
        ("edm.safetensors", b"\xff" * 40),
        ("edm.txt", b"hello"),
        ("nowhere.npz", None),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(command, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, _, err = command(tmp_path / name)
    assert status == 2
    assert re.fullmatch(f"error: .*{name}.*\n", err)


def test_what_is_there_is_never_replaced(golden, command, tmp_path):
    source = write(tmp_path / "edm.safetensors", golden[1])
    before = source.read_bytes()
    for out in (source, tmp_path):
        status, _, err = command(source, f"--out={out}")
        assert (status, source.read_bytes()) == (2, before)
        assert re.fullmatch("error: .* is not empty: .*\n", err)


def test_the_module_runs_as_a_command_with_one_line_of_error(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(b"")
    run = subprocess.run(
        [sys.executable, "-m", "warm_diffusion.models.edm_weights", str(tmp_path / "edm.pkl")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
