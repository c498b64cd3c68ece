"""The residual head's loss weighted by the flow, against method section 2 and the velocity."""

import jax
import numpy as np
import pytest

from tests.core.closed_forms import dct, eigenvalues, transfer
from tests.core.test_losses import KEY, PATH, SIZE, at, images, knows
from warm_diffusion.denoiser import Prediction
from warm_diffusion.losses import score_matching_loss
from warm_diffusion.process import velocity

pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
def losses_flow(x0, residual_error=0.0, t=1.0, residual_floor=0.0):
    """Losses of a denoiser that knows the clean images, up to an error of R, at the one time t."""
    denoise = knows(x0, 0.0, residual_error)
    return score_matching_loss(
        denoise, KEY, x0, at(t), residual_weight="flow", residual_floor=residual_floor
    )


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("t", [0.3, 2.0])
def test_the_flow_weight_is_what_an_error_of_r_does_to_the_flow(floor, t):
    # Method section 2: (w^2 + floor) / s^2 per frequency, w = lambda alpha^2 m(alpha), typed anew.
    x0, error = images(4), np.random.default_rng(3).standard_normal((1, *SIZE))
    m, eigen = transfer(0.5 * t, *SIZE[:2]), eigenvalues(*SIZE[:2])[..., None]
    w = eigen * (0.5 * t) ** 2 * m
    expected = np.mean((w**2 + floor) * dct(error) ** 2) / 0.5**2
    terms = losses_flow(x0, residual_error=error, t=t, residual_floor=floor)
    np.testing.assert_allclose(terms.deblur, np.full(4, expected), rtol=1e-10)
    np.testing.assert_allclose(terms.denoise, np.zeros(4), atol=1e-25)
    np.testing.assert_allclose(terms.total, terms.deblur, rtol=1e-12)


def test_the_flow_weight_is_the_velocitys_sensitivity_to_r():
    # dx/dt of process.velocity changes by -alpha alpha' lambda m per unit of R and frequency; per
    # ln beta, at constant ratio (alpha' = alpha / beta), that is lambda alpha^2 m, at most 2 / e.
    x, error = images(2), np.random.default_rng(3).standard_normal((2, *SIZE))
    t, zero = 0.9, np.zeros((2, *SIZE))
    one, two = (velocity(x, Prediction(zero, r), PATH, t) for r in (zero, error))
    gain = np.abs(dct(two - one) / dct(error)) * t
    floorless = losses_flow(images(4), residual_error=error[:1], t=t)
    expected = np.mean((gain[:1] * dct(error[:1])) ** 2) / 0.5**2
    np.testing.assert_allclose(floorless.deblur, np.full(4, expected), rtol=1e-9)
    assert gain.max() <= 2 / np.e + 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_weight": "flwo"}, "residual_weight must be a number or flow, got 'flwo'"),
        ({"residual_weight": None}, "residual_weight must be a number or flow, got None"),
        ({"residual_floor": 0.1}, "residual_floor=0.1 goes with residual_weight=flow, not 1.0"),
    ],
)
def test_weights_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score_matching_loss(knows(images(1)), KEY, images(1), PATH, **options)
