"""EDM's weights in this project's networks: equal to EDM's own outputs, or refused by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.torch_writer import module, network_file, packed_tensor
from warm_diffusion import denoiser, pretrained, samplers
from warm_diffusion.models import by_name, ddpmpp, from_edm, ncsnpp
from warm_diffusion.models.edm import hyperparameters

NETWORKS = {"ddpmpp": ddpmpp, "ncsnpp": ncsnpp}


@pytest.fixture(scope="module")
def golden_folder(shared_folder):
    """EDM's own networks, inputs and outputs: see golden/README."""
    return shared_folder / "golden"


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request, golden_folder):
    """(name, EDM's own weights, the network that they give, inputs and outputs of EDM's own)."""
    name = request.param
    arrays = dict(np.load(golden_folder / f"edm_{name}_tiny.npz"))
    weights = {name[2:]: a for name, a in arrays.items() if name.startswith("w/")}
    return name, weights, compiled(weights), arrays


def packed(weights, class_name):
    """Opcodes of a module of EDM's that holds weights by their dotted names."""
    own, parts = {}, {}
    for name, array in weights.items():
        first, _, rest = name.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = array
        else:
            own[name] = packed_tensor(array)
    return module(class_name, own, {name: packed(part, name) for name, part in parts.items()})


def write(path, weights):
    """A .pkl of EDM's; the preconditioner calls its network `model`."""
    renamed = {f"model.{name}": array for name, array in weights.items()}
    path.write_bytes(network_file(packed(renamed, "EDMPrecond")))
    return path


def compiled(weights):
    """(params, arrays, alpha, conditions) -> EDM's denoiser on the golden inputs."""
    network = by_name(**hyperparameters(weights))

    @jax.jit
    def run(params, x, alpha, sigma, conditions):
        def apply(x, c_noise, c_blur):
            return network.apply({"params": params}, x, c_noise, c_blur, **conditions)

        return denoiser.precondition(apply)(x, alpha, sigma)

    def denoise(params, arrays, alpha=0.0, **conditions):
        x, sigma = jnp.asarray(arrays["x"]), jnp.asarray(arrays["sigma"]).ravel()
        return run(params, x, jnp.full(len(x), alpha), sigma, conditions)

    return denoise


# --- equal to EDM --------------------------------------------------------------------------------


def test_a_file_of_edms_weights_is_edms_network_at_no_blur(golden, tmp_path):
    name, weights, denoise, arrays = golden
    model = pretrained.load(write(tmp_path / "edm.pkl", weights))
    assert model.description["model"]["name"] == name
    labels = jnp.asarray(arrays["augment_labels"])
    found = denoise(model.params, arrays, augment_labels=labels)
    expected = arrays["denoised"]
    assert np.abs(found.blurry - expected).max() < 2e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(found.residual, np.zeros_like(expected))  # the second head
    assert model.spectrum is None  # what EDM's images were like is not in the file
    # No augmentation is zero labels; and before training, blur changes nothing.
    found = denoise(model.params, arrays, 2.0, augment_labels=jnp.zeros_like(labels))
    np.testing.assert_allclose(found.blurry, arrays["denoised_no_augment"], atol=2e-4)


def test_edms_own_pickle_is_its_network_bit_for_bit(golden_folder):
    model = pretrained.load(golden_folder / "edm_ddpmpp_tiny.pkl")
    arrays = np.load(golden_folder / "edm_ddpmpp_tiny.npz")
    weights = {name[2:]: arrays[name] for name in arrays.files if name.startswith("w/")}
    expected = from_edm(model.network, weights, jax.random.key(0))["params"]
    jax.tree.map(np.testing.assert_array_equal, model.params, expected)
    assert model.description["denoiser"]["sigma_data"] == 0.5


def test_it_draws_the_images_of_edms_own_sampler(golden, tmp_path):
    """EDM's deterministic sampler of 6 steps, run by its authors' code in float64."""
    _, weights, _, arrays = golden
    model = pretrained.load(write(tmp_path / "edm.pkl", weights))
    latents = jnp.asarray(arrays["latents"], jnp.float32)
    run = jax.jit(lambda x: samplers.sample(model.denoise, x, model.schedule, num_steps=6))
    expected = arrays["samples_6_steps"]
    assert np.abs(run(latents) - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("golden", ["ddpmpp"], indirect=True)
def test_a_class_label_adds_its_column_to_the_embedding(golden):
    """EDM adds sqrt(n) W[:, label] + b to the noise embedding; that is a shift of the next bias."""
    _, weights, denoise, arrays = golden
    rng, num_classes, label = np.random.default_rng(0), 3, 2
    first, bias = weights["map_layer0.weight"], weights["map_layer0.bias"]
    matrix = rng.standard_normal((first.shape[1], num_classes)).astype(np.float32)
    offset = rng.standard_normal(first.shape[1]).astype(np.float32)
    conditional = {**weights, "map_label.weight": matrix, "map_label.bias": offset}
    shift = first @ (np.sqrt(num_classes) * matrix[:, label] + offset)
    shifted = {**weights, "map_layer0.bias": bias + shift}

    def run(denoise, weights, **conditions):
        network = by_name(**hyperparameters(weights))
        params = from_edm(network, weights, jax.random.key(0))["params"]
        return denoise(params, arrays, **conditions).blurry

    none = jnp.zeros_like(arrays["augment_labels"])
    labels = jnp.full(len(arrays["x"]), label)
    expected = run(denoise, shifted, augment_labels=none)
    found = run(compiled(conditional), conditional, labels=labels)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    without = run(denoise, weights, augment_labels=none)
    assert np.abs(expected - without).max() > 1e-2 * np.abs(expected).max()


# --- which network it is -------------------------------------------------------------------------


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
    ("name", "options"),
    [
        ("ddpmpp", {**CIFAR10, "num_classes": 10}),
        ("ncsnpp", {**CIFAR10, "resolution": 64, "channel_mult": (1, 2, 2, 2), "num_blocks": 1}),
        ("ddpmpp", {**CIFAR10, "num_blocks": 0, "attention_resolutions": (), "augment_dim": 0}),
        ("ncsnpp", {**CIFAR10, "num_blocks": 1, "attention_resolutions": (32, 8), "channels": 1}),
    ],
    ids=["conditional", "four levels", "no blocks", "attention twice"],
)
def test_hyperparameters_are_recovered_from_shapes(name, options):
    assert hyperparameters(edm_arrays(name, **options)) == {"name": name, **options}


# --- what cannot be used -------------------------------------------------------------------------


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
    return "these are not the weights of EDM's DDPM.. or NCSN.."


def not_finite(weights):
    weights["map_layer0.bias"] = np.full(64, np.nan, np.float32)
    return r"not finite floating-point numbers.*map_layer0\.bias"


@pytest.mark.parametrize("damage", [dropped, added, cut, no_output, not_finite])
@pytest.mark.parametrize("golden", ["ddpmpp"], indirect=True)
def test_arrays_that_do_not_fit_are_named_in_one_line(golden, tmp_path, damage):
    weights = dict(golden[1])
    message = damage(weights)
    with pytest.raises(ValueError, match=f"^.*edm.pkl.*{message}.*$"):
        pretrained.load(write(tmp_path / "edm.pkl", weights))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("edm.pkl", b"PK\x03\x04 cut short"),
        ("edm.pkl", b""),
        ("edm.txt", b"hello"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^.*{re.escape(name)}.*$"):
        pretrained.load(tmp_path / name)
