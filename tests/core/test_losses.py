"""Score matching against exact targets, posterior variances and finite differences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

from tests.core.closed_forms import (
    GaussianData,
    blur,
    dct,
    gaussian_data,
    idct,
    natural_spectrum,
    transfer,
)
from warm_diffusion import oracle, schedules
from warm_diffusion.dct import blur as jax_blur
from warm_diffusion.denoiser import Prediction, precondition
from warm_diffusion.losses import score_matching_loss

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
DATA = gaussian_data(*SIZE)
PATH = schedules.constant_bnr(0.5)
KEY = jax.random.key(0)


def images(count, seed=0):
    return DATA.draw(np.random.default_rng(seed), count)


def at(beta, bnr=0.5):
    """A training distribution of one level."""
    return lambda key, shape: (jnp.full(shape, bnr * beta), jnp.full(shape, beta))


def knows(x0, blurry_error=0.0, residual_error=0.0):
    """A denoiser that knows the clean images, up to given errors [H, W, C] of its heads."""

    def denoise(x, alpha, beta):
        blurry = jax_blur(x0, alpha)
        return Prediction(blurry + blurry_error, x0 - blurry + residual_error)

    return denoise


@jax.jit
def losses_that_know(x0, blurry_error=0.0, residual_error=0.0, t=None, **options):
    """Losses of such a denoiser, at random times or at the one time t."""
    denoise = knows(x0, blurry_error, residual_error)
    return score_matching_loss(denoise, KEY, x0, PATH if t is None else at(t), **options)


def network(parameters):
    """A small network with one set of parameters per head, as a denoiser."""

    def apply(x, c_noise, c_blur):
        levels = c_noise[:, None, None, None], c_blur[:, None, None, None]
        heads = [
            jnp.tanh(x @ head["mix"] + levels[0] * head["noise"] + levels[1] * head["blur"])
            for head in (parameters["denoiser"], parameters["deblurrer"])
        ]
        return jnp.concatenate(heads, axis=-1)

    return precondition(apply)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        head: {
            "mix": 0.5 * rng.standard_normal((2, 2)),
            "noise": 0.5 * rng.standard_normal((1, 1, 1, 2)),
            "blur": 0.5 * rng.standard_normal((1, 1, 1, 2)),
        }
        for head in ("denoiser", "deblurrer")
    }


def losses_of(weights, x0, key=KEY, **options):
    return score_matching_loss(network(weights), key, x0, PATH, **options)


jitted_losses = jax.jit(losses_of)


# --- values --------------------------------------------------------------------------------------


def test_exact_targets_cost_nothing():
    x0 = images(4)
    for term in losses_that_know(x0):
        np.testing.assert_allclose(term, np.zeros(4), atol=1e-25)


@pytest.mark.parametrize("shape", [(7, 2), SIZE, (4, 3, 5, 1)], ids=["1", "2", "3"])
@pytest.mark.parametrize("bnr", [0.5, 2.0])
def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance(bnr, shape):
    # Per frequency var(x0 | x) = S beta^2 / v; D has m^2 and R (1 - m)^2 of it. Means over pixels
    # are means over frequencies, V being orthonormal. beta = 0.6, sigma_data = 0.5.
    data, beta = gaussian_data(*shape), 0.6
    variance = data.posterior_variance(bnr * beta, beta)
    m = transfer(bnr * beta, *shape[:-1])
    expected_denoise = (beta**2 + 0.5**2) / (beta * 0.5) ** 2 * np.mean(m**2 * variance)
    expected_deblur = np.mean((1 - m) ** 2 * variance) / 0.5**2

    exact = oracle.gaussian(data.mean, data.spectrum)
    x0 = data.draw(np.random.default_rng(0), 4000)
    terms = jax.jit(lambda x0: score_matching_loss(exact, KEY, x0, at(beta, bnr)))(x0)
    for losses, expected in (
        (terms.denoise, expected_denoise),
        (terms.deblur, expected_deblur),
        (terms.total, expected_denoise + expected_deblur),
    ):
        assert abs(losses.mean() - expected) < 5 * losses.std() / np.sqrt(losses.size)


@pytest.mark.parametrize(("beta", "sigma_data"), [(0.1, 0.5), (3.0, 0.5), (0.7, 0.2)])
def test_the_denoising_weight_undoes_the_output_scale(beta, sigma_data):
    # Every pixel of D off by 1: w_D = 1 / c_out^2 with EDM's c_out = beta s / sqrt(beta^2 + s^2).
    x0 = images(4)
    c_out = beta * sigma_data / np.sqrt(beta**2 + sigma_data**2)
    terms = losses_that_know(x0, blurry_error=1.0, t=beta, sigma_data=sigma_data)
    np.testing.assert_allclose(terms.denoise, np.full(4, 1 / c_out**2), rtol=1e-12)
    np.testing.assert_allclose(terms.deblur, np.zeros(4), atol=1e-25)


@pytest.mark.parametrize(("weight", "sigma_data"), [(1.0, 0.5), (3.0, 0.5), (1.0, 0.2)])
def test_the_deblurring_weight_is_relative_to_the_variance_of_the_data(weight, sigma_data):
    # Every pixel of R off by 1: w_R = residual_weight / s^2.
    x0 = images(4)
    terms = losses_that_know(x0, residual_error=1.0, sigma_data=sigma_data, residual_weight=weight)
    np.testing.assert_allclose(terms.deblur, np.full(4, weight / sigma_data**2), rtol=1e-12)
    np.testing.assert_allclose(terms.denoise, np.zeros(4), atol=1e-25)


def test_squares_are_averaged_over_pixels_and_channels():
    # One wrong pixel of 6 * 5 * 2, in one channel: 1 / 60 of the weight 1 / 0.5^2.
    x0, error = images(4), np.zeros((1, *SIZE))
    error[0, 2, 3, 1] = 1.0
    terms = losses_that_know(x0, residual_error=error)
    np.testing.assert_allclose(terms.deblur, np.full(4, 4 / 60), rtol=1e-12)


def test_the_residual_weight_scales_the_deblurring_term_only():
    plain, weighted = (
        jitted_losses(parameters(), images(4), residual_weight=w) for w in (1.0, 3.0)
    )
    np.testing.assert_allclose(weighted.deblur, 3 * plain.deblur, rtol=1e-12)
    np.testing.assert_allclose(weighted.denoise, plain.denoise, rtol=1e-12)
    np.testing.assert_allclose(weighted.total, plain.denoise + 3 * plain.deblur, rtol=1e-12)


def test_consistency_is_zero_for_exact_posterior_means():
    exact = oracle.gaussian(DATA.mean, DATA.spectrum)
    terms = jax.jit(lambda x0: score_matching_loss(exact, KEY, x0, PATH))(images(4))
    np.testing.assert_allclose(terms.consistency, np.zeros(4), atol=1e-25)


@pytest.mark.parametrize("head", ["blurry", "residual"])
def test_consistency_measures_how_far_d_is_from_the_blurred_sum(head):
    # |D - B (D + R)|^2 with an error e in one head: (1 - m) e of D, m e of R, per frequency.
    x0, error = images(4), np.random.default_rng(3).standard_normal((1, *SIZE))
    m = transfer(0.5 * 0.8, *SIZE[:2])
    left = idct((1 - m if head == "blurry" else m) * dct(error))
    terms = losses_that_know(x0, **{f"{head}_error": error}, t=0.8)
    np.testing.assert_allclose(terms.consistency, np.full(4, np.mean(left**2)), rtol=1e-10)
    assert np.all(terms.consistency > 0)


# --- levels and noise ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """What the denoiser is given for 4,000 examples: x, alpha, beta and the clean images."""

    @jax.jit
    def inputs(x0):
        seen = []

        def record(*args):
            seen.extend(args)
            return Prediction(args[0], args[0])

        score_matching_loss(record, KEY, x0, PATH)
        return seen

    with jax.enable_x64(True):
        x0 = images(4000)
        return (*(np.asarray(each) for each in inputs(x0)), x0)


def test_levels_lie_on_the_path_and_follow_its_training_distribution(seen):
    # alpha = bnr beta; ln beta ~ N(-1.2, 1.2^2), one draw per example.
    _, alpha, beta, _ = seen
    np.testing.assert_allclose(alpha, 0.5 * beta, rtol=1e-6)  # drawn in float32
    logs = np.log(beta)
    assert abs(logs.mean() + 1.2) < 5 * 1.2 / np.sqrt(4000)
    assert abs(logs.std() / 1.2 - 1) < 5 / np.sqrt(2 * 4000)


def test_over_a_range_of_ratios_every_example_has_its_own():
    # ln bnr uniform over the range, a share of exactly 0 (method section 4), apart from the noise.
    @jax.jit
    def levels(x0):
        seen = []

        def record(x, alpha, beta):
            seen.extend((alpha, beta))
            return Prediction(x, x)

        score_matching_loss(record, KEY, x0, schedules.any_bnr(0.5, (0.2, 5.0), hot_share=0.25))
        return seen

    alpha, beta = (np.asarray(level) for level in levels(images(4000)))
    ratios = alpha / beta
    assert abs(np.mean(ratios == 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    share = np.log(ratios[ratios > 0] / 0.2) / np.log(25.0)
    assert len(np.unique(share)) == share.size
    assert scipy.stats.kstest(share, "uniform").pvalue > 1e-4
    assert scipy.stats.kstest(np.log(beta), scipy.stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


def test_the_denoiser_sees_the_blurred_image_with_noise_of_its_level(seen):
    # (x - B x0) / beta is standard normal: mean 0, variance 1, each within 5 standard errors.
    x, alpha, beta, x0 = seen
    noise = (x - blur(x0, alpha)) / beta[:, None, None, None]
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)


def test_the_noise_is_drawn_apart_from_the_levels(seen):
    # From one key both would hold the same numbers, element by element.
    x, alpha, beta, x0 = seen
    noise = (x - blur(x0, alpha)) / beta[:, None, None, None]
    level = (np.log(beta) + 1.2) / 1.2
    assert abs(np.corrcoef(level, noise.ravel()[:4000])[0, 1]) < 5 / np.sqrt(4000)


# --- examples and gradients ----------------------------------------------------------------------


def test_an_example_changes_its_own_loss_only():
    x0 = images(4)
    changed = x0.copy()
    changed[1] += 0.3
    for before, after in zip(
        jitted_losses(parameters(), x0), jitted_losses(parameters(), changed), strict=True
    ):
        np.testing.assert_array_equal(before != after, [False, True, False, False])


def test_gradients_equal_finite_differences():
    losses = jax.jit(lambda p: jnp.mean(losses_of(p, images(4)).total))
    check_grads(losses, (parameters(),), 1, ["rev"])


@jax.jit
def gradients(weights, residual_weight):
    """Of each term's mean, with respect to the parameters."""
    return jax.jacrev(
        lambda p: jax.tree.map(jnp.mean, losses_of(p, images(4), residual_weight=residual_weight))
    )(weights)


