"""A network in tiles against the same network on the whole image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion.models import at_any_size

pytestmark = pytest.mark.usefixtures("x64")

each_size = pytest.mark.parametrize("size", [(5, 7), (16, 16), (40, 9), (37, 51)])


def image(size, batch=1, channels=2):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, *size, channels)))


@each_size
def test_what_is_done_to_each_pixel_alone_is_done_in_tiles(size):
    """The weights of the tiles sum to one at every pixel."""
    network = at_any_size(lambda x: jnp.sin(x), multiple=4, tile=16, overlap=8)
    np.testing.assert_allclose(network(image(size)), np.sin(image(size)), rtol=1e-12)


def local(x):
    """Reaches 3 pixels, halves the image on the way, and sees zeros beyond its borders."""
    coarse = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean(axis=(2, 4))
    x = jnp.tanh(x + coarse.repeat(2, axis=1).repeat(2, axis=2))
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return x - 0.3 * padded[:, :-4, 2:-2] + 0.2 * padded[:, 2:-2, 4:] * padded[:, 4:, 2:-2]


@pytest.mark.parametrize("size", [(40, 60), (64, 16)])
def test_a_network_that_reaches_no_further_than_the_margin_is_the_same_in_tiles(size):
    tiled = at_any_size(local, multiple=2, tile=24, overlap=16)  # margin 4
    np.testing.assert_allclose(tiled(image(size)), local(image(size)), atol=1e-12)


@each_size
def test_the_network_sees_reflected_borders_and_never_more_than_a_tile(size):
    seen = []

    def network(x):
        seen.append(x)
        return x

    at_any_size(network, multiple=4, tile=16, overlap=8)(image(size))
    assert all(side % 4 == 0 and side <= 16 for x in seen for side in x.shape[1:3])
    if max(size) <= 16:  # called once, by the image itself
        padding = [(0, 0), *((0, -side % 4) for side in size), (0, 0)]
        np.testing.assert_array_equal(seen[0], np.pad(image(size), padding, "symmetric"))


def test_a_step_between_tiles_is_spread_over_the_overlap():
    """A network that paints each tile in one colour: neighbours differ by the slope of sin^2."""
    paint = at_any_size(
        lambda x: jnp.zeros_like(x) + x.mean(axis=(1, 2), keepdims=True), tile=32, overlap=16
    )
    x = jnp.where(jnp.arange(64) < 32, 0.0, 1.0)[None, None, :, None] * jnp.ones((1, 32, 1, 1))
    row = np.asarray(paint(x))[0, 0, :, 0]
    assert np.ptp(row) > 0.9
    # Of three tiles with a step of 1/2 from each to the next: sin^2 over 8 pixels.
    assert np.abs(np.diff(row)).max() <= 0.5 * np.pi / 2 / 8


def test_tiles_work_under_jit_and_have_a_gradient():
    x = image((20, 30))
    tiled = jax.jit(at_any_size(local, multiple=2, tile=16, overlap=8))
    np.testing.assert_allclose(tiled(x), at_any_size(local, multiple=2, tile=16, overlap=8)(x))
    gradient = jax.grad(lambda x: at_any_size(lambda x: x**2, tile=16, overlap=8)(x).sum())(x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-12)


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="both divisible by 4, got 8 and 18"):
        at_any_size(lambda x: x, multiple=4, tile=18, overlap=8)
