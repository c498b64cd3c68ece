"""The loss and the samplers with other people's networks, under every way to use many devices.

One small network in plain JAX, on one device, under `jax.jit` with a mesh and under `jax.pmap`, and
in flax.nnx with the same weights under the mesh (the package's own are flax.linen). All must give
the same loss, gradients, optimizer step and samples.

They run in a process of its own with four CPU devices, since the number of devices is fixed when
JAX starts, and in double precision: sums over the batch are taken in another order on four devices,
and 1e-10 of the largest value leaves no room for anything else.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from warm_diffusion import denoiser, losses, samplers, schedules

ROOT = Path(__file__).resolve().parents[1]
DEVICES, BATCH, SHAPE, WIDTH = 4, 8, (6, 5, 2), 7
TOLERANCE = 1e-10
QUANTITIES = ("loss", "gradient", "updated", "samples")
PATH = schedules.constant_bnr(0.5)
OPTIMIZER = optax.adam(1e-2)


# --- one network, twice --------------------------------------------------------------------------


def weights():
    """A convolution, the levels' shift and a second convolution."""
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 3, 2, WIDTH), "levels": (2, WIDTH), "last": (3, 3, WIDTH, 4)}
    return {
        name: {
            "kernel": jnp.asarray(rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))),
            "bias": jnp.asarray(0.1 * rng.standard_normal(shape[-1])),
        }
        for name, shape in shapes.items()
    }


def plain_jax():
    """(parameters, apply) without any library."""

    def convolve(layer, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
        )
        return y + layer["bias"].reshape(1, 1, 1, -1)

    def apply(params, x, c_noise, c_blur):
        levels = jnp.stack([c_noise, c_blur], axis=1)
        shift = levels @ params["levels"]["kernel"] + params["levels"]["bias"].reshape(1, -1)
        hidden = convolve(params["first"], x) + shift[:, None, None]
        return convolve(params["last"], jax.nn.silu(hidden))

    return weights(), apply


class NnxNetwork(nnx.Module):
    """The same network as an object that holds its parameters."""

    def __init__(self, rngs):
        def conv(features_in, features):
            return nnx.Conv(features_in, features, (3, 3), param_dtype=jnp.float64, rngs=rngs)

        self.first, self.last = conv(2, WIDTH), conv(WIDTH, 4)
        self.levels = nnx.Linear(2, WIDTH, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x, c_noise, c_blur):
        shift = self.levels(jnp.stack([c_noise, c_blur], axis=1))
        return self.last(nnx.silu(self.first(x) + shift[:, None, None]))


def flax_nnx():
    """(parameters, apply) of the module, split as nnx does it."""
    module = NnxNetwork(nnx.Rngs(0))
    for name, layer in weights().items():
        getattr(module, name).kernel[...] = layer["kernel"]
        getattr(module, name).bias[...] = layer["bias"]
    structure, state = nnx.split(module)
    return state, lambda params, *inputs: nnx.merge(structure, params)(*inputs)


NETWORKS = {"plain_jax": plain_jax, "flax_nnx": flax_nnx}


# --- the whole path, on any part of the batch ----------------------------------------------------


def everything(apply, average):
    """(params, keys [B], x0, seeds [B]) -> loss [B], gradient, updated parameters, samples."""

    def denoise(params):
        return denoiser.precondition(lambda *inputs: apply(params, *inputs))

    def run(params, keys, x0, seeds):
        def objective(params):
            loss = losses.score_matching_loss(denoise(params), keys, x0, PATH).total
            return loss.mean(), loss

        gradient, loss = jax.grad(objective, has_aux=True)(params)
        gradient = average(gradient)
        updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(params))
        noise = samplers.initial_noise(seeds, SHAPE).astype(x0.dtype)
        churn = samplers.Churn(2.0, 0.0, 1e6, 1.0)
        samples = samplers.sample(denoise(params), noise, PATH, num_steps=4, churn=churn, key=keys)
        return loss, gradient, optax.apply_updates(params, updates), samples

    return run


def on_one_device(apply):
    return jax.jit(everything(apply, lambda gradient: gradient))


