"""Preconditioning against EDM's formulas typed anew, and the three parameterizations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import blur, dct, eigenvalues, transfer
from warm_diffusion.denoiser import PARAMETERIZATIONS, precondition

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
SIGMA = 0.5
each_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)


def normal(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *SIZE))


def column(level, ndim=4):
    """[B] to [B, 1, ..., 1]."""
    return level.reshape(-1, *(1,) * (ndim - 1))


def first_head(x, c_noise, c_blur):
    """A network that is not linear and mixes pixels, channels and both levels."""
    return jnp.tanh(1.3 * x + jnp.roll(x, 1, -2) * c_noise + 0.4) + x[..., ::-1] * (c_blur + 0.2)


def second_head(x, c_noise, c_blur):
    return jnp.cos(2 * x - c_noise) + jnp.roll(x, 1, 1) * (0.3 - c_blur)


def network(parameterization):
    """The heads that a parameterization wants, as one network."""

    def apply(x, c_noise, c_blur):
        levels = column(c_noise, x.ndim), column(c_blur, x.ndim)
        heads = (first_head, second_head)[: PARAMETERIZATIONS[parameterization]]
        return jnp.concatenate([head(x, *levels) for head in heads], axis=-1)

    return apply


@functools.cache
def denoiser(parameterization, **options):
    """The network above as a denoiser, compiled once per shape: the suite stays fast."""
    wrapped = precondition(network(parameterization), parameterization=parameterization, **options)
    return jax.jit(wrapped)


def edm(x, sigma, c_blur=0.0):
    """EDM's denoiser of `first_head`: arXiv 2206.00364, eq. (7) and table 1, sigma [B]."""
    sigma = column(sigma)
    c_skip = SIGMA**2 / (sigma**2 + SIGMA**2)
    c_out = sigma * SIGMA / np.sqrt(SIGMA**2 + sigma**2)
    c_in = 1 / np.sqrt(SIGMA**2 + sigma**2)
    c_noise = 1 / 4 * np.log(sigma)
    return c_skip * x + c_out * first_head(c_in * x, c_noise, c_blur)


@each_parameterization
def test_without_blur_the_denoiser_is_edms(parameterization):
    x, beta = normal(3), np.array([0.01, 0.6, 40.0])
    denoise = denoiser(parameterization, sigma_data=SIGMA)
    np.testing.assert_allclose(denoise(x, 0.0, beta).blurry, edm(x, beta), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("parameterization", ["clean", "score"])
def test_without_blur_one_head_leaves_no_residual(parameterization):
    denoise = denoiser(parameterization)
    np.testing.assert_allclose(denoise(normal(2), 0.0, 0.6).residual, 0.0, atol=1e-13)


def test_the_network_sees_scaled_data_and_both_levels():
    # Method section 2: c_in x, ln(beta) / 4 and log1p(alpha) / 4, one number per image.
    @jax.jit
    def inputs(*given):
        seen = []

        def record(*inputs):
            seen.extend(inputs)
            return jnp.concatenate([inputs[0], inputs[0]], axis=-1)

        precondition(record, sigma_data=0.3)(*given)
        return seen

    x, alpha, beta = normal(3), np.array([0.0, 1.0, 20.0]), np.array([0.002, 1.0, 80.0])
    scaled, c_noise, c_blur = inputs(x, alpha, beta)
    np.testing.assert_allclose(scaled, x / np.sqrt(column(beta) ** 2 + 0.3**2), rtol=1e-13)
    np.testing.assert_allclose(c_noise, np.log(beta) / 4, atol=1e-14)
    np.testing.assert_allclose(c_blur, np.log(1 + alpha) / 4, atol=1e-14)


def test_divide_takes_the_denoiser_from_the_first_channels_and_the_residual_from_the_last():
    x, alpha, beta = normal(2), np.array([0.4, 2.0]), np.array([0.3, 1.0])
    prediction = denoiser("divide", sigma_data=SIGMA)(x, alpha, beta)
    c_blur = column(np.log1p(alpha) / 4)
    np.testing.assert_allclose(prediction.blurry, edm(x, beta, c_blur), atol=1e-13)
    inputs = x / np.sqrt(column(beta) ** 2 + SIGMA**2), column(np.log(beta) / 4), c_blur
    # R = sigma_data F_R: no skip.
    np.testing.assert_allclose(prediction.residual, SIGMA * second_head(*inputs), atol=1e-13)


def test_clean_predicts_the_clean_image():
    # Eq. (4): x0_hat = c_skip x + c F, c^2 = c_out^2 + sigma_data^2 rho(alpha), typed anew.
    x, alpha, beta = normal(2), np.array([0.4, 2.0]), np.array([0.3, 1.0])
    eigen, m = eigenvalues(6, 5).ravel()[1:], transfer(alpha, 6, 5).reshape(2, 30)[:, 1:]
    rho = np.sum((1 - m) ** 2 / eigen, axis=1) / np.sum(1 / eigen)
    c = np.sqrt((beta * SIGMA) ** 2 / (beta**2 + SIGMA**2) + SIGMA**2 * rho)
    inputs = x / np.sqrt(column(beta) ** 2 + SIGMA**2), np.log(beta) / 4, np.log1p(alpha) / 4
    raw = network("clean")(*inputs)
    expected = x * SIGMA**2 / (column(beta) ** 2 + SIGMA**2) + column(c) * raw
    denoise = denoiser("clean", sigma_data=SIGMA)
    prediction = denoise(x, alpha, beta)
    np.testing.assert_allclose(prediction.clean, expected, atol=1e-13)
    np.testing.assert_allclose(prediction.blurry, blur(expected, alpha), atol=1e-13)


def test_score_undoes_the_blur_down_to_the_floor():
    # Eq. (5): D + R = D / max(m, 1e-3) per frequency; alpha = 2 has frequencies on either side.
    alpha = np.array([0.4, 2.0])
    m = transfer(alpha, 6, 5)
    assert m[1].min() < 1e-3 < m[1].max()
    denoise = denoiser("score")
    prediction = denoise(normal(2), alpha, 0.5)
    expected = dct(prediction.blurry) / np.maximum(m, 1e-3)
    np.testing.assert_allclose(dct(prediction.clean), expected, atol=1e-10)


@each_parameterization
def test_scalar_levels_are_those_levels_for_every_image(parameterization):
    x, denoise = normal(2), denoiser(parameterization)
    expected = denoise(x, np.full(2, 0.7), np.full(2, 0.3))
    np.testing.assert_allclose(denoise(x, 0.7, 0.3), expected, atol=1e-14)


@each_parameterization
def test_predictions_of_a_narrow_network_are_float32(parameterization):
    denoise = precondition(
        lambda *inputs: network(parameterization)(*inputs).astype(jnp.bfloat16),
        parameterization=parameterization,
    )
    with jax.enable_x64(False):
        prediction = jax.jit(denoise)(jnp.asarray(normal(2), jnp.float32), 0.7, 0.3)
    assert prediction.blurry.dtype == prediction.residual.dtype == jnp.float32


@pytest.mark.parametrize(
    ("parameterization", "shape"),
    [("divide", (1, 1, 1, 1)), ("clean", (2, 7, 3)), ("score", (1, 3, 4, 2, 1))],
)
def test_any_image_shape_is_kept(parameterization, shape):
    denoise = denoiser(parameterization)
    prediction = denoise(np.ones(shape), 0.7, 0.3)
    assert prediction.blurry.shape == prediction.residual.shape == shape
    assert np.all(np.isfinite(prediction.clean))