@pytest.mark.parametrize(
    ("term", "residual_weight", "own", "other"),
    [
        ("denoise", 1.0, "denoiser", "deblurrer"),
        ("deblur", 1.0, "deblurrer", "denoiser"),
        ("total", 0.0, "denoiser", "deblurrer"),
    ],
)
def test_the_gradient_of_a_term_touches_its_own_head_only(term, residual_weight, own, other):
    gradient = getattr(gradients(parameters(), residual_weight), term)
    assert all(np.all(part != 0) for part in jax.tree.leaves(gradient[own]))
    assert all(np.all(part == 0) for part in jax.tree.leaves(gradient[other]))


def test_the_exact_denoiser_is_a_minimum():
    # The mean gradient with respect to a gain of each head vanishes at gain 1, within 5 standard
    # errors: least squares is solved by the posterior mean. A mean of zero keeps the gains apart.
    data = GaussianData(np.zeros(SIZE), natural_spectrum(*SIZE))
    x0, exact = data.draw(np.random.default_rng(0), 4000), oracle.gaussian(data.mean, data.spectrum)

    def losses(gains):
        def denoise(*inputs):
            return Prediction(*(g * part for g, part in zip(gains, exact(*inputs), strict=True)))

        return score_matching_loss(denoise, KEY, x0, at(0.6)).total

    for gradient in jax.jit(jax.jacfwd(losses))((1.0, 1.0)):
        assert abs(gradient.mean()) < 5 * gradient.std() / np.sqrt(gradient.size)


