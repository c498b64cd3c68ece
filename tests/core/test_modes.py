"""The same numbers in every mode of JAX: every public function on arrays, mode by mode.

A function's result in float32 under plain settings is the reference; a mode may change neither its
numbers, but for rounding, nor, where it returns data, their type.
"""

import contextlib

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
CHURN = samplers.Churn(5.0)


def network(x, c_noise, c_blur):
    level = (c_noise + c_blur).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.concatenate([jnp.tanh(x) + level, jnp.cos(x)], axis=-1)


DENOISE = denoiser.precondition(network)


def solved(x, key, path=PATH, **options):
    times = schedules.time_grid(path, 3)
    return samplers.solve(DENOISE, 80 * x, path, times, key=key, **options)


# name -> function of data x, noise like x, and a key
FUNCTIONS = {
    "dct": lambda x, noise, key: dct.idct(dct.dct(x) * 0.5),
    "blur": lambda x, noise, key: dct.blur(x, 0.7),
    "transfer": lambda x, noise, key: dct.transfer(x[:, 0, 0, 0], 4, 3),
    "perturb": lambda x, noise, key: process.perturb(x, noise, np.array([0.5, 1.0]), 0.3),
    "transition": lambda x, noise, key: process.transition(x, noise, (0.1, 0.2), (0.5, 0.2)),
    "drift": lambda x, noise, key: process.drift_and_diffusion(PATH, 0.7, 4, 3)[1],
    "score": lambda x, noise, key: process.score(x, noise, 0.5),
    "velocity": lambda x, noise, key: process.velocity(
        x, denoiser.Prediction(noise, x), PATH, np.array([1.0, 2.0])
    ),
    **{
        kind: lambda x, noise, key, kind=kind: (
            denoiser.precondition(
                network if kind == "divide" else lambda *a: network(*a)[..., :1],
                parameterization=kind,
            )(x, 0.7, np.array([0.5, 2.0])).clean
        )
        for kind in denoiser.PARAMETERIZATIONS
    },
    "guided": lambda x, noise, key: denoiser.guided(DENOISE, DENOISE, 2.0)(x, 0.5, 1.0).clean,
    "loss": lambda x, noise, key: losses.score_matching_loss(DENOISE, key, x, PATH).total,
    "gaussian": lambda x, noise, key: oracle.gaussian(X[0], SPECTRUM)(x, 0.5, 0.5).clean,
    "mixture": lambda x, noise, key: oracle.mixture(X)(x, 0.5, 0.5).clean,
    "gaussian_start": lambda x, noise, key: samplers.gaussian_start(
        noise, PATH, 2.0, X[0], SPECTRUM
    ),
    "initial_noise": lambda x, noise, key: samplers.initial_noise([3, 5], SHAPE),
    **{
        solver: lambda x, noise, key, solver=solver: samplers.sample(
            DENOISE, noise, PATH, solver=solver, num_steps=3
        )
        for solver in samplers.SOLVERS
    },
    "churn": lambda x, noise, key: solved(noise, key, churn=CHURN),
    "cold": lambda x, noise, key: samplers.solve(
        DENOISE, x, schedules.cold(), [9.0, 2.0, 0.0], solver="euler"
    ),
    "blurring_diffusion": lambda x, noise, key: samplers.sample(
        DENOISE, noise, schedules.blurring_diffusion(), num_steps=3
    ),
    "spectral": lambda x, noise, key: samplers.sample(
        DENOISE, noise, schedules.spectral(SPECTRUM), num_steps=3
    ),
    "spectral_grid": lambda x, noise, key: schedules.spectral_grid(PATH, SPECTRUM, 3),
    "any_bnr": lambda x, noise, key: schedules.any_bnr().sample_levels(key, (3,))[0],
    "from_functions": lambda x, noise, key: schedules.from_functions(
        jnp.sqrt, lambda t: t**2, t_min=0.1, t_max=9.0
    ).sample_levels(key, (3,))[0],
    "power_spectrum": lambda x, noise, key: spectra.power_spectrum(x),
    "spectrum_at": lambda x, noise, key: spectra.spectrum_at(SPECTRUM, 6, 5),
    "recommend_bnr": lambda x, noise, key: jnp.float32(spectra.recommend_bnr(SPECTRUM)),
    "departure": lambda x, noise, key: spectra.spectral_departure(x, SPECTRUM, 0.5, 0.5)[1],
    "wiener": lambda x, noise, key: restoration.wiener(x, SPECTRUM, 0.5, 0.3),
    "restore": lambda x, noise, key: restoration.restore(
        DENOISE, x, 0.5, 0.3, num_steps=2, key=key, stochastic=0.5
    ),
    "restore in one step": lambda x, noise, key: restoration.restore(
        DENOISE, x, 0.5, 0.3, num_steps=1
    ),
    "estimate_levels": lambda x, noise, key: restoration.estimate_levels(
        0.1 * noise, SPECTRUM, alpha=0.0
    )[1],
    "level_errors": lambda x, noise, key: restoration.level_errors(x, SPECTRUM, 0.5, 0.3)[1],
}
# These return data like x; the others numbers in float32 at least, or of no type of data.
LIKE_X = [
    "dct", "blur", "transfer", "perturb", "transition", "score", "velocity",
    *denoiser.PARAMETERIZATIONS,
    "guided", "gaussian", "mixture", "gaussian_start", *samplers.SOLVERS, "churn", "cold",
    "blurring_diffusion", "spectral", "wiener", "restore", "restore in one step",
]  # fmt: skip
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(dtype=np.float32, key=jax.random.key):
    return jnp.asarray(X, dtype), jnp.asarray(NOISE, dtype), key(0)


