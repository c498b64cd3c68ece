"""What `build` makes: loss with labels, augmentation, dropout, slices, narrow types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import default
from warm_diffusion import losses, pretrained, samplers
from warm_diffusion.app import build
from warm_diffusion.data import Dataset, augmentation
from warm_diffusion.data.images import from_uint8
from warm_diffusion.pretrained import Architecture
from warm_diffusion.runtime.devices import make_mesh
from warm_diffusion.training.step import (
    Batch,
    Options,
    TrainMetrics,
    abstract_arguments,
    train_step,
)

SHAPE = (8, 8, 1)


def make_config(**overrides):
    config = default.get_config()
    config.model.model_channels = 8
    config.model.channel_mult = (1,)
    config.model.attention_resolutions = (8,)
    config.update_from_flattened_dict(overrides)
    return config


def random_params(built, seed=0):
    """Parameters of which none is zero, so that every input reaches the output."""
    rng = np.random.default_rng(seed)
    params = jax.jit(built.init_params)(jax.random.key(seed))
    return jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), np.float32), params
    )


def random_batch(size=8, classes=0):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (size, *SHAPE)), jnp.uint8)
    return Batch(images, jnp.arange(size) % classes if classes else None)


def keys(size=8):
    return jax.random.split(jax.random.key(5), size)


def mean_gradient(config, params, batch, built=None):
    built = built or build.architecture(config, SHAPE)
    loss_fn = build.loss(config, built)
    objective = lambda p: loss_fn(p, keys(len(batch.images)), batch).total.mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(objective))(params)


def largest_difference(a, b):
    norms = jax.tree.map(lambda x, y: jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-6), a, b)
    return max(float(x) for x in jax.tree.leaves(norms))


def test_the_plain_loss_is_score_matching_on_the_images():
    config = make_config()
    built = build.architecture(config, SHAPE)
    params, batch = random_params(built), random_batch()
    terms = jax.jit(build.loss(config, built))(params, keys(), batch)
    loss_keys = jax.vmap(jax.random.split, out_axes=1)(keys())[0]
    path, images = build.schedule(config), from_uint8(batch.images)
    expected = jax.jit(
        lambda p: losses.score_matching_loss(built.denoiser(p), loss_keys, images, path)
    )(params)
    np.testing.assert_allclose(terms.total, expected.total, rtol=1e-5)


@pytest.mark.long
def test_augmentation_reaches_the_images_and_the_network():
    config = make_config(**{"augment.transforms": augmentation.TRANSFORMS})
    config.augment.probability = 1.0
    built = build.architecture(config, SHAPE)
    assert built.network.augment_dim == 9
    params, batch = random_params(built), random_batch()
    terms = jax.jit(build.loss(config, built))(params, keys(), batch)
    loss_keys, augment_keys = jax.vmap(jax.random.split, out_axes=1)(keys())
    images, labels = augmentation.augment(augment_keys, from_uint8(batch.images), 1.0)
    path = build.schedule(config)

    @jax.jit
    def score_matching(labels):
        denoise = built.denoiser(params, augment_labels=labels)
        return losses.score_matching_loss(denoise, loss_keys, images, path)

    expected, untold = score_matching(labels), score_matching(None)
    np.testing.assert_allclose(terms.total, expected.total, rtol=1e-5)
    assert np.abs(terms.total - untold.total).max() > 1e-4


def test_each_image_gets_its_own_class():
    config = make_config(**{"model.num_classes": 4})
    built = build.architecture(config, SHAPE)
    params, batch = random_params(built), random_batch(classes=4)
    loss_fn = jax.jit(build.loss(config, built))
    changed = Batch(batch.images, batch.labels.at[3].set(0))
    difference = loss_fn(params, keys(), batch).total - loss_fn(params, keys(), changed).total
    assert np.flatnonzero(np.asarray(difference)).tolist() == [3]


def dataset(names, labels, tmp_path):
    images = np.zeros((len(labels), *SHAPE), np.uint8)
    return Dataset(images, np.asarray(labels, np.int32), {"class_names": names}, tmp_path)


def test_classes_that_the_data_do_not_have_are_refused(tmp_path):
    config = make_config(**{"model.num_classes": 4})
    with pytest.raises(ValueError, match="num_classes is 4, but digits has 2 classes"):
        build.labels(config, dataset(["a", "b"], [0, 1], tmp_path))
    with pytest.raises(ValueError, match="has no class"):
        build.labels(config, dataset(list("abcd"), [0, -1], tmp_path))
    config.model.num_classes = 0
    assert build.labels(config, dataset(["a"], [0], tmp_path)) is None


def one_step(config, built, options, optimizer=None, unroll=False):
    """The state before and after a step, and its metrics."""
    make_state, _ = build.initial_state(config, built, make_mesh())
    state, loss_fn = make_state(), build.loss(config, built)
    if optimizer:
        state = state.replace(tx=optimizer, opt_state=optimizer.init({}))
    step = functools.partial(train_step, loss_fn, options, unroll=unroll)
    return state, *jax.jit(step)(state, TrainMetrics.empty(), random_batch(), 0)


@pytest.mark.long
def test_slices_of_a_batch_give_the_gradient_of_the_batch():
    config = make_config(**{"augment.transforms": ("x_flip", "scale")})
    built, updates = build.architecture(config, SHAPE), []
    for slices, unroll in ((1, False), (4, False), (4, True)):
        options = Options(8, (100.0,), grad_accumulation=slices)
        before, after, _ = one_step(config, built, options, optax.sgd(1.0), unroll)
        updates.append(jax.tree.map(jnp.subtract, after.params, before.params))
    for sliced in updates[1:]:
        assert largest_difference(updates[0], sliced) < 1e-4


@pytest.mark.long
def test_remat_changes_memory_and_not_the_gradient():
    config = make_config()
    params, batch = random_params(build.architecture(config, SHAPE)), random_batch()
    plain = mean_gradient(config, params, batch)
    config.model.remat = True
    again = mean_gradient(config, params, batch)
    np.testing.assert_allclose(plain[0], again[0], rtol=1e-6)
    assert largest_difference(again[1], plain[1]) < 1e-4


@pytest.mark.long
def test_a_bfloat16_network_has_nearly_the_same_gradient():
    config = make_config()
    built = build.architecture(config, SHAPE)
    params, batch = random_params(built), random_batch()
    value, gradient = mean_gradient(config, params, batch)
    config.model.dtype = "bfloat16"
    narrow = build.architecture(config, SHAPE)
    narrow_value, narrow_gradient = mean_gradient(config, params, batch, narrow)
    assert narrow_value.dtype == jnp.float32
    # bfloat16 keeps 8 bits, 0.4 % a rounding; over some 20 layers a few percent of the whole.
    np.testing.assert_allclose(narrow_value, value, rtol=0.02)
    flat, narrow_flat = (
        jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, narrow_gradient)
    )
    assert float(optax.safe_norm(flat - narrow_flat, 0.0) / optax.safe_norm(flat, 0.0)) < 0.05
    assert float(jnp.abs(flat - narrow_flat).max()) > 0  # it did run in bfloat16


class Watched(Architecture):
    """Tells the dropout key that each step passes."""

    def denoiser(self, params, labels=None, *, dropout_key=None, **options):
        jax.debug.callback(lambda data: self.keys.append(data), jax.random.key_data(dropout_key))
        return super().denoiser(params, labels, dropout_key=dropout_key, **options)


@pytest.mark.long
def test_each_step_has_a_dropout_mask_of_its_own():
    """fold_in(key of its first image, 2), that being fold_in(fold_in(seed, step), 0)."""
    config = make_config(**{"model.dropout": 0.5, "seed": 3})
    watched = Watched(**vars(build.architecture(config, SHAPE)))
    object.__setattr__(watched, "keys", [])
    config.training.batch_size = 8
    make_state, _ = build.initial_state(config, watched, make_mesh())
    step = build.train_step(config, watched, make_mesh())
    state, metrics = make_state(), TrainMetrics.empty()
    for _ in range(2):
        state, metrics = step(state, metrics, random_batch(), np.uint32(3))
    jax.block_until_ready(state)
    jax.effects_barrier()
    expected = [
        jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), n), 0), 2)
        for n in range(2)
    ]
    np.testing.assert_array_equal(watched.keys, [jax.random.key_data(key) for key in expected])


@pytest.mark.long
def test_on_a_cpu_slices_of_a_batch_are_not_a_loop():
    """XLA's CPU compiler makes gradients of convolutions 20 times slower in one."""
    loops = []
    for slices in (1, 2):
        config = make_config(**{"training.batch_size": 8, "training.grad_accumulation": slices})
        built, mesh = build.architecture(config, SHAPE), make_mesh()
        _, state = build.initial_state(config, built, mesh)
        arguments = abstract_arguments(state, random_batch(), build.step_options(config), mesh)
        lowered = build.train_step(config, built, mesh).lower(*arguments)
        loops.append(lowered.as_text().count("stablehlo.while"))
    assert loops[0] == loops[1]


