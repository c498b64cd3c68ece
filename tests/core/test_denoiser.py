"""Preconditioning against EDM's formulas typed anew, and the three parameterizations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.core.closed_forms import (
    blur,
    dct,
    eigenvalues,
    transfer,
    within_standard_errors,
)
from warm_diffusion.denoiser import (
    PARAMETERIZATIONS,
    Prediction,
    _removed_share,
    precondition,
)

pytestmark = pytest.mark.usefixtures("x64")

SIZE = (6, 5, 2)
SIGMA = 0.5
share = jax.jit(_removed_share, static_argnums=(1, 2))
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


# --- EDM -----------------------------------------------------------------------------------------


@each_parameterization
def test_without_blur_the_denoiser_is_edms(parameterization):
    x, beta = normal(3), np.array([0.01, 0.6, 40.0])
    denoise = denoiser(parameterization, sigma_data=SIGMA)
    np.testing.assert_allclose(denoise(x, 0.0, beta).blurry, edm(x, beta), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("parameterization", ["clean", "score"])
def test_without_blur_one_head_leaves_no_residual(parameterization):
    denoise = denoiser(parameterization)
    np.testing.assert_allclose(denoise(normal(2), 0.0, 0.6).residual, 0.0, atol=1e-13)


def test_defaults_are_two_heads_and_edms_sigma_data():
    x, beta = normal(2), np.array([0.3, 2.0])
    prediction = jax.jit(precondition(network("divide")))(x, 0.0, beta)
    np.testing.assert_allclose(prediction.blurry, edm(x, beta), rtol=1e-12, atol=1e-13)


@functools.partial(jax.jit, static_argnames="sigma_data")
def network_inputs(x, alpha, beta, *, sigma_data):
    """What the network is given."""
    seen = []

    def record(*inputs):
        seen.extend(inputs)
        return jnp.concatenate([inputs[0], inputs[0]], axis=-1)

    precondition(record, sigma_data=sigma_data)(x, alpha, beta)
    return seen


@pytest.mark.parametrize("beta", [0.02, 0.5, 30.0])
def test_the_network_sees_unit_variance(beta):
    # c_in of data ~ N(0, sigma_data^2) with noise of level beta: variance 1.
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((3000, *SIZE)) + beta * rng.standard_normal((3000, *SIZE))
    scaled, *_ = network_inputs(x, 0.0, beta, sigma_data=0.3)
    within_standard_errors(np.asarray(scaled), np.zeros(SIZE), np.ones(SIZE))


def test_the_network_is_conditioned_on_both_levels():
    # Method section 2: c_in x, ln(beta) / 4 and log1p(alpha) / 4, one number per image.
    x, alpha, beta = normal(3), np.array([0.0, 1.0, 20.0]), np.array([0.002, 1.0, 80.0])
    scaled, c_noise, c_blur = network_inputs(x, alpha, beta, sigma_data=SIGMA)
    np.testing.assert_allclose(scaled, x / np.sqrt(column(beta) ** 2 + SIGMA**2), rtol=1e-13)
    np.testing.assert_allclose(c_noise, np.log(beta) / 4, atol=1e-14)
    np.testing.assert_allclose(c_blur, np.log(1 + alpha) / 4, atol=1e-14)


@each_parameterization
def test_a_network_of_zeros_leaves_the_skip(parameterization):
    # c_skip x, EDM's table 1; `clean` predicts the clean image by it and blurs that.
    heads = PARAMETERIZATIONS[parameterization]
    denoise = precondition(
        lambda x, *_: jnp.zeros((*x.shape[:3], heads * x.shape[3])),
        parameterization=parameterization,
    )
    x, alpha, beta = normal(2), 0.8, np.array([0.1, 3.0])
    skip = x * SIGMA**2 / (column(beta) ** 2 + SIGMA**2)
    expected = blur(skip, alpha) if parameterization == "clean" else skip
    np.testing.assert_allclose(jax.jit(denoise)(x, alpha, beta).blurry, expected, atol=1e-13)


# --- parameterizations ---------------------------------------------------------------------------


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
    np.testing.assert_allclose(denoise(x, alpha, beta).clean, expected, atol=1e-13)


def test_clean_has_consistent_heads():
    # D = B (D + R), exactly.
    denoise = denoiser("clean")
    prediction = denoise(normal(2), np.array([0.4, 2.0]), 0.5)
    expected = blur(prediction.clean, np.array([0.4, 2.0]))
    np.testing.assert_allclose(prediction.blurry, expected, atol=1e-13)


def test_score_undoes_the_blur_down_to_the_floor():
    # Eq. (5): D + R = D / max(m, 1e-3) per frequency; alpha = 2 has frequencies on either side.
    alpha = np.array([0.4, 2.0])
    m = transfer(alpha, 6, 5)
    assert m[1].min() < 1e-3 < m[1].max()
    denoise = denoiser("score")
    prediction = denoise(normal(2), alpha, 0.5)
    expected = dct(prediction.blurry) / np.maximum(m, 1e-3)
    np.testing.assert_allclose(dct(prediction.clean), expected, atol=1e-10)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.0), (1e3, 1.0)])
def test_no_blur_removes_nothing_and_endless_blur_everything(alpha, expected):
    np.testing.assert_allclose(share(np.full(2, alpha), 6, 5), np.full(2, expected), atol=1e-14)


def test_more_blur_removes_more():
    assert np.all(np.diff(share(np.geomspace(0.01, 5, 20), 6, 5)) > 0)


def test_clean_is_the_sum_of_both_parts():
    np.testing.assert_array_equal(Prediction(np.full(3, 2.0), np.full(3, 0.5)).clean, 2.5)


# --- shapes and types ----------------------------------------------------------------------------


@each_parameterization
def test_scalar_levels_are_those_levels_for_every_image(parameterization):
    x, denoise = (
        normal(2),
        denoiser(parameterization),
    )
    for part, expected in zip(
        denoise(x, 0.7, 0.3), denoise(x, np.full(2, 0.7), np.full(2, 0.3)), strict=True
    ):
        np.testing.assert_allclose(part, expected, atol=1e-14)


@each_parameterization
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_predictions_of_a_narrow_network_are_float32(parameterization, dtype):
    denoise = precondition(
        lambda *inputs: network(parameterization)(*inputs).astype(dtype),
        parameterization=parameterization,
    )
    with jax.enable_x64(False):
        prediction = jax.jit(denoise)(jnp.asarray(normal(2), jnp.float32), 0.7, 0.3)
    assert prediction.blurry.dtype == prediction.residual.dtype == jnp.float32


@each_parameterization
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_predictions_have_the_type_of_the_data(parameterization, dtype):
    x = jnp.asarray(normal(2), dtype)
    expected = denoiser(parameterization)(x.astype(float), 0.7, 0.3)
    tolerance = {jnp.bfloat16: 2e-2, jnp.float32: 1e-4, jnp.float64: 1e-12}[dtype]
    for part, exact in zip(denoiser(parameterization)(x, 0.7, 0.3), expected, strict=True):
        assert part.dtype == dtype
        np.testing.assert_allclose(part.astype(float), exact, rtol=tolerance, atol=tolerance)


@each_parameterization
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3), (1, 3, 4, 2, 1)])
def test_any_image_shape_is_kept(parameterization, shape):
    denoise = denoiser(parameterization)
    prediction = denoise(np.ones(shape), 0.7, 0.3)
    assert prediction.blurry.shape == prediction.residual.shape == shape
    assert np.all(np.isfinite(prediction.clean))


# --- mistakes ------------------------------------------------------------------------------------


def test_an_unknown_parameterization_is_refused_at_once():
    with pytest.raises(ValueError, match="one of divide, clean, score, got 'x'"):
        precondition(network("divide"), parameterization="x")


@pytest.mark.parametrize(
    ("parameterization", "channels", "expected"),
    [("divide", 2, 4), ("clean", 4, 2), ("score", 1, 2)],
)
def test_a_network_with_the_wrong_number_of_channels_is_refused(
    parameterization, channels, expected
):
    denoise = precondition(
        lambda x, *_: jnp.zeros((*x.shape[:3], channels)), parameterization=parameterization
    )
    message = rf"must return \(3, 6, 5, {expected}\) .*got \(3, 6, 5, {channels}\)"
    with pytest.raises(ValueError, match=message):
        denoise(normal(3), 0.5, 0.5)


def test_three_axes_that_are_no_signals_are_told_the_ways_out():
    with pytest.raises(ValueError, match=r"grey images .* x\[..., None\], one image .* x\[None\]"):
        precondition(lambda x, *_: jnp.zeros((2, 6, 5, 2)))(np.zeros((2, 6, 5)), 0.5, 0.5)


def test_a_network_that_returns_state_is_told_how_it_is_carried():
    with pytest.raises(ValueError, match=r"one array \(3, 6, 5, 4\), got a tuple: .* has_aux=True"):
        precondition(lambda x, *_: (x, {"mean": 0.0}))(normal(3), 0.5, 0.5)


@pytest.mark.parametrize("levels", [(np.ones(3), 0.5), (0.5, np.ones(3))])
def test_levels_that_are_not_one_per_image_are_refused(levels):
    with pytest.raises(ValueError, match=r"a scalar or shape \(2,\), got \(3,\)"):
        precondition(network("divide"))(normal(2), *levels)
