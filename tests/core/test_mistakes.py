"""What a new user gets wrong with arrays and networks: each a ValueError that tells the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion import dct, denoiser, losses, oracle, process, samplers, schedules, spectra

KEY = jax.random.key(0)
PATH = schedules.constant_bnr(0.5)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)
EXACT = oracle.mixture(IMAGES)


def network(x, c_noise, c_blur):
    """What `denoiser.precondition` takes: an array, not a Prediction."""
    return jnp.concatenate([x, x], axis=-1)


# --- a network is no denoiser --------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.score_matching_loss(network, KEY, IMAGES, PATH),
        lambda: process.velocity(IMAGES, network(IMAGES, 0.0, 0.0), PATH, 1.0),
        *(
            lambda solver=solver: samplers.sample(network, IMAGES, PATH, solver=solver)
            for solver in samplers.SOLVERS
        ),
    ],
    ids=["loss", "velocity", *samplers.SOLVERS],
)
def test_a_network_must_be_wrapped(call):
    message = (
        r"must return a denoiser.Prediction, got an array \(2, 8, 6, 6\): .*"
        r"wrap the network: denoiser.precondition\(network\)"
    )
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bare_pair_is_no_prediction():
    with pytest.raises(ValueError, match="Prediction, got tuple"):
        losses.score_matching_loss(lambda x, alpha, beta: (x, x), KEY, IMAGES, PATH)


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.sample(EXACT, (2, 8, 6, 3), PATH), "noise must be one array .* a tuple"),
        (lambda: samplers.sample(EXACT, list(IMAGES), PATH), "noise must be one array .* a list"),
        (
            lambda: losses.score_matching_loss(EXACT, KEY, list(IMAGES), PATH),
            "x0 must be one array .* a list: numpy.stack joins",
        ),
        (lambda: spectra.power_spectrum(list(IMAGES)), "images must be one array .* a list"),
        (lambda: oracle.mixture(list(IMAGES)), "images must be one array .* a list"),
    ],
)
def test_a_shape_or_a_list_is_no_array_of_images(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TAKE_IMAGES = {
    "loss": lambda x: losses.score_matching_loss(EXACT, KEY, x, PATH),
    "perturb": lambda x: process.perturb(x, jnp.zeros(x.shape), 0.5, 0.5),
    "power_spectrum": spectra.power_spectrum,
    "mixture": oracle.mixture,
}
each_that_takes_images = pytest.mark.parametrize(
    "call", TAKE_IMAGES.values(), ids=TAKE_IMAGES.keys()
)


@each_that_takes_images
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(("scale", "largest"), [(255.0, 255), (-128.0, 128)])
def test_images_that_are_not_scaled_are_refused(call, kind, scale, largest):
    x = kind(np.full((2, 8, 6, 3), 0.5, np.float32))
    x = kind(np.where(np.arange(3) == 1, scale, x).astype(np.float32))
    message = rf"scaled to \[-1, 1\], got values up to {largest}: x / 127.5 - 1"
    with pytest.raises(ValueError, match=message):
        call(x)


@each_that_takes_images
def test_bytes_are_refused_by_name(call):
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], got uint8: x / 127.5 - 1"):
        call(np.zeros((2, 8, 6, 3), np.uint8))


@each_that_takes_images
def test_images_that_overshoot_a_little_pass(call):
    call(9 * IMAGES)


def test_traced_images_cannot_be_looked_at_and_pass():
    loss = jax.jit(lambda x: losses.score_matching_loss(EXACT, KEY, x, PATH).total)
    assert np.all(np.isfinite(loss(255 * jnp.abs(IMAGES))))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 28, 28)])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: losses.score_matching_loss(EXACT, KEY, x, PATH),
        lambda x: samplers.sample(EXACT, x, PATH),
        lambda x: denoiser.precondition(network)(x, 0.5, 0.5),
        spectra.power_spectrum,
    ],
    ids=["loss", "sample", "denoiser", "power_spectrum"],
)
def test_channels_first_are_refused(call, shape):
    with pytest.raises(ValueError, match=r"look like channels first: transpose to \[B, H, W, C\]"):
        call(jnp.zeros(shape))


@pytest.mark.parametrize(
    "shape", [(2, 8, 8, 3), (3, 32, 32, 1), (2, 1, 7, 3), (2, 3, 4, 4), (2, 3, 8, 7), (2, 2, 8, 8)]
)
def test_other_shapes_are_taken_as_they_are(shape):
    assert dct.as_images(np.zeros(shape)).shape == shape


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("path", [schedules.cold(), schedules.hot(beta_max=0.5)])
def test_a_path_that_does_not_end_in_noise_needs_a_start(path, transform):
    run = transform(lambda noise: samplers.sample(EXACT, noise, path, solver="euler"))
    with pytest.raises(ValueError, match=r"does not hide the images: pass start=.*process.perturb"):
        run(IMAGES)


def test_the_start_may_be_noise_where_that_is_meant():
    path = schedules.hot(beta_max=0.5)
    x = samplers.sample(EXACT, IMAGES, path, num_steps=4, start=0.5 * IMAGES)
    assert x.shape == IMAGES.shape
