"""The order of images: a pure function of (seed, step) that visits every image once an epoch."""

import jax
import numpy as np
import pytest

from warm_diffusion.data import batch_indices, stream


def run(seed, first_step, last_step, batch_size, count):
    steps = range(first_step, last_step)
    return np.concatenate([batch_indices(seed, step, batch_size, count) for step in steps])


@pytest.mark.parametrize(("batch_size", "count"), [(5, 12), (12, 12), (30, 12)])
def test_every_epoch_visits_every_image_once(batch_size, count):
    order = run(0, 0, count, batch_size, count)  # batch_size whole epochs
    for epoch in order.reshape(-1, count):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_epochs_and_seeds_have_different_orders():
    first, second = run(0, 0, 2, 100, 100).reshape(2, 100)
    assert np.sum(first == second) < 15  # one fixed point is expected of a random permutation
    assert np.sum(first == run(1, 0, 1, 100, 100)) < 15


def test_starting_in_the_middle_continues_the_same_order():
    np.testing.assert_array_equal(run(3, 0, 20, 8, 50)[72:], run(3, 9, 20, 8, 50))


def test_the_batch_size_cuts_one_and_the_same_order():
    np.testing.assert_array_equal(run(3, 0, 20, 8, 50), run(3, 0, 10, 16, 50))


def test_without_a_cpu_backend_the_order_is_the_same(monkeypatch):
    # As under JAX_PLATFORMS=cuda or tpu: asking JAX for its CPU devices raises.
    expected, devices = batch_indices(5, 0, 12, 12), jax.local_devices()

    def accelerator_alone(backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return devices

    monkeypatch.setattr(jax, "local_devices", accelerator_alone)
    stream._permutation.cache_clear()
    np.testing.assert_array_equal(batch_indices(5, 0, 12, 12), expected)


def test_the_order_is_uniform():
    # the place of image 0 over 400 epochs of 4 images: each place 100 +- 5 standard errors
    epochs = run(0, 0, 400, 4, 4).reshape(400, 4)
    places = np.bincount(np.argmax(epochs == 0, axis=1), minlength=4)
    assert np.all(np.abs(places - 100) < 5 * np.sqrt(400 * 0.25 * 0.75))


def test_empty_batches_and_data_are_refused():
    with pytest.raises(ValueError, match="must be positive, got 0, 5"):
        batch_indices(0, 0, 0, 5)
    with pytest.raises(ValueError, match="must be positive, got 3, 0"):
        batch_indices(0, 0, 3, 0)
