"""docs/explorer.html computes what the package computes."""

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


@pytest.mark.parametrize("shape", [(6, 8)])
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
