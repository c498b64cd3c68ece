"""Non-leaky augmentation against scipy, closed forms, and the distributions of EDM's table 6."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from warm_diffusion.data import augmentation
from warm_diffusion.data.augmentation import (
    TRANSFORMS,
    Parameters,
    augment,
    draw,
    inverse_map,
    labels,
)

# The labels of each transform, in the order of EDM's table 6.
COLUMNS = {
    "x_flip": [0],
    "y_flip": [1],
    "scale": [2],
    "rotate": [3, 4],
    "anisotropy": [5, 6],
    "translate": [7, 8],
}
MANY = 40_000
ZERO = dict.fromkeys(Parameters._fields, 0.0)

# Compiled where many shapes or slow pieces pass; compiling takes most of these tests' time.
jit_augment = jax.jit(augment, static_argnames="transforms")
apply = jax.jit(augmentation.apply)
warp = jax.jit(augmentation.warp)


def parameters(batch=1, **values):
    """Parameters of a batch that is transformed alike; what is not named is zero."""
    return Parameters(**{k: jnp.full(batch, v) for k, v in (ZERO | values).items()})


def noise(*shape, seed=0):
    """White noise: the hardest image to resample."""
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


@pytest.fixture(scope="module")
def drawn():
    """Many draws with every transform enabled."""
    return Parameters(*map(np.asarray, draw(jax.random.key(0), MANY, 1.0)))


# --- identity and labels -------------------------------------------------------------------------


def test_zero_parameters_give_back_the_image_bit_for_bit():
    images = noise(2, 12, 10, 3)
    np.testing.assert_array_equal(apply(images, parameters(2)), images)
    np.testing.assert_array_equal(labels(parameters(2)), np.zeros((2, 9)))


def test_zero_labels_mean_an_untouched_image_and_others_a_changed_one():
    images = noise(512, 24, 24, 1)
    augmented, found = jit_augment(jax.random.key(0), images, 0.12)
    touched = np.any(np.asarray(found) != 0, axis=1)
    assert 0 < touched.sum() < 512
    changed = np.any(np.asarray(augmented != images), axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, touched)


def test_labels_are_those_of_edms_table_in_its_order():
    values = parameters(
        x_flip=1, y_flip=0, scale=0.7, rotation=2.0, anisotropy=1.5, axis=-0.4,
        x_shift=-0.3, y_shift=0.9,
    )  # fmt: skip
    # EDM, table 6: a0, a1, a2, cos a3 - 1, sin a3, a5 cos a4, a5 sin a4, a6, a7.
    expected = [
        1, 0, 0.7, np.cos(2.0) - 1, np.sin(2.0), 1.5 * np.cos(0.4), -1.5 * np.sin(0.4), -0.3, 0.9
    ]  # fmt: skip
    np.testing.assert_allclose(labels(values), [expected], rtol=1e-6)


@pytest.mark.parametrize("name", ["x_flip", "rotate"])
def test_a_disabled_transform_has_zero_labels_and_leaves_the_others_as_they_were(name):
    key, rest = jax.random.key(3), tuple(other for other in TRANSFORMS if other != name)
    everything = np.array(labels(draw(key, 64, 0.9)))
    without = labels(draw(key, 64, 0.9, rest))
    assert np.any(everything[:, COLUMNS[name]])
    everything[:, COLUMNS[name]] = 0
    np.testing.assert_array_equal(without, everything)


# --- what is drawn -------------------------------------------------------------------------------


@functools.cache
def many_labels(probability):
    return np.asarray(labels(draw(jax.random.key(2), MANY, probability)))


@pytest.mark.parametrize("probability", [0.0, 0.12, 1.0])
def test_each_transform_happens_as_often_as_it_should(probability):
    for name in TRANSFORMS:
        happened = np.mean(np.any(many_labels(probability)[:, COLUMNS[name]] != 0, axis=1))
        # EDM: x-flip always eligible; an enabled flip is a fair coin.
        expected = {"x_flip": 0.5, "y_flip": probability / 2}.get(name, probability)
        error = np.sqrt(expected * (1 - expected) / MANY)
        assert abs(happened - expected) <= 5 * error + 1e-12, name


@pytest.mark.parametrize(
    ("field", "distribution"),
    [
        ("scale", scipy.stats.norm()),
        ("rotation", scipy.stats.uniform(-np.pi, 2 * np.pi)),
        ("anisotropy", scipy.stats.norm()),
        ("x_shift", scipy.stats.norm()),
        ("y_shift", scipy.stats.norm()),
    ],
)
def test_parameters_follow_the_distributions_of_the_table(drawn, field, distribution):
    assert scipy.stats.kstest(getattr(drawn, field), distribution.cdf).pvalue > 1e-3


def test_the_axis_is_horizontal_in_half_of_the_images_and_uniform_in_the_others(drawn):
    # EDM's code: aniso_rotate_prob = 0.5.
    axis = np.asarray(drawn.axis)
    assert abs(np.mean(axis == 0) - 0.5) < 5 * np.sqrt(0.25 / MANY)
    uniform = scipy.stats.uniform(-np.pi, 2 * np.pi)
    assert scipy.stats.kstest(axis[axis != 0], uniform.cdf).pvalue > 1e-3


def test_an_images_draw_does_not_depend_on_the_size_of_its_batch(drawn):
    for few, many in zip(draw(jax.random.key(0), 64, 1.0), drawn, strict=True):
        np.testing.assert_array_equal(few, many[:64])


def test_an_image_is_augmented_without_regard_to_the_others():
    key, images = jax.random.key(6), noise(8, 9, 7, 3)
    alone = images.at[jnp.arange(8) != 3].set(0.0)
    together, separate = jit_augment(key, images, 0.9)[0], jit_augment(key, alone, 0.9)[0]
    np.testing.assert_array_equal(together[3], separate[3])


# --- exact transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [(1, 0), (0, 1)])
def test_flips_are_exact_permutations(flips):
    images = noise(2, 7, 10, 3)
    expected = np.asarray(images)
    expected = expected[:, :, ::-1] if flips[0] else expected
    expected = expected[:, ::-1] if flips[1] else expected
    flipped = apply(images, parameters(2, x_flip=flips[0], y_flip=flips[1]))
    np.testing.assert_array_equal(flipped, expected)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-4, 5)])
def test_whole_pixel_translations_are_exact_and_borders_reflect(right, down):
    height, width, border = 8, 16, 8
    images = noise(1, height, width, 2)
    moved = apply(images, parameters(x_shift=right * 8 / width, y_shift=down * 8 / height))
    # numpy's "symmetric": the border pixel is repeated.
    padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), "symmetric")
    expected = padded[:, border - down :, border - right :][:, :height, :width]
    np.testing.assert_allclose(moved, expected, atol=1e-5)


# --- the warp ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (8, 14)])
def test_warp_is_scipys_cubic_spline_with_reflecting_borders(shape):
    batch = 6
    images = noise(batch, *shape, 2)
    # Random maps as `draw` makes them and beyond: up to twice the image away.
    generator = np.random.default_rng(1)
    inverse = np.concatenate(
        [
            np.eye(2) + generator.normal(size=(batch, 2, 2)),
            generator.normal(size=(batch, 2, 1)) * max(shape),
        ],
        axis=2,
    )
    warped = warp(images, jnp.asarray(inverse, jnp.float32))
    centre = (np.array(shape) - 1) / 2
    for image, matrix, ours in zip(np.asarray(images, np.float64), inverse, warped, strict=True):
        for channel in range(2):
            expected = scipy.ndimage.affine_transform(
                image[..., channel],
                matrix[:, :2],
                offset=centre + matrix[:, 2] - matrix[:, :2] @ centre,
                order=3,
                mode="reflect",
            )
            # Rounded positions (float32, some 1e-6 pixels) times the slope of white noise.
            np.testing.assert_allclose(ours[..., channel], expected, atol=2e-5)


def blob(shape, to_source):
    """A Gaussian blob, off the centre and oblique, seen through a map of (x, y), y upwards."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    position = np.stack([x - (width - 1) / 2, (height - 1) / 2 - y, np.ones(shape)])
    source = np.einsum("ij,jhw->ihw", to_source, position)[:2] - np.array([4, 2])[:, None, None]
    precision = np.linalg.inv([[16, 5], [5, 9]])
    return np.exp(-np.einsum("ihw,ij,jhw->hw", source, precision, source) / 2)


