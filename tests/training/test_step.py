"""The training step: Adam, averages, the guard against non-finite gradients, devices."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from warm_diffusion.losses import LossTerms
from warm_diffusion.runtime import devices
from warm_diffusion.training.step import (
    Batch,
    Options,
    TrainMetrics,
    create_state,
    ema_decay,
    is_finite,
    train_step,
    warmup_schedule,
)

BATCH = 4


def normals(keys):
    return jax.vmap(lambda key: jax.random.normal(key, ()))(keys)


def quadratic_loss(params, keys, batch):
    """(w - mean of the image)^2 for each image, with a little noise from its key; NaN for 255s."""
    x = batch.images.astype(jnp.float32).mean(axis=(1, 2, 3)) / 255
    noise = 0.01 * normals(keys)
    error = (params["w"].reshape(1) - x - noise) ** 2
    error = error * jnp.where(x == 1, jnp.nan, 1.0)
    return LossTerms(error, error / 4, 3 * error / 4, jnp.zeros_like(error))


def batch(value):
    return Batch(jnp.full((BATCH, 2, 2, 1), value, jnp.uint8))


def noise_of_step(n):
    """Returns the noise of the loss: image i of step n has fold_in(fold_in(seed key, n), i)."""
    key = jax.random.fold_in(jax.random.key(7), n)
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(BATCH)])
    return 0.01 * np.asarray(normals(keys), np.float64)


def make(rate=0.1, halflives=(8.0,), rampup=0.0, warmup_images=0, grad_accumulation=1):
    optimizer = optax.adam(warmup_schedule(rate, warmup_images, BATCH))
    state = create_state(lambda: None, {"w": jnp.asarray(0.5)}, optimizer, len(halflives))
    options = Options(BATCH, halflives, rampup, grad_accumulation)

    def step(state, metrics, batch):
        return train_step(quadratic_loss, options, state, metrics, batch, 7)

    return state, jax.jit(step)


def test_a_step_is_adam_with_warm_up_and_an_exponential_average():
    """Three steps against Adam (Kingma & Ba, Algorithm 1) and EMA retyped in numpy."""
    state, step = make(rampup=0.5, warmup_images=10)
    metrics, w, m, v, ema = TrainMetrics.empty(), 0.5, 0.0, 0.0, 0.5
    for n in range(3):
        gradient = np.mean(2 * (w - 51 * (n + 1) / 255 - noise_of_step(n)))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.1 * min(n * BATCH / 10, 1)
        w -= rate * (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        halflife = min(8.0, 0.5 * n * BATCH)
        decay = 0.5 ** (BATCH / halflife) if halflife else 0.0
        ema = w + decay * (ema - w)
        state, metrics = step(state, metrics, batch(51 * (n + 1)))
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(state.ema[0]["w"], ema, rtol=1e-5)
    assert int(state.step) == 3


@pytest.mark.parametrize("batch_size", [10, 50])
def test_a_weight_is_halved_in_the_average_after_its_half_life_in_images(batch_size):
    remaining = np.prod(
        [ema_decay(jnp.asarray(1e9), batch_size, 1000.0, 0.05) for _ in range(1000 // batch_size)]
    )
    np.testing.assert_allclose(remaining, 0.5, rtol=1e-5)


def test_ramp_up_makes_the_first_average_the_weights_themselves():
    assert float(ema_decay(jnp.asarray(0.0), 8, 1000.0, 0.05)) == 0.0
    # at 2,000 images the half-life is 5 % of them, 100 images
    np.testing.assert_allclose(
        ema_decay(jnp.asarray(2000.0), 50, 1000.0, 0.05), 0.5**0.5, rtol=1e-6
    )


def test_several_half_lives_are_averaged_at_once():
    together, step = make(halflives=(8.0, 100.0))
    apart = [make(halflives=(half,)) for half in (8.0, 100.0)]
    metrics = TrainMetrics.empty()
    for n in range(3):
        together, _ = step(together, metrics, batch(n))
        apart = [(one(state, metrics, batch(n))[0], one) for state, one in apart]
    for average, (alone, _) in zip(together.ema, apart, strict=True):
        np.testing.assert_array_equal(average["w"], alone.ema[0]["w"])
    assert together.ema[0]["w"] != together.ema[1]["w"]


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_of_a_batch_add_up_to_the_batch(slices):
    whole, step = make()
    sliced, sliced_step = make(grad_accumulation=slices)
    metrics = sliced_metrics = TrainMetrics.empty()
    images = jnp.arange(3 * BATCH * 4, dtype=jnp.uint8).reshape(3, BATCH, 2, 2, 1)
    for n in range(3):
        whole, metrics = step(whole, metrics, Batch(images[n]))
        sliced, sliced_metrics = sliced_step(sliced, sliced_metrics, Batch(images[n]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        (whole.params, whole.ema, whole.opt_state, metrics.compute()),
        (sliced.params, sliced.ema, sliced.opt_state, sliced_metrics.compute()),
    )


def test_a_non_finite_gradient_changes_nothing_but_step_and_counters():
    state, step = make()
    state, metrics = step(state, TrainMetrics.empty(), batch(100))
    after, metrics = step(state, metrics, batch(255))
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert (int(after.step), int(after.nonfinite_total), int(after.nonfinite_in_a_row)) == (2, 1, 1)
    assert np.isfinite(metrics.compute()["loss"])  # the mean is that of the finite steps


def test_a_finite_gradient_ends_the_row_and_keeps_the_total():
    state, step = make()
    counts, metrics = [], TrainMetrics.empty()
    for value in (255, 255, 9, 255):
        state, metrics = step(state, metrics, batch(value))
        counts.append((int(state.nonfinite_in_a_row), int(state.nonfinite_total)))
    assert counts == [(1, 1), (2, 2), (0, 2), (1, 3)]
    assert int(metrics.longest_row.compute()) == 2


def test_metrics_are_means_over_the_steps_since_they_were_emptied():
    state, step = make(rate=0.0)
    metrics, expected = TrainMetrics.empty(), []
    for n, value in enumerate((0, 51, 102)):
        expected.append(np.mean((0.5 - value / 255 - noise_of_step(n)) ** 2))
        state, metrics = step(state, metrics, batch(value))
    computed = metrics.compute()
    np.testing.assert_allclose(computed["loss"], np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(computed["deblur"], 0.75 * np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_non_finite_state_is_seen_wherever_it_is(monkeypatch, accelerator):
    if accelerator:
        monkeypatch.setattr(devices, "host_view", lambda array: array)
    state, _ = make()
    assert is_finite(state)
    bad = {"w": jnp.asarray(jnp.nan)}
    assert not is_finite(state.replace(params=bad))
    assert not is_finite(state.replace(ema=(bad,)))


@pytest.mark.parametrize("restored", [False, True], ids=["fresh", "restored"])
def test_the_state_is_donated_without_a_copy(tmp_path, restored):
    from warm_diffusion.training.checkpoints import Checkpoints

    state, step = make()
    step = jax.jit(step, donate_argnums=(0, 1))
    if restored:
        saved = Checkpoints(tmp_path)
        saved.save(state, {"mean": np.zeros(1)}, {})
        saved.close()
        reader = Checkpoints(tmp_path)
        state = reader.restore_latest(state)
        reader.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        # The first step may copy what was restored: on a CPU that can be memory of the host's.
        state, metrics = step(state, jax.jit(TrainMetrics.empty)(), batch(3))
        old = jax.tree.leaves((state.params, state.ema, state.opt_state))
        step(state, metrics, batch(3))
    assert all(leaf.is_deleted() for leaf in old)
