"""docs/explorer.html computes what the package computes, and its sliders do what they say."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests import browser
from warm_diffusion import dct, spectra

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "explorer.html"


@pytest.fixture(scope="module")
def view():
    with browser.opened(PAGE) as view:
        view.evaluate("explorer.ready")
        yield view


def planes(image):
    """[H, W, C] as the page has it."""
    return [plane.ravel().tolist() for plane in np.moveaxis(image, -1, 0)]


@pytest.mark.parametrize("shape", [(6, 8), (5, 3)])
def test_transform_blur_and_rings_are_the_packages(view, shape):
    image = np.random.default_rng(0).uniform(-1, 1, (*shape, 3))
    found = view.evaluate(
        """([planes, h, w]) => {
          const coefficients = planes.map((p) => explorer.transform(p, h, w, false));
          return {
            coefficients: coefficients.map((c) => [...c]),
            blurred: explorer.blur(coefficients, 1.3, h, w).map((p) => [...p]),
            rings: explorer.radialMean(explorer.power(coefficients), h, w),
          };
        }""",
        [planes(image), *shape],
    )

    def images(name):
        return np.moveaxis(np.array(found[name]).reshape(3, *shape), 0, -1)

    np.testing.assert_allclose(images("coefficients"), dct.dct(image[None])[0], atol=1e-5)
    np.testing.assert_allclose(images("blurred"), dct.blur(image[None], 1.3)[0], atol=1e-5)
    frequency, mean = spectra.radial_mean(jnp.mean(dct.dct(image[None])[0] ** 2, axis=-1))
    np.testing.assert_allclose(found["rings"]["frequency"], frequency, rtol=1e-5)
    np.testing.assert_allclose(found["rings"]["mean"], mean, rtol=1e-4)


def test_a_slider_moves_the_other_along_the_path(view):
    def level():
        return view.evaluate("explorer.level()")

    def move(name, position):
        view.locator(f"#{name}").evaluate(
            "(s, x) => { s.value = x; s.dispatchEvent(new Event('input')); }", position
        )

    view.locator("[name=path][value='5']").evaluate("choice => choice.click()")
    move("alpha", 0.7)
    alpha, beta = level()
    assert alpha == pytest.approx(5 * beta)
    assert alpha == pytest.approx(0.01 * 2000**0.7)  # logarithmic, from 0.01 to 20 pixels
    view.locator("[name=path][value='0']").evaluate("choice => choice.click()")
    assert level() == [0, pytest.approx(beta)]
    assert "blur has taken at most 0.0 %" in view.locator("#verdict").inner_text()
    move("beta", 1.0)
    assert "nothing: none is left" in view.locator("#verdict").inner_text()