def sample(config, params, built, seeds):
    sampler = build.sampler(config, built, make_mesh(), batch_size=len(seeds))
    return np.asarray(sampler.draw(params, np.asarray(seeds, np.uint32), None)), sampler.num_calls


def test_a_batch_is_not_larger_than_the_images_that_are_asked_for():
    config, mesh = make_config(**{"sampling.batch_size": 4}), make_mesh()
    built = build.architecture(config, SHAPE)
    sizes = [build.sampler(config, built, mesh, num_images=n).batch_size for n in (0, 3, 40)]
    assert sizes == [4 * mesh.size, min(4, -(-3 // mesh.size)) * mesh.size, 4 * mesh.size]


def test_a_sampler_is_traced_once_by_its_checks_and_all_its_calls(monkeypatch):
    traced, draw = [], Architecture.draw
    monkeypatch.setattr(Architecture, "draw", lambda *a, **k: traced.append(0) or draw(*a, **k))
    config = make_config(**{"sampling.num_steps": 2})
    built = build.architecture(config, SHAPE)
    model = pretrained.Model(**vars(built), params=random_params(built), info={})
    for seeds in ([4, 5], [6, 7]):
        model.sample(seeds, num_steps=2)
    assert len(traced) == 1


def test_a_seed_has_its_own_class_or_the_one_asked_for():
    built = build.architecture(make_config(**{"model.num_classes": 3}), SHAPE)
    params, seeds = random_params(built), np.array([4, 5])
    x = samplers.initial_noise(seeds, SHAPE)
    for label, classes in ((-1, [1, 2]), (2, [2, 2])):  # the remainder by 3
        found = built.seed_denoiser(params, seeds, label=label)(x, 0.5, 1.0)
        expected = built.denoiser(params, jnp.array(classes))(x, 0.5, 1.0)
        np.testing.assert_allclose(found.blurry, expected.blurry, atol=1e-6)
    one, other = (
        built.denoiser(params, jnp.array(c))(x, 0.5, 1.0).blurry for c in ([1, 2], [2, 2])
    )
    assert np.abs(one[0] - other[0]).max() > 1e-4


def test_guidance_extrapolates_from_no_class_to_the_class():
    """Two Euler steps retyped with the guided heads u + w (c - u)."""
    config = make_config(**{"model.num_classes": 3, "sampling.num_steps": 2})
    config.sampling.solver, config.sampling.guidance, config.sampling.label = "euler", 2.5, 1
    built = build.architecture(config, SHAPE)
    params = random_params(built)
    drawn, num_calls = sample(config, params, built, [7])
    assert num_calls == 4

    def heads(x, alpha, beta):
        both = [built.denoiser(params, labels)(x, alpha, beta) for labels in (jnp.array([1]), None)]
        return type(both[0])(*(u + 2.5 * (c - u) for c, u in zip(*both, strict=True)))

    noise, path = samplers.initial_noise(jnp.array([7]), SHAPE), build.schedule(config)
    expected = jax.jit(lambda x: samplers.sample(heads, x, path, solver="euler", num_steps=2))(
        noise
    )
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


@pytest.mark.parametrize("key", ["guidance", "label"])
def test_guidance_without_classes_is_refused(key):
    config = make_config()
    config.sampling[key] = 2 if key == "label" else 2.0
    with pytest.raises(ValueError, match="need a network with classes"):
        build.sampler(config, build.architecture(config, SHAPE), make_mesh(), batch_size=2)


@pytest.mark.long
def test_a_clipped_gradient_has_the_norm_asked_for():
    """Adam's first mean is 0.1 of the gradient it is given."""
    config = make_config(**{"optimizer.grad_clip": 0.01})
    built = build.architecture(config, SHAPE)
    _, state, metrics = one_step(config, built, Options(8, (9.0,)))
    assert metrics.compute()["grad_norm"] > 0.01
    mean = optax.tree.get(state.opt_state, "mu")
    np.testing.assert_allclose(optax.tree.norm(mean), 0.1 * 0.01, rtol=1e-4)