def on_a_mesh(apply):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    # The mean over the whole batch makes XLA sum the gradients over the devices.
    return jax.jit(
        everything(apply, lambda gradient: gradient),
        in_shardings=(everywhere, split, split, split),
    )


def under_pmap(apply):
    run = everything(apply, lambda gradient: jax.lax.pmean(gradient, "devices"))
    parallel = jax.pmap(run, "devices", in_axes=(None, 0, 0, 0))

    def cut(array):
        return array.reshape(DEVICES, BATCH // DEVICES, *array.shape[1:])

    def call(params, *batch):
        loss, gradient, updated, samples = parallel(params, *map(cut, batch))
        join = lambda array: array.reshape(BATCH, *array.shape[2:])  # noqa: E731
        # Parameters are the same on all devices: the last one's are as good as any.
        last = lambda tree: jax.tree.map(lambda leaf: leaf[-1], tree)  # noqa: E731
        return join(loss), last(gradient), last(updated), join(samples)

    return call


WRAPPERS = {"one_device": on_one_device, "mesh": on_a_mesh, "pmap": under_pmap}
RUNS = [("plain_jax", wrapper) for wrapper in WRAPPERS] + [("flax_nnx", "mesh")]


def main(out):
    """Writes what all of RUNS give: arrays NETWORK/WRAPPER/QUANTITY/NUMBER."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    keys = jax.random.split(jax.random.key(1), BATCH)
    x0 = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (BATCH, *SHAPE)))
    seeds = jnp.arange(BATCH, dtype=jnp.uint32)
    arrays = {"devices": np.array(len(jax.devices()))}
    for network, wrapper in RUNS:
        params, apply = NETWORKS[network]()
        results = WRAPPERS[wrapper](apply)(params, keys, x0, seeds)
        if wrapper == "mesh":  # where XLA put each of them, being told of the inputs alone
            places = [jax.tree.leaves(tree)[0].sharding for tree in results]
            split = [not place.is_fully_replicated for place in places]
            arrays[f"{network}/split"] = np.array(split)
        for quantity, tree in zip(QUANTITIES, results, strict=True):
            for number, leaf in enumerate(jax.tree.leaves(tree)):
                arrays[f"{network}/{wrapper}/{quantity}/{number}"] = np.asarray(leaf)
    np.savez(out, **arrays)


# --- the claims ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("reuse") / "results.npz"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nothing here runs twice
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_reuse", str(out)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(np.load(out))


def of(results, network, wrapper, quantity):
    prefix = f"{network}/{wrapper}/{quantity}/"
    return [array for name, array in results.items() if name.startswith(prefix)]


def assert_equal(got, expected):
    assert len(got) == len(expected) > 0
    for one, two in zip(got, expected, strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, two, rtol=0, atol=TOLERANCE * np.abs(two).max())


@pytest.mark.parametrize("run", RUNS[1:])
def test_every_way_gives_what_plain_jax_on_one_device_gives(results, run):
    for quantity in QUANTITIES:
        assert_equal(of(results, *run, quantity), of(results, *RUNS[0], quantity))


def test_each_device_computed_its_part_of_the_batch(results):
    assert results["devices"] == DEVICES
    for network in NETWORKS:  # and sums over the batch arrived on all
        assert dict(zip(QUANTITIES, results[f"{network}/split"], strict=True)) == dict(
            loss=True, gradient=False, updated=False, samples=True
        )


def test_every_parameter_moved_by_adams_first_step(results):
    # Adam's first step is the learning rate against the sign of the gradient (Kingma & Ba,
    # Algorithm 1): m / sqrt(v) after both corrections is g / |g|.
    gradient, updated = (of(results, "plain_jax", "pmap", q) for q in ("gradient", "updated"))
    for g, new, old in zip(gradient, updated, jax.tree.leaves(weights()), strict=True):
        np.testing.assert_allclose(new - old, -1e-2 * np.sign(g), atol=1e-5)
        assert np.all(g != 0)


if __name__ == "__main__":
    main(sys.argv[1])
