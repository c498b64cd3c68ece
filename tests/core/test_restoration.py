"""Restoring images whose posterior is known: Gaussian data, and a few images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import blur, dct, gaussian_data, solve, within_standard_errors
from warm_diffusion import oracle, restoration
from warm_diffusion.denoiser import Prediction
from warm_diffusion.samplers import SOLVERS

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
DATA = gaussian_data(*SIZE)
EXACT = oracle.gaussian(DATA.mean, DATA.spectrum)
ALPHA = np.array([0.0, 0.6, 1.5, 1.0])  # without blur; with little noise; and between
BETA = np.array([0.3, 0.1, 0.4, 0.005])
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def observed(seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((len(BETA), *SIZE))
    return blur(DATA.draw(rng, len(BETA)), ALPHA) + BETA[:, None, None, None] * noise


IMAGES = observed()


@functools.cache
def restorer(denoise=EXACT, **options):
    """`restore` with everything but arrays fixed."""
    return jax.jit(
        lambda y, alpha, beta, key=None: restoration.restore(
            denoise, y, alpha, beta, key=key, **options
        )
    )


def to_clean():
    """The flow's end from each image's own levels, method section 7."""
    return DATA.flow(IMAGES, (ALPHA, BETA), (np.zeros(4), np.zeros(4)))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_on_gaussian_data_the_flow_ends_where_the_closed_form_says(solver, order):
    # The last step, from 2 % of the levels, is no step of the flow: its error, far below the
    # noise, stays. What is above it falls with the order of the solver.
    coarse, fine = (
        np.sqrt(
            np.mean((restorer(solver=solver, num_steps=n)(IMAGES, ALPHA, BETA) - to_clean()) ** 2)
        )
        for n in (8, 32)
    )
    assert fine < (0.02 if order == 1 else 0.004)
    assert coarse < (0.08 if order == 1 else 0.03)


@each_solver
def test_solvers_follow_their_formulas_from_the_images_own_levels(solver):
    # Independent numpy steps of method section 3, one image at a time.
    def heads(x, alpha, beta):
        return [np.asarray(part) for part in toy(jnp.asarray(x), alpha, beta)]

    found = restorer(toy, solver=solver, num_steps=5)(IMAGES, ALPHA, BETA)
    root = 0.02 ** (1 / 7)
    tau = np.append((1 + np.arange(5) / 4 * (root - 1)) ** 7, 0.0)
    for image, alpha, beta, end in zip(IMAGES, ALPHA, BETA, found, strict=True):
        levels = list(zip(alpha * tau, beta * tau, strict=True))
        np.testing.assert_allclose(end, solve(solver, heads, image[None], levels)[0], atol=1e-10)


def toy(x, alpha, beta):
    """A denoiser that is not linear and whose heads are not consistent."""
    alpha, beta = (jnp.reshape(jnp.asarray(level), (-1, 1, 1, 1)) for level in (alpha, beta))
    blurry = (jnp.tanh(x) + 0.2 * jnp.roll(x, 1, 2)) / (1 + beta)
    return Prediction(blurry, 0.3 * jnp.cos(x + beta) * (alpha + 0.1) / (1 + alpha))


def test_one_call_is_the_posterior_mean():
    blurry, residual = DATA.posterior_means(IMAGES, ALPHA, BETA)
    one = restorer(num_steps=1)(IMAGES, ALPHA, BETA)
    np.testing.assert_allclose(one, blurry + residual, atol=1e-6)


@each_solver
def test_samples_have_the_posteriors_mean_and_variance(solver):
    # 400 chains from one image; the variance misses what the finite steps miss, so many steps.
    count, alpha, beta = 400, 0.6, 0.3
    y = np.repeat(IMAGES[1:2], count, axis=0)
    run = restorer(solver=solver, num_steps=64, stochastic=1.0)
    ends = dct(run(y, alpha, beta, jax.random.key(0)))
    blurry, residual = DATA.posterior_means(IMAGES[1:2], alpha, beta)
    expected = DATA.posterior_variance(alpha, beta)
    within_standard_errors(ends, mean=dct(blurry + residual)[0])
    np.testing.assert_allclose(np.var(ends, axis=0).mean() / expected.mean(), 1.0, atol=0.12)


def test_few_multistep_samples_have_the_posteriors_variance():
    # 9 steps; with euler's they have about half of it, extrapolated too far three times as much.
    y = np.repeat(IMAGES[:1], 400, axis=0)
    ends = dct(restorer(stochastic=1.0)(y, 0.0, 0.3, jax.random.key(0)))
    expected = DATA.posterior_variance(0.0, 0.3)
    np.testing.assert_allclose(np.var(ends, axis=0).mean() / expected.mean(), 1.0, atol=0.12)


def test_little_randomness_is_between_the_flow_and_samples():
    y = np.repeat(IMAGES[2:3], 64, axis=0)
    spread = [
        float(np.std(restorer(stochastic=s)(y, 1.5, 0.4, jax.random.key(0)), axis=0).mean())
        for s in (0.0, 0.2, 1.0)
    ]
    assert spread[0] < 1e-9
    assert 0.01 < spread[1] < spread[2]


@each_solver
def test_a_few_images_are_found_again(solver):
    images = np.random.default_rng(3).uniform(-1, 1, (4, *SIZE))
    beta = np.array([0.1, 0.05, 0.1, 0.005])
    y = blur(images, ALPHA) + beta[:, None, None, None] * np.random.default_rng(4).standard_normal(
        images.shape
    )
    found = restorer(oracle.mixture(images), solver=solver)(y, ALPHA, beta)
    np.testing.assert_allclose(found, images, atol=1e-3)


def test_each_image_is_restored_by_itself_whatever_the_batch():
    keys = jax.random.split(jax.random.key(0), 4)
    run = restorer(stochastic=0.7)
    together = run(IMAGES, ALPHA, BETA, keys)
    for i in range(4):
        part = slice(i, i + 1)
        alone = run(IMAGES[part], ALPHA[part], BETA[part], keys[part])
        np.testing.assert_allclose(together[part], alone, atol=1e-9)


def test_restoring_can_be_mapped_and_differentiated():
    run = restorer(num_steps=3)
    stacked = jax.vmap(run)(IMAGES[:, None], ALPHA, BETA)[:, 0]
    np.testing.assert_allclose(stacked, run(IMAGES, ALPHA, BETA), atol=1e-9)
    total = jax.jit(lambda y, alpha, beta: jnp.sum(run(y, alpha, beta) ** 2))
    slope = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(IMAGES, ALPHA, BETA)
    for i, argument in enumerate((IMAGES, ALPHA + 0.1, BETA)):
        direction = (
            np.random.default_rng(5).standard_normal(argument.shape) * np.abs(argument) * 1e-3
        )
        ends = [IMAGES, ALPHA, BETA]
        values = []
        for sign in (1, -1):
            ends[i] = (IMAGES, ALPHA, BETA)[i] + sign * direction
            values.append(total(*ends))
        expected = (values[0] - values[1]) / 2
        np.testing.assert_allclose(np.vdot(slope[i], direction), expected, rtol=2e-3)


def test_wiener_is_the_gaussian_posterior_mean():
    blurry, residual = DATA.posterior_means(IMAGES, ALPHA, BETA)
    found = restoration.wiener(IMAGES, DATA.spectrum, ALPHA, BETA, DATA.mean)
    np.testing.assert_allclose(found, blurry + residual, atol=1e-9)


def test_wiener_without_a_mean_keeps_each_images_colour():
    spectrum = DATA.spectrum[:, :, 0]
    found = restoration.wiener(IMAGES, spectrum, ALPHA, BETA)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), IMAGES.mean(axis=(1, 2)), atol=1e-9)
    shifted = restoration.wiener(IMAGES + 0.5, spectrum, ALPHA, BETA)
    np.testing.assert_allclose(shifted, found + 0.5, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[0, 0]}, r"images must be \[B, \*spatial, C\], got \(5, 2\)"),
        ({"alpha": np.ones(3)}, r"must be a scalar or shape \(4,\), got \(3,\)"),
        ({"beta": np.array([0.1, 0.0, 0.1, 0.1])}, r"beta must be finite and > 0, got 0; 8 bits"),
        ({"alpha": -1.0}, r"alpha must be finite and >= 0, got -1"),
        ({"beta": np.nan}, r"beta must be finite and > 0, got nan"),
        ({"solver": "midpoint"}, "solver must be one of euler, heun, multistep, got 'midpoint'"),
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"stochastic": 1.5}, r"stochastic must lie between 0 .* and 1 .*, got 1.5"),
        ({"stochastic": 0.5}, "pass key="),
        ({"denoise": lambda x, alpha, beta: x}, "must return a denoiser.Prediction"),
    ],
)
def test_mistakes_are_told(change, message):
    given = {"denoise": EXACT, "images": IMAGES, "alpha": ALPHA, "beta": BETA} | change
    with pytest.raises(ValueError, match=message):
        restoration.restore(**given)