# --- transformations -----------------------------------------------------------------------------


def test_the_loss_is_the_same_under_jit():
    x0 = images(4)
    for plain, compiled in zip(
        losses_of(parameters(), x0), jitted_losses(parameters(), x0), strict=True
    ):
        np.testing.assert_allclose(compiled, plain, rtol=1e-11)


def test_the_loss_works_under_vmap_over_keys():
    x0, keys = images(4), jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(lambda key: losses_of(parameters(), x0, key).total))(keys)
    alone = [jitted_losses(parameters(), x0, key).total for key in keys]
    np.testing.assert_allclose(together, alone, rtol=1e-11)


PMAP_SCRIPT = """
import json, jax, jax.numpy as jnp
from tests.core.test_losses import KEY, images, losses_of, parameters
jax.config.update("jax_enable_x64", True)
x0, keys = images(4).reshape(2, 2, 6, 5, 2), jax.random.split(KEY, 2)
def step(weights, key, x0):
    gradient = jax.grad(lambda p: jnp.mean(losses_of(p, x0, key).total))(weights)
    return jax.lax.pmean(gradient, "devices")
gradient = jax.pmap(step, "devices", in_axes=(None, 0, 0))(parameters(), keys, x0)
print(json.dumps([part.tolist() for part in jax.tree.leaves(gradient)]))
"""


