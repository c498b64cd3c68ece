"""Meshes and batches: what does not fit the devices is refused with a size that would fit."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from warm_diffusion.runtime import devices


def test_slices_divide_the_images_that_a_device_holds():
    mesh = AbstractMesh((4,), ("data",))
    for slices in (1, 2, 3, 6):
        devices.check_slices(slices, 24, mesh)
    # 8 divides the batch of 24, but not the 6 images of a device: XLA would pad and gather
    for slices in (8, 4, 0, -1):
        with pytest.raises(ValueError, match=rf"expected one of 1, 2, 3, 6, got {slices}$"):
            devices.check_slices(slices, 24, mesh)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    devices.check_batch_size("training.batch_size", 15, AbstractMesh((3,), ("data",)))
    with pytest.raises(ValueError, match=r"batch_size is global, .* a multiple of 3 .*, got 16"):
        devices.check_batch_size("training.batch_size", 16, AbstractMesh((3,), ("data",)))


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_read_where_their_devices_are(axis):
    mesh, everything = devices.make_mesh(), np.arange(30.0).reshape(10, 3)
    rows = np.array([[7, 1, 4, 4, 0, 9, 2, 3]] * 8)
    rows = rows[0] if axis == 0 else rows
    read = devices.put_split(everything, mesh, axis, rows)
    assert read.sharding == devices.split(mesh, axis)
    np.testing.assert_array_equal(read, everything[rows])


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 64 * 8), (512, 512), (1000, 512), (100, 104), (3, 8)]
)
def test_a_batch_is_so_many_images_per_device_and_no_more_than_are_needed(count, expected):
    assert devices.global_batch(64, AbstractMesh((8,), ("data",)), count) == expected


def gradient_of_a_kernel(x, gradient):
    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return jax.vjp(convolve, jnp.zeros((3, 3, *x.shape[3:], *x.shape[3:])))[1](gradient)[0]


@pytest.fixture
def options(monkeypatch):
    """Those of `devices.jit`, found anew, without what this process's XLA_FLAGS say."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    devices.compiler_options.cache_clear()
    yield devices.compiler_options
    devices.compiler_options.cache_clear()


def test_on_a_cpu_no_library_convolves_and_numbers_are_the_same(options):
    x, gradient = jax.random.normal(jax.random.key(0), (2, 16, 16, 16, 64))
    ours, plain = (
        jit(gradient_of_a_kernel).lower(x, gradient).compile() for jit in (devices.jit, jax.jit)
    )
    np.testing.assert_allclose(ours(x, gradient), plain(x, gradient), rtol=1e-5, atol=1e-2)
    if "ynn_fusion" not in plain.as_text():
        pytest.skip("this XLA leaves no convolution to a library of itself")
    assert "ynn_fusion" not in ours.as_text()


def test_on_a_cpu_the_library_adds_up_over_positions(options):
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 64))
    total = devices.jit(lambda x: x.sum(axis=(1, 2))).lower(x).compile()
    np.testing.assert_allclose(total(x), np.asarray(x, float).sum((1, 2)), atol=1e-4)
    assert "ynn_fusion" in total.as_text()


def test_other_devices_have_no_options(monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda function, **given: given)
    for platform, once in itertools.product(("gpu", "tpu"), (False, True)):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        assert devices.jit(None, mesh, once=once) == {"compiler_options": None}


@pytest.mark.parametrize(
    ("disabled", "levels"), [(False, [0, 2]), (True, [None, None])], ids=["users", "tests"]
)
def test_what_runs_once_is_not_optimised_and_the_rest_below_llvms_last_level(
    options, monkeypatch, disabled, levels
):
    # Where JAX_DISABLE_MOST_OPTIMIZATIONS is set, it is JAX that chooses the level.
    assert options("cpu")
    monkeypatch.setattr(jax, "jit", lambda function, **given: given["compiler_options"])
    set_before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", disabled)
    try:
        found = [devices.jit(None, once=once) for once in (True, False)]
    finally:
        jax.config.update("jax_disable_most_optimizations", set_before)
    assert [given.get("xla_backend_optimization_level") for given in found] == levels
    assert all(given.items() >= options("cpu").items() for given in found)


def test_what_the_user_says_in_xla_flags_counts(options, monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
    )
    assert options("cpu") is None


def test_an_xla_without_the_option_compiles_without_it(options, monkeypatch):
    monkeypatch.setattr(devices, "_CPU_OPTIONS", {"xla_cpu_no_such_option": ""})
    x, gradient = jnp.ones((2, 1, 4, 4, 8))
    assert devices.jit(gradient_of_a_kernel)(x, gradient).shape == (3, 3, 8, 8)


def test_what_a_cpu_holds_is_seen_by_numpy_without_a_copy():
    array = jnp.arange(8.0)
    seen = devices.host_view(array)
    assert isinstance(seen, np.ndarray)
    assert seen.__array_interface__["data"][0] == array.unsafe_buffer_pointer()
