"""The same numbers in every mode of JAX, for every kind of public function on arrays.

What one program in float32 under plain settings returns is the reference; a mode may change neither
its numbers, up to rounding, nor, where they are data, their type. All functions are one program,
so that a mode is one compilation.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from warm_diffusion import (
    dct,
    denoiser,
    losses,
    oracle,
    process,
    restoration,
    samplers,
    schedules,
    spectra,
)

B, SHAPE = 2, (4, 3, 1)
X = np.random.default_rng(0).uniform(-1, 1, (B, *SHAPE)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((B, *SHAPE)).astype(np.float32)
SPECTRUM = (0.3 / (0.3 + np.arange(12.0))).reshape(4, 3).astype(np.float32)
PATH = schedules.constant_bnr(0.5)
LEVELS = (0.5, np.array([0.5, 2.0]))


def network(x, c_noise, c_blur):
    level = (c_noise + c_blur).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.concatenate([jnp.tanh(x) + level, jnp.cos(x)], axis=-1)


def one_head(*inputs):
    return network(*inputs)[..., :1]


DENOISE = denoiser.precondition(network)
HEADS = {"divide": network, "clean": one_head, "score": one_head}
POWER = schedules.from_functions(jnp.sqrt, lambda t: t**2, t_min=0.1, t_max=9.0)


def wrapped(kind, x):
    return denoiser.precondition(HEADS[kind], parameterization=kind)(x, *LEVELS).clean


def solved(x, path=PATH, solver="heun", **options):
    times = schedules.time_grid(path, 2)
    return samplers.solve(DENOISE, 9 * x, path, times, solver=solver, **options)


# name -> function of data x, noise like x, and a key. These return data like x,
DATA = {
    "dct": lambda x, noise, key: dct.idct(dct.dct(x) * 0.5),
    "blur": lambda x, noise, key: dct.blur(x, 0.7),
    "transfer": lambda x, noise, key: dct.transfer(x[:, 0, 0, 0], 4, 3),
    "perturb": lambda x, noise, key: process.perturb(x, noise, *LEVELS),
    "transition": lambda x, noise, key: process.transition(x, noise, (0.1, 0.2), (0.5, 0.2)),
    "score": lambda x, noise, key: process.score(x, noise, 0.5),
    "velocity": lambda x, noise, key: process.velocity(
        x, denoiser.Prediction(noise, x), PATH, LEVELS[1]
    ),
    "divide": lambda x, noise, key: wrapped("divide", x),
    "clean": lambda x, noise, key: wrapped("clean", x),
    "score parameterization": lambda x, noise, key: wrapped("score", x),
    "guided": lambda x, noise, key: denoiser.guided(DENOISE, DENOISE, 2.0)(x, *LEVELS).clean,
    "gaussian": lambda x, noise, key: oracle.gaussian(X[0], SPECTRUM)(x, *LEVELS).clean,
    "mixture": lambda x, noise, key: oracle.mixture(X)(x, *LEVELS).clean,
    "gaussian_start": lambda x, noise, key: samplers.gaussian_start(
        noise, PATH, 2.0, X[0], SPECTRUM
    ),
    "sample": lambda x, noise, key: samplers.sample(DENOISE, noise, PATH, num_steps=2),
    "euler, cold": lambda x, noise, key: solved(x, schedules.cold(), "euler"),
    "multistep, blurring_diffusion": lambda x, noise, key: solved(
        x, schedules.blurring_diffusion(), "multistep"
    ),
    "churn, spectral": lambda x, noise, key: solved(
        noise, schedules.spectral(SPECTRUM), churn=samplers.Churn(5.0), key=key
    ),
    "wiener": lambda x, noise, key: restoration.wiener(x, SPECTRUM, 0.5, 0.3),
    "restore": lambda x, noise, key: restoration.restore(
        DENOISE, x, 0.5, 0.3, num_steps=2, key=key, stochastic=0.5
    ),
    "restore in one step": lambda x, noise, key: restoration.restore(
        DENOISE, x, 0.5, 0.3, num_steps=1
    ),
}
# and these numbers, in float32 at least.
FUNCTIONS = DATA | {
    "drift": lambda x, noise, key: process.drift_and_diffusion(PATH, 0.7, 4, 3)[1],
    "loss": lambda x, noise, key: losses.score_matching_loss(DENOISE, key, x, PATH).total,
    "initial_noise": lambda x, noise, key: samplers.initial_noise([3, 5], SHAPE),
    "any_bnr": lambda x, noise, key: schedules.any_bnr().sample_levels(key, (3,))[0],
    "from_functions": lambda x, noise, key: POWER.sample_levels(key, (3,))[0],
    "spectral_grid": lambda x, noise, key: schedules.spectral_grid(PATH, SPECTRUM, 3),
    "power_spectrum": lambda x, noise, key: spectra.power_spectrum(x),
    "spectrum_at": lambda x, noise, key: spectra.spectrum_at(SPECTRUM, 6, 5),
    "recommend_bnr": lambda x, noise, key: jnp.float32(spectra.recommend_bnr(SPECTRUM)),
    "departure": lambda x, noise, key: spectra.spectral_departure(x, SPECTRUM, 0.5, 0.5)[1],
    "estimate_levels": lambda x, noise, key: restoration.estimate_levels(
        0.1 * noise, SPECTRUM, alpha=0.0
    )[1],
    "level_errors": lambda x, noise, key: restoration.level_errors(x, SPECTRUM, 0.5, 0.3)[1],
    "goodness_of_fit": lambda x, noise, key: restoration.goodness_of_fit(x, SPECTRUM, 0.5, 0.3)[2],
    "quiet_noise": lambda x, noise, key: restoration.quiet_noise(x),
}
LOOSE = ("score", "level_errors")  # differences of rounded data
RANDOM = ("loss", "any_bnr", "from_functions", "churn, spectral", "restore")
BATCHED = ("loss", "sample", "multistep, blurring_diffusion", "restore")  # with any batch size
KINDS = (*BATCHED, "blur", "churn, spectral", "estimate_levels")  # those that have loops or keys
EAGER = ("loss", "transition", "churn, spectral", "mixture", "spectral_grid", "level_errors")


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(restoration, "_SCORING_STEPS", 4)


def program(names):
    """name -> result of those functions, each with a key of its own."""

    def run(x, noise, key):
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(FUNCTIONS)}
        return {name: FUNCTIONS[name](x, noise, keys[name]) for name in names}

    return run


def arguments(dtype=np.float32, key=jax.random.key):
    return jnp.asarray(X, dtype), jnp.asarray(NOISE, dtype), key(0)


@functools.cache
def expected():
    return jax.tree.map(np.asarray, jax.jit(program(FUNCTIONS))(*arguments()))


def check(found, tolerance=1e-4):
    for name, value in found.items():
        reference = expected()[name]
        value = np.asarray(jnp.asarray(value).astype(jnp.float32), np.float64)
        allowed = tolerance * (3 if name in LOOSE else 1)
        scale = allowed * np.abs(reference).max()
        np.testing.assert_allclose(value, reference, rtol=allowed, atol=scale, err_msg=name)


@contextlib.contextmanager
def settings(options):
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


# Together, since each is a compilation; alone they were found to change as little.
STRICT = {
    "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise",
    "jax_enable_checks": True, "jax_debug_key_reuse": True, "jax_transfer_guard": "disallow",
    "jax_debug_nans": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("x64", "names"), [(False, KINDS), (True, tuple(FUNCTIONS))], ids=["float32", "x64"]
)
def test_strict_modes_change_nothing(x64, names):
    given = arguments()
    with settings(STRICT | {"jax_enable_x64": x64}):
        found = jax.jit(program(names))(*given)
        assert [name for name in found if name in DATA and found[name].dtype != np.float32] == []
    check(found)


def test_without_jit_nothing_changes():
    with jax.disable_jit():
        found = program(EAGER)(*arguments())
    check(found)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "names"),
    [(jnp.bfloat16, 0.1, tuple(FUNCTIONS)), (np.float64, 1e-4, KINDS)],
    ids=["bfloat16", "float64"],
)
def test_type_in_is_type_out_with_the_same_random_numbers(dtype, tolerance, names):
    with jax.enable_x64(True):
        found = jax.jit(program(names))(*arguments(dtype))
        assert [name for name in found if name in DATA and found[name].dtype != dtype] == []
        assert [name for name in found if name not in DATA and found[name].dtype.itemsize < 4] == []
    check(found, tolerance)


def test_old_style_keys_are_keys():
    check(jax.jit(program(RANDOM))(*arguments(key=jax.random.PRNGKey)))


def test_a_symbolic_batch_can_be_exported():
    (batch,) = jax.export.symbolic_shape("b")
    like = jax.ShapeDtypeStruct((batch, *SHAPE), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    check(jax.export.export(jax.jit(program(BATCHED)))(like, like, key).call(*arguments()))


def test_shard_map_changes_nothing():
    # One device: what counts is that the program is one that varies over the axis.
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        program(KINDS), mesh=mesh, in_specs=(split, split, everywhere), out_specs=split
    )
    check(jax.jit(mapped)(*arguments()))