def test_gradients_averaged_by_pmap_over_two_devices_are_those_of_the_whole_batch():
    # In a process of its own: the number of CPU devices is fixed when JAX starts.
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    run = subprocess.run(
        [sys.executable, "-c", PMAP_SCRIPT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    keys, halves = jax.random.split(KEY, 2), images(4).reshape(2, 2, *SIZE)

    def whole(weights):
        terms = [losses_of(weights, halves[i], keys[i]).total for i in range(2)]
        return jnp.mean(jnp.concatenate(terms))

    expected = jax.tree.leaves(jax.jit(jax.grad(whole))(parameters()))
    for both, part in zip(json.loads(run.stdout), expected, strict=True):
        for device in both:
            np.testing.assert_allclose(device, part, rtol=1e-10, atol=1e-12)


# --- weights, sigma_data, training distributions -------------------------------------------------


def test_the_residual_weight_may_be_a_function_of_blur_and_state():
    seen = []

    def weight(alpha, x):
        seen.append((alpha, x))
        return 1 + alpha

    x0 = images(4)
    plain, weighted = (
        score_matching_loss(network(parameters()), KEY, x0, PATH, residual_weight=w)
        for w in (1.0, weight)
    )
    ((alpha, x),) = seen
    assert x.shape == x0.shape
    np.testing.assert_allclose(weighted.deblur, (1 + alpha) * plain.deblur, rtol=1e-12)
    np.testing.assert_allclose(weighted.denoise, plain.denoise, rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_denoiser_carries_sigma_data_to_the_loss(wrap):
    def apply(x, c_noise, c_blur):
        return jnp.concatenate([x, x], axis=-1)

    carried = wrap(precondition(apply, sigma_data=0.2))
    bare = lambda *arguments: carried(*arguments)  # noqa: E731, a wrapper that carries nothing
    expected = score_matching_loss(bare, KEY, images(2), PATH, sigma_data=0.2).total
    found = score_matching_loss(carried, KEY, images(2), PATH).total
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"sigma_data must be that of the denoiser, 0.2, got 0.5"):
        score_matching_loss(carried, KEY, images(2), PATH, sigma_data=0.5)


def test_the_training_distribution_is_an_argument_of_its_own():
    # Of any function; the path's own is its sample_levels.
    for own, other in zip(
        losses_of(parameters(), images(4)),
        score_matching_loss(network(parameters()), KEY, images(4), PATH.sample_levels),
        strict=True,
    ):
        np.testing.assert_array_equal(own, other)


def test_one_compiled_loss_serves_all_ratios():
    compilations = []

    @jax.jit
    def run(x0, path):
        compilations.append(path)
        return score_matching_loss(network(parameters()), KEY, x0, path).total

    for bnr in np.linspace(0.0, 2.0, 8):
        path = schedules.constant_bnr(float(bnr))
        expected = score_matching_loss(network(parameters()), KEY, images(4), path).total
        np.testing.assert_allclose(run(images(4), path), expected, rtol=1e-6)
    assert len(compilations) == run._cache_size() == 1


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": np.zeros((6, 5))}, r"x0 must be \[B, \*spatial, C\], got \(6, 5\)"),
        ({"x0": [np.zeros(SIZE)]}, "x0 must be one array .* a list: numpy.stack joins"),
        ({"x0": np.zeros((3, *SIZE), np.uint8)}, r"floats, got uint8: .* x / 127.5 - 1"),
        ({"x0": np.full((3, *SIZE), 255.0)}, r"values up to 255, .*sigma_data = 0.5: .*127.5 - 1"),
        ({"x0": np.full((3, *SIZE), -128.0)}, "values up to 128"),
        ({"key": 0}, r"key must be a JAX PRNG key, such as jax.random.key\(0\), got 0"),
        ({"key": np.array(3)}, "key must be a JAX PRNG key"),
        ({"schedule": 0.5}, r"a path, such as schedules.constant_bnr\(0.5\), got 0.5"),
        ({"schedule": schedules.constant_bnr}, "got constant_bnr: call it"),
        ({"denoise": lambda x, *_: jnp.concatenate([x, x], -1)}, "wrap the network: denoiser.prec"),
        ({"denoise": lambda x, *_: (x, x)}, "Prediction, got tuple"),
    ],
)
def test_mistakes_are_refused(options, message):
    usual = {"denoise": knows(images(3)), "key": KEY, "x0": images(3), "schedule": PATH}
    with pytest.raises(ValueError, match=message):
        score_matching_loss(**usual | options)


def test_the_range_hint_scales_with_sigma_data():
    latents = 12 * np.sign(images(3))
    score_matching_loss(knows(latents), KEY, latents, PATH, sigma_data=6.0)
    with pytest.raises(ValueError, match="the standard deviation of the data, sigma_data="):
        score_matching_loss(knows(latents), KEY, latents, PATH)
