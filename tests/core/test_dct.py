"""The DCT against scipy, the blur against scipy and against what a Gaussian blur must satisfy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from tests.core.closed_forms import dct as scipy_dct
from tests.core.closed_forms import eigenvalues, transfer
from tests.core.closed_forms import idct as scipy_idct
from warm_diffusion import dct

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = [(2, 8, 8, 1), (1, 7, 5, 3), (3, 6, 9, 2), (2, 1, 4, 4), (1, 1, 1, 2)]

# Compiled once per shape: the suite stays fast.
forward, inverse, blur = jax.jit(dct.dct), jax.jit(dct.idct), jax.jit(dct.blur)


def images(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


# --- the transform -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_dct_equals_scipy(shape):
    x = images(shape)
    np.testing.assert_allclose(forward(x), scipy_dct(x), atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_idct_equals_scipy(shape):
    x = images(shape)
    np.testing.assert_allclose(inverse(x), scipy_idct(x), atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_idct_inverts_dct(shape):
    x = images(shape)
    np.testing.assert_allclose(inverse(forward(x)), x, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_dct_keeps_the_energy_of_every_image_and_channel(shape):
    # Parseval.
    x = images(shape)
    energy = np.sum(np.square(forward(x)), axis=(1, 2))
    np.testing.assert_allclose(energy, np.sum(x**2, axis=(1, 2)), rtol=1e-13)


def test_the_basis_is_orthonormal():
    # V V^T = I, V made from the transforms of all 7 * 5 unit images.
    unit = np.eye(35).reshape(35, 7, 5, 1)
    basis = np.asarray(forward(unit)).reshape(35, 35)
    np.testing.assert_allclose(basis @ basis.T, np.eye(35), atol=1e-13)


def test_float32_transform_is_accurate_and_stays_float32():
    x = images((2, 32, 48, 3)).astype(np.float32)
    coefficients = forward(jnp.asarray(x))
    assert coefficients.dtype == jnp.float32
    np.testing.assert_allclose(coefficients, scipy_dct(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.uint8])
def test_narrow_types_are_promoted_to_float32(dtype):
    x = jnp.asarray(100 * images((2, 8, 6, 3)) + 100).astype(dtype)
    coefficients = forward(x)
    assert coefficients.dtype == jnp.float32
    # scipy on the very values that the narrow type holds; they reach 200, so 1e-5 of that.
    np.testing.assert_allclose(coefficients, scipy_dct(x.astype(jnp.float64)), atol=2e-3)


def test_an_image_without_batch_is_transformed_alike():
    x = images((4, 6, 3))
    np.testing.assert_allclose(forward(x), scipy_dct(x), atol=1e-13)


# --- eigenvalues and transfer --------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 7), (7, 4), (1, 3), (5, 5)])
def test_eigenvalues_follow_the_formula(size):
    np.testing.assert_allclose(dct.eigenvalues(*size), eigenvalues(*size), rtol=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.7, np.array([0.0, 0.3, 2.0]), np.full((2, 3), 1.5)])
def test_transfer_follows_the_formula_for_any_shape_of_alpha(alpha):
    factors = jax.jit(dct.transfer, static_argnums=(1, 2))(alpha, 4, 7)
    assert factors.shape == (*np.shape(alpha), 4, 7, 1)
    np.testing.assert_allclose(factors, transfer(alpha, 4, 7), rtol=1e-13)


# --- the blur ------------------------------------------------------------------------------------


def test_blur_zero_is_the_identity():
    x = images((2, 7, 5, 3))
    np.testing.assert_allclose(blur(x, 0.0), x, atol=1e-13)


@pytest.mark.parametrize(("first", "second"), [(0.3, 0.4), (1.0, 2.0), (0.0, 1.3)])
def test_blurs_compose_by_adding_their_squares(first, second):
    # The semigroup of the heat equation: B(a) B(b) = B(sqrt(a^2 + b^2)).
    x = images((2, 7, 5, 3))
    twice = blur(blur(x, first), second)
    np.testing.assert_allclose(twice, blur(x, np.hypot(first, second)), atol=1e-13)


def test_blur_keeps_the_mean_of_every_channel():
    x = images((2, 7, 5, 3))
    np.testing.assert_allclose(
        np.mean(blur(x, 1.7), axis=(1, 2)), np.mean(x, axis=(1, 2)), atol=1e-14
    )


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_blur_contracts(alpha):
    x = images((5, 7, 5, 3))
    x -= x.mean(axis=(1, 2), keepdims=True)  # all but the mean, which is kept
    before, after = np.linalg.norm(x), np.linalg.norm(blur(x, alpha))
    assert after < before


def test_a_long_blur_leaves_the_mean_image():
    x = images((2, 7, 5, 3))
    expected = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    np.testing.assert_allclose(blur(x, 100.0), expected, atol=1e-13)


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (14, 9)])
@pytest.mark.parametrize("alpha", [2.0, 3.5])
def test_blur_equals_a_gaussian_filter_with_reflecting_borders(alpha, size):
    # ndimage samples the Gaussian at whole pixels. Its frequency response is ours plus aliases, at
    # most exp(-pi^2 alpha^2 / 2) = 3e-9 at alpha = 2; cut off at 12 alpha it loses nothing.
    x = images((1, *size, 2))
    expected = scipy.ndimage.gaussian_filter(
        x, sigma=(0, alpha, alpha, 0), mode="reflect", truncate=12.0
    )
    np.testing.assert_allclose(blur(x, alpha), expected, atol=1e-8)


@pytest.mark.parametrize("axis", [1, 2])
def test_blur_commutes_with_flips(axis):
    x = images((2, 7, 5, 3))
    np.testing.assert_allclose(blur(np.flip(x, axis), 0.8), np.flip(blur(x, 0.8), axis), atol=1e-13)


def test_blur_commutes_with_transposition():
    # Height and width play the same part, also on images that are not square.
    x = images((2, 7, 5, 3))
    transposed = blur(x.transpose(0, 2, 1, 3), 0.8)
    np.testing.assert_allclose(transposed.transpose(0, 2, 1, 3), blur(x, 0.8), atol=1e-13)


def test_every_image_is_blurred_by_its_own_level():
    x, alpha = images((3, 7, 5, 2)), np.array([0.0, 0.5, 3.0])
    alone = np.concatenate([blur(x[i : i + 1], alpha[i]) for i in range(3)])
    np.testing.assert_allclose(blur(x, alpha), alone, atol=1e-13)


def test_a_scalar_level_is_that_level_for_every_image():
    x = images((3, 7, 5, 2))
    np.testing.assert_allclose(blur(x, 0.9), blur(x, np.full(3, 0.9)), atol=1e-14)


# --- precision and transformations ---------------------------------------------------------------


def test_blur_is_exact_where_matrix_products_default_to_bfloat16():
    x = images((2, 32, 32, 3)).astype(np.float32)
    with jax.default_matmul_precision("bfloat16"):
        blurred = jax.jit(dct.blur)(x, jnp.float32(0.5))
    expected = scipy_idct(transfer(0.5, 32, 32) * scipy_dct(x))
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_every_matrix_product_of_the_blur_asks_for_full_precision():
    # The CPU computes in float32 whatever the default, so the numbers alone could not fail here.
    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(dct.blur).lower(np.zeros((1, 8, 8, 3)), 0.5).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 4
    assert all("HIGHEST, HIGHEST" in line for line in products)


def test_blur_works_under_vmap_over_single_images():
    x, alpha = images((3, 7, 5, 2)), np.array([0.0, 0.5, 3.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(dct.blur))(x, alpha), blur(x, alpha), atol=1e-14)


def test_the_gradient_of_a_blur_is_a_blur():
    # B is symmetric: the gradient of <y, B x> with respect to x is B y.
    x, y = images((2, 7, 5, 2)), images((2, 7, 5, 2), seed=1)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(y * dct.blur(x, 0.7))))(x)
    np.testing.assert_allclose(gradient, blur(y, 0.7), atol=1e-13)


def test_the_derivative_with_respect_to_alpha_obeys_the_heat_equation():
    # d m / d alpha = -lambda alpha m per frequency.
    _, rate = jax.jvp(lambda a: dct.transfer(a, 4, 7), (0.6,), (1.0,))
    expected = -0.6 * eigenvalues(4, 7)[..., None] * transfer(0.6, 4, 7)
    np.testing.assert_allclose(rate, expected, rtol=1e-12)


def test_blur_works_under_pmap():
    x = images((jax.local_device_count(), 2, 7, 5, 2))
    blurred = jax.pmap(lambda x: dct.blur(x, 0.7))(x)
    np.testing.assert_allclose(blurred[0], blur(x[0], 0.7), atol=1e-13)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [dct.dct, dct.idct])
def test_transforms_refuse_what_is_no_image(function):
    with pytest.raises(ValueError, match=r"must have shape \[\.\.\., H, W, C\], got \(4, 4\)"):
        function(np.zeros((4, 4)))


@pytest.mark.parametrize(
    ("shape", "alpha", "message"),
    [
        ((4, 4), 1.0, r"must have shape \[\.\.\., H, W, C\], got \(4, 4\)"),
        ((2, 4, 4, 1), np.ones(3), r"a scalar or shape \(2,\), got \(3,\)"),
        ((2, 4, 4, 1), np.ones(1), r"a scalar or shape \(2,\), got \(1,\)"),
        ((2, 4, 4, 1), np.ones((2, 1)), r"a scalar or shape \(2,\), got \(2, 1\)"),
        ((4, 4, 1), np.ones(4), r"must be a scalar, got \(4,\)"),
    ],
)
def test_blur_refuses_shapes_that_do_not_fit(shape, alpha, message):
    with pytest.raises(ValueError, match=message):
        dct.blur(np.zeros(shape), alpha)


def test_blur_refuses_wrong_shapes_before_tracing_under_jit():
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        jax.jit(dct.blur)(np.zeros((2, 4, 4, 1)), np.ones(3))
