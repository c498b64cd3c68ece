"""Every configuration builds: network, loss with gradient, and sampler, by shapes alone."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion.app import build, settings
from warm_diffusion.runtime.devices import make_mesh
from warm_diffusion.training.step import Batch


def load_config(name, *arguments):
    module = importlib.import_module(f"configs.{name}")
    return module, module.get_config(*arguments)


def parameter_count(config, shape):
    built = build.architecture(config, shape)
    params = built.abstract_params
    return built, params, sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("default", ()),
        ("digits", ()),
        ("cifar10", ()),
        pytest.param("cifar10", ("cond",), marks=pytest.mark.long),
        ("cifar10", ("hot,small",)),
        pytest.param("ffhq64", (), marks=pytest.mark.long),
        pytest.param("folder", ("photos",), marks=pytest.mark.long),
        pytest.param("lsun_church128", (), marks=pytest.mark.long),
        ("photos", ()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_a_configuration_builds(name, arguments):
    if name == "photos":
        pytest.importorskip("skimage")  # whose images tell the spectrum
    _, config = load_config(name, *arguments)
    size = config.data.resolution or 8
    shape = (size, size, config.data.channels or 1)
    built, params, _ = parameter_count(config, shape)
    loss_fn = build.loss(config, built)
    batch = Batch(
        jax.ShapeDtypeStruct((2, *shape), jnp.uint8),
        jax.ShapeDtypeStruct((2,), jnp.int32) if config.model.num_classes else None,
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    assert jax.eval_shape(loss_fn, params, keys, batch).total.shape == (2,)
    sampler = build.sampler(config, built, make_mesh(), batch_size=2 * make_mesh().size)
    # Heun calls the network twice a step but the last (EDM, algorithm 1)
    assert sampler.num_calls == 2 * config.sampling.num_steps - 1


@pytest.mark.parametrize("name", ["cifar10", "ffhq64", "folder", "lsun_church128"])
def test_the_cost_that_a_configuration_states_is_its_own(name):
    module, config = load_config(name)
    size = config.data.resolution
    _, _, count = parameter_count(config, (size, size, 3))
    stated, megabytes = re.search(r"([\d.]+) M parameters \((\d+) MB", module.__doc__).groups()
    np.testing.assert_allclose(float(stated), count / 1e6, atol=0.05)
    np.testing.assert_allclose(float(megabytes), 4 * count / 1e6, atol=0.5)


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_the_network_for_a_folder_attends_at_16_pixels_at_three_resolutions(resolution):
    _, config = load_config("folder", "photos")
    assert config.data.source == "folder:photos"
    settings.check_training(config, (resolution, resolution, 3))