@pytest.fixture(scope="module")
def expected():
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = np.asarray(jax.jit(FUNCTIONS[name])(*arguments()), np.float64)
        return kept[name]

    return of


def check(found, expected, tolerance=1e-4):
    scale = np.abs(expected).max()
    found = np.asarray(jnp.asarray(found).astype(jnp.float32), np.float64)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


# Together, since each is a compilation; alone they were found to change as little.
STRICT = [
    ("jax_numpy_dtype_promotion", "strict"), ("jax_numpy_rank_promotion", "raise"),
    ("jax_enable_checks", True), ("jax_debug_key_reuse", True), ("jax_transfer_guard", "disallow"),
]  # fmt: skip
MODES = {
    "strict": STRICT,
    "strict x64": [*STRICT, ("jax_enable_x64", True)],
    "debug_nans": [("jax_debug_nans", True)],
}


@contextlib.contextmanager
def settings(options):
    before = {name: getattr(jax.config, name) for name, _ in options}
    try:
        for name, value in options:
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("mode", MODES)
@each_function
def test_modes_change_nothing(name, mode, expected):
    reference, given = expected(name), arguments()
    with settings(MODES[mode]):
        found = jax.jit(FUNCTIONS[name])(*given)
        if name in LIKE_X:
            assert found.dtype == np.float32
    check(found, reference)


@each_function
def test_without_jit_nothing_changes(name, expected):
    with jax.disable_jit():
        found = FUNCTIONS[name](*arguments())
    check(found, expected(name))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 0.1), (np.float64, 1e-4)], ids=["bfloat16", "float64"]
)
@each_function
def test_type_in_is_type_out_with_the_same_random_numbers(name, dtype, tolerance, expected):
    reference = expected(name)
    with jax.enable_x64(True):
        found = jax.jit(FUNCTIONS[name])(*arguments(dtype))
        assert found.dtype == dtype if name in LIKE_X else found.dtype.itemsize >= 4
        if name in ("score", "level_errors"):  # differences of rounded data
            tolerance *= 3
        check(found, reference, tolerance)


@pytest.mark.parametrize("name", ["loss", "churn", "restore", "any_bnr"])
def test_old_style_keys_are_keys(name, expected):
    check(jax.jit(FUNCTIONS[name])(*arguments(key=jax.random.PRNGKey)), expected(name))


@pytest.mark.parametrize("name", ["loss", "perturb", "heun", "multistep", "restore", "divide"])
def test_a_symbolic_batch_can_be_exported(name, expected):
    functions = FUNCTIONS | {
        "perturb": lambda x, noise, key: process.perturb(x, noise, 0.5, 0.3),
        "divide": lambda x, noise, key: DENOISE(x, 0.7, 0.5).clean,
    }
    (batch,) = jax.export.symbolic_shape("b")
    like = jax.ShapeDtypeStruct((batch, *SHAPE), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    exported = jax.export.export(jax.jit(functions[name]))(like, like, key)
    check(exported.call(*arguments()), jax.jit(functions[name])(*arguments()))


@pytest.mark.parametrize(
    "name", ["loss", "blur", "heun", "multistep", "churn", "restore", "estimate_levels"]
)
def test_shard_map_changes_nothing(name, expected):
    # One device: what counts is that the program is one that varies over the axis.
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        FUNCTIONS[name], mesh=mesh, in_specs=(split, split, everywhere), out_specs=split
    )
    check(jax.jit(mapped)(*arguments()), expected(name))
