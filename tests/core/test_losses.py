"""Score matching against exact targets, posterior variances and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@pytest.mark.parametrize(
    ("shape", "bnr"), [((7, 2), 2.0), (SIZE, 0.5), ((4, 3, 5, 1), 2.0)], ids=["1", "2", "3"]
)
def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance(shape, bnr):
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


@pytest.mark.parametrize(("beta", "sigma_data"), [(3.0, 0.5), (0.7, 0.2)])
def test_the_denoising_weight_undoes_the_output_scale(beta, sigma_data):
    # Every pixel of D off by 1: w_D = 1 / c_out^2 with EDM's c_out = beta s / sqrt(beta^2 + s^2).
    x0 = images(4)
    c_out = beta * sigma_data / np.sqrt(beta**2 + sigma_data**2)
    terms = losses_that_know(x0, blurry_error=1.0, t=beta, sigma_data=sigma_data)
    np.testing.assert_allclose(terms.denoise, np.full(4, 1 / c_out**2), rtol=1e-12)
    np.testing.assert_allclose(terms.deblur, np.zeros(4), atol=1e-25)


@pytest.mark.parametrize(("weight", "sigma_data"), [(3.0, 0.5), (1.0, 0.2)])
def test_the_deblurring_weight_is_relative_to_the_variance_of_the_data(weight, sigma_data):
    # Every pixel of R off by 1: w_R = residual_weight / s^2.
    x0 = images(4)
    terms = losses_that_know(x0, residual_error=1.0, sigma_data=sigma_data, residual_weight=weight)
    np.testing.assert_allclose(terms.deblur, np.full(4, weight / sigma_data**2), rtol=1e-12)
    np.testing.assert_allclose(terms.denoise, np.zeros(4), atol=1e-25)


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


def test_the_denoiser_sees_blurred_images_with_noise_at_levels_of_the_path():
    # alpha = bnr beta; ln beta ~ N(-1.2, 1.2^2), one draw per example; (x - B x0) / beta is
    # standard normal, and drawn apart from the levels: each within 5 standard errors.
    @jax.jit
    def seen(x0):
        inputs = []

        def record(*args):
            inputs.extend(args)
            return Prediction(args[0], args[0])

        score_matching_loss(record, KEY, x0, PATH)
        return inputs

    x0 = images(4000)
    x, alpha, beta = map(np.asarray, seen(x0))
    np.testing.assert_allclose(alpha, 0.5 * beta, rtol=1e-6)  # drawn in float32
    logs = (np.log(beta) + 1.2) / 1.2
    noise = (x - blur(x0, alpha)) / beta[:, None, None, None]
    for normal in (logs, noise):
        assert abs(normal.mean()) < 5 / np.sqrt(normal.size)
        assert abs(normal.var() - 1) < 5 * np.sqrt(2 / normal.size)
    # From one key both would hold the same numbers, element by element.
    assert abs(np.corrcoef(logs, noise.ravel()[:4000])[0, 1]) < 5 / np.sqrt(4000)


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
    """The gradient of each term's mean with respect to the parameters."""
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


def test_the_residual_weight_may_be_a_function_of_blur_and_state():
    @jax.jit
    def run(x0):
        seen = []

        def weight(alpha, x):
            seen.append((alpha, x))
            return 1 + alpha

        return (
            losses_of(parameters(), x0),
            losses_of(parameters(), x0, residual_weight=weight),
            seen,
        )

    plain, weighted, ((alpha, x),) = run(images(4))
    assert x.shape == (4, *SIZE)
    np.testing.assert_allclose(weighted.deblur, (1 + alpha) * plain.deblur, rtol=1e-12)
    np.testing.assert_allclose(weighted.denoise, plain.denoise, rtol=1e-12)
    np.testing.assert_allclose(weighted.total, weighted.denoise + weighted.deblur, rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_the_denoiser_carries_sigma_data_to_the_loss(wrap):
    carried = wrap(precondition(lambda x, *_: jnp.concatenate([x, x], axis=-1), sigma_data=0.2))
    bare = lambda *arguments: carried(*arguments)  # noqa: E731, a wrapper that carries nothing
    found, expected = jax.jit(
        lambda x0: (
            score_matching_loss(carried, KEY, x0, PATH).total,
            score_matching_loss(bare, KEY, x0, PATH, sigma_data=0.2).total,
        )
    )(images(2))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_one_compiled_loss_serves_all_ratios_and_maps_over_keys():
    compilations = []

    @jax.jit
    def run(keys, path):
        compilations.append(path)
        return jax.vmap(
            lambda key: score_matching_loss(network(parameters()), key, images(4), path).total
        )(keys)

    keys = jax.random.split(KEY, 2)
    for bnr in (0.0, 0.5, 2.0):
        found = run(keys, schedules.constant_bnr(bnr))
        if bnr == 0.5:
            expected = [jitted_losses(parameters(), images(4), key).total for key in keys]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(compilations) == run._cache_size() == 1