def moved_by(p, shape):
    """What the module says of each transform, as 3x3 matrices on (x, y), y upwards, in float64."""
    height, width = shape

    def turn(a):
        return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])

    shift = np.eye(3)
    shift[:2, 2] = p["x_shift"] * width / 8, -p["y_shift"] * height / 8
    size, stretch = 2 ** (0.2 * p["scale"]), 2 ** (0.2 * p["anisotropy"])
    steps = [
        np.diag([1 - 2 * p["x_flip"], 1 - 2 * p["y_flip"], 1]),
        np.diag([size, size, 1]),
        turn(p["rotation"]),
        turn(p["axis"]) @ np.diag([stretch, 1 / stretch, 1]) @ turn(-p["axis"]),
        shift,
    ]
    return np.linalg.multi_dot(steps[::-1])


@pytest.mark.parametrize(
    "values",
    [
        {"scale": 1.5},
        {"rotation": 0.6},
        {"anisotropy": 1.5, "axis": 0.9},
        {"x_shift": 0.63},
        {"x_flip": 1, "y_flip": 1, "scale": 0.5, "rotation": -2.5, "anisotropy": 0.8, "axis": 2.0,
         "x_shift": -0.4, "y_shift": 0.3},
    ],
    ids=lambda values: "-".join(values),
)  # fmt: skip
def test_a_blob_goes_where_the_transforms_in_their_order_take_it(values):
    shape = (64, 80)
    image = jnp.asarray(blob(shape, np.eye(3)), jnp.float32)[None, :, :, None]
    ours = apply(image, parameters(**values))[0, :, :, 0]
    expected = blob(shape, np.linalg.inv(moved_by(ZERO | values, shape)))
    # Closed form; 2e-3 of the blob's height: interpolation, and the tails that borders reflect.
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_fine_detail_survives_a_shift_by_half_a_pixel():
    # Half the Nyquist frequency: w = pi / 2 per pixel. A cubic spline keeps, in closed form,
    # (23 cos(w/2) + cos(3w/2)) / 24 / ((2 + cos w) / 3) of a wave midway between pixels.
    width, wave = 64, np.pi / 2
    kept = (23 * np.cos(wave / 2) + np.cos(3 * wave / 2)) / 24 / ((2 + np.cos(wave)) / 3)
    assert kept > 0.97
    x = np.arange(width) - (width - 1) / 2
    image = jnp.asarray(np.cos(wave * x), jnp.float32).reshape(1, 1, width, 1)
    moved = apply(image, parameters(x_shift=0.5 * 8 / width))[0, 0, :, 0]
    np.testing.assert_allclose(moved[12:-12], kept * np.cos(wave * (x - 0.5))[12:-12], atol=1e-5)


