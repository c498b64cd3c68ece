"""DDPM++ and NCSN++: what reaches their outputs, precision, gradients (EDM's: test_edm.py)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion.models import ddpmpp, layers, ncsnpp, weights

NETWORKS = {"ddpmpp": ddpmpp, "ncsnpp": ncsnpp}
SMALL = dict(
    resolution=8, channels=2, model_channels=8, channel_mult=(1, 2), num_blocks=0,
    attention_resolutions=(4,), dropout=0.5, augment_dim=0,
)  # fmt: skip


def random_variables(network, shape=(8, 8, 2)):
    """Nothing at its initial zero, so that every path through the network carries signal."""
    level = jnp.zeros((1,))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)), level, level)
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = np.sqrt(1 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return jnp.asarray(scale * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def small(name="ddpmpp", **options):
    """A small network, random weights, and its compiled function."""
    network = NETWORKS[name](**{**SMALL, **options})
    return network, random_variables(network), jax.jit(network.apply, static_argnames="train")


X = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
ONES = jnp.ones(3)


def test_the_cifar10_network_has_edms_number_of_parameters():
    # EDM's DDPM++ has 55,732,739 parameters. Added: two layers of 128^2 + 128 for the blur level, a
    # second head of 3 * (9 * 256 + 1), and 9 * 128 for the augmentation labels.
    network, level = ddpmpp(), jnp.zeros(1)
    x = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, level, level)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 55_732_739 + 33_024 + 6_915 + 1_152


def test_a_fresh_network_puts_out_zero():
    network = ddpmpp(**{**SMALL, "channel_mult": (1,), "num_blocks": 0})  # quick to compile
    init_and_apply = jax.jit(lambda key: network.init_with_output(key, X, ONES, ONES)[0])
    np.testing.assert_array_equal(init_and_apply(jax.random.key(0)), np.zeros((3, 8, 8, 4)))


@pytest.mark.parametrize("name", NETWORKS)
def test_image_and_both_levels_reach_the_output_of_their_image_alone(name):
    _, variables, apply = small(name)
    inputs = (X, 0.1 * ONES, 0.2 * ONES)
    one = apply(variables, *inputs)
    for changed in range(3):
        other = [x.at[1].set(0.9) if n == changed else x for n, x in enumerate(inputs)]
        two = apply(variables, *other)
        np.testing.assert_array_equal(one[::2], two[::2])
        assert np.abs(one[1] - two[1]).max() > 1e-3


def test_height_and_width_may_differ():
    _, variables, apply = small("ncsnpp")
    assert apply(variables, jnp.ones((3, 12, 6, 2)), ONES, ONES).shape == (3, 12, 6, 4)


def test_weights_are_those_of_the_same_network_at_any_resolution():
    """Levels are named by their sizes, but a network does the same to images of every size."""
    network, variables, apply = small()
    larger = network.clone(resolution=16, attention_resolutions=(8,))
    renamed = weights.at_resolution(variables["params"], network, 16)
    x = jax.random.normal(jax.random.key(2), (3, 16, 16, 2))
    expected = jax.eval_shape(larger.init, jax.random.key(0), x, ONES, ONES)["params"]
    assert jax.tree.map(jnp.shape, renamed) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(
        jax.jit(larger.apply)({"params": renamed}, x, ONES, ONES), apply(variables, x, ONES, ONES)
    )


def test_dropout_acts_in_training_alone():
    _, variables, apply = small()

    def run(key, train):
        rngs = {"dropout": jax.random.key(key)}
        return apply(variables, X, ONES, ONES, train=train, rngs=rngs)

    np.testing.assert_array_equal(run(0, False), run(1, False))
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert np.abs(run(0, True) - run(1, True)).max() > 1e-3


def test_class_labels_reach_the_output_and_minus_one_means_none():
    _, variables, apply = small(num_classes=3, label_dropout=1.0, dropout=0.0)
    same = jnp.broadcast_to(X[:1], X.shape)
    labels = jnp.array([0, 1, -1])
    with_labels = apply(variables, same, ONES, ONES, labels=labels)
    without = apply(variables, same, ONES, ONES)
    assert np.abs(with_labels[0] - with_labels[1]).max() > 1e-3
    np.testing.assert_allclose(with_labels[2], without[2], rtol=1e-5, atol=1e-5)
    # In training every label is dropped here.
    rngs = {"dropout": jax.random.key(0)}
    trained = apply(variables, same, ONES, ONES, labels=labels, train=True, rngs=rngs)
    np.testing.assert_allclose(trained, without, rtol=1e-5, atol=1e-5)


def test_bfloat16_convolutions_have_float32_weights_stay_near_float32_and_return_it():
    _, variables, apply = small()
    full = apply(variables, X, ONES, ONES)
    _, own, apply = small(dtype=jnp.bfloat16)
    half = apply(variables, X, ONES, ONES)
    assert {leaf.dtype for leaf in jax.tree.leaves((own, half))} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits: about 1 % after a dozen layers
    assert np.sqrt(np.mean((full - half) ** 2)) < 0.03 * np.std(full)
    assert np.abs(full - half).max() > 0


def test_in_training_a_bfloat16_convolution_gives_its_kernel_a_float32_gradient():
    # x, kernel and the gradient that comes back are whole numbers that bfloat16 holds, so JAX's own
    # rule in float32 is the exact answer; rounded to bfloat16 it would be off by up to 1 in 256.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-8, 9, (3, 6, 5, 4)), jnp.float32)
    back = jnp.asarray(rng.integers(-8, 9, (3, 6, 5, 7)), jnp.float32)

    def gradients(dtype):
        conv = layers.Conv(7, dtype=dtype, train=True)
        params = {"kernel": jnp.ones((3, 3, 4, 7)), "bias": jnp.zeros(7)}

        def objective(params, x):
            return jnp.sum(conv.apply({"params": params}, x).astype(jnp.float32) * back)

        return jax.grad(objective, (0, 1))(params, x)

    (got, got_x), (expected, expected_x) = gradients(jnp.bfloat16), gradients(jnp.float32)
    np.testing.assert_array_equal(got["kernel"], expected["kernel"])
    np.testing.assert_array_equal(got["bias"], expected["bias"])
    np.testing.assert_allclose(got_x, expected_x, rtol=2**-8)
    rounded = expected["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    assert np.abs(rounded - expected["kernel"]).max() > 0  # the test can tell


@pytest.mark.parametrize(("platform", "expected"), [("cuda", "bf16"), ("cpu", "f32")])
def test_a_gpu_computes_bfloat16_kernel_gradients_without_float32_factors(platform, expected):
    # cuDNN knows no other way: a float32 result makes XLA compute with float32 factors.
    conv = layers.Conv(7, dtype=jnp.bfloat16, train=True)
    params = {"kernel": jnp.ones((3, 3, 4, 7)), "bias": jnp.zeros(7)}
    x = jnp.ones((3, 6, 5, 4), jnp.bfloat16)

    def objective(params):
        return jnp.sum(conv.apply({"params": params}, x).astype(jnp.float32))

    lowered = jax.jit(jax.grad(objective)).trace(params).lower(lowering_platforms=(platform,))
    (line,) = [
        line for line in lowered.as_text().splitlines()
        if "stablehlo.convolution" in line and "-> tensor<3x3x4x7x" in line
    ]  # fmt: skip
    assert line.split("-> tensor<3x3x4x7x")[1].startswith(f"{expected}>")


def test_the_norm_is_that_of_flax_and_so_is_its_gradient():
    # flax's with the same groups, then SiLU; a mean far from 0 would show a fast variance.
    x = 3 * jax.random.normal(jax.random.key(0), (2, 6, 5, 12)) + 30
    variables = {"params": {"scale": jnp.linspace(0.5, 2, 12), "bias": jnp.linspace(-1, 1, 12)}}
    flax_norm = nn.GroupNorm(3, epsilon=1e-6, use_fast_variance=False)

    def values_and_gradients(function):
        def objective(variables, x):
            values = function(variables, x)
            return jnp.sum(values**2 * jnp.cos(x)), values

        return jax.jit(jax.grad(objective, (0, 1), has_aux=True))(variables, x)

    for activate in (True, False):
        got = values_and_gradients(layers.Norm(activate).apply)
        expected = values_and_gradients(
            lambda v, x, silu=activate: (nn.silu if silu else jnp.asarray)(flax_norm.apply(v, x))
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


def test_a_bfloat16_norm_computes_in_float32_and_rounds_once():
    # A mean of 100 leaves bfloat16 two digits: a norm that computed in it would be far off.
    x = (jax.random.normal(jax.random.key(0), (2, 8, 8, 12)) + 100).astype(jnp.bfloat16)
    variables = {"params": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}
    got = layers.Norm().apply(variables, x)
    expected = layers.Norm().apply(variables, x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_a_norm_keeps_its_input_alone_for_the_gradient():
    x = jnp.ones((2, 8, 8, 12), jnp.bfloat16)
    variables = {"params": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}
    _, gradient = jax.vjp(lambda x: layers.Norm().apply(variables, x), x)
    large = [leaf for leaf in jax.tree.leaves(gradient) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_in_a_bfloat16_network_softmax_is_computed_in_float32():
    network, variables, _ = small(dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: network.apply(variables, x, ONES, ONES))(X)

    def exponentials(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "exp":  # silu is `logistic`
                yield equation.invars[0].aval.dtype
            for inner in jax.tree.leaves(tuple(equation.params.values())):
                if hasattr(inner, "jaxpr"):
                    yield from exponentials(inner.jaxpr)

    assert set(exponentials(jaxpr.jaxpr)) == {np.dtype("float32")}


def test_the_blur_embedding_of_a_fresh_network_ends_in_zeros():
    network, variables, _ = small()
    init = jax.jit(lambda key: network.init(key, X, ONES, ONES))
    last = init(jax.random.key(0))["params"]["blur1"]
    np.testing.assert_array_equal(
        last["kernel"], np.zeros(variables["params"]["blur1"]["kernel"].shape)
    )
    np.testing.assert_array_equal(last["bias"], 0)


@pytest.mark.parametrize("shape", [(1, 8, 7, 2)])
def test_a_size_that_cannot_be_halved_is_refused_with_a_way_out(shape):
    network = ddpmpp(**SMALL)
    with pytest.raises(ValueError, match=r"divisible by 2, got .*shorten channel_mult or resize"):
        network.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(1), jnp.zeros(1))


def test_wrong_channels_and_unexpected_labels_are_refused():
    _, variables, apply = small()
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, 2\], got \(3, 8, 8, 3\)"):
        apply(variables, jnp.zeros((3, 8, 8, 3)), ONES, ONES)
    with pytest.raises(ValueError, match="num_classes=0"):
        apply(variables, X, ONES, ONES, labels=jnp.zeros(3, int))