def test_products_of_matrices_and_gathers_agree():
    # The first is what TPUs run: it must not differ from what the other tests see.
    images, inverse = noise(6, 8, 14, 2), inverse_map(draw(jax.random.key(0), 6, 1.0), 8, 14)
    expected = warp(images, inverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "_sum_by_gather", augmentation._sum_by_products)
        ours = jax.jit(lambda *args: augmentation.warp(*args))(images, inverse)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.any(np.asarray(ours != expected))  # else it was the gather again


def test_float64_draws_the_same_parameters():
    single = draw(jax.random.key(12), 64, 0.9)
    with jax.enable_x64(True):
        double = draw(jax.random.key(12), 64, 0.9)
    for ours, theirs in zip(single, double, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- mistakes ------------------------------------------------------------------------------------


def test_what_cannot_be_drawn_or_augmented_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="probability must lie between 0 and 1, got"):
        draw(key, 2, float("nan"))
    with pytest.raises(ValueError, match="transforms must be names out of"):
        draw(key, 2, 0.1, ("x_flip", "sheer"))
    with pytest.raises(ValueError, match=r"floating point \[B, H, W, C\], got"):
        augment(key, np.zeros((2, 8, 8, 3), int), 0.1)


def test_the_example_runs():
    assert doctest.testmod(augmentation).failed == 0
