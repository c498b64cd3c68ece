"""Meshes and batches: what does not fit the devices is refused, and how it would fit is said."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from warm_diffusion import devices


def test_slices_divide_the_images_that_a_device_holds():
    mesh = AbstractMesh((4,), ("data",))
    for slices in (1, 2, 3, 6):
        devices.check_slices(slices, 24, mesh)
    # 8 divides the batch of 24, but not the 6 images of a device: XLA would pad and gather
    for slices in (8, 4, 0, -1):
        with pytest.raises(ValueError, match=rf"expected one of 1, 2, 3, 6, got {slices}$"):
            devices.check_slices(slices, 24, mesh)


def mesh_of(processes):
    owners = [SimpleNamespace(process_index=index) for index in processes]
    return SimpleNamespace(devices=np.array(owners))


@pytest.mark.parametrize(("own", "expected"), [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])])
def test_each_process_holds_a_consecutive_part(monkeypatch, own, expected):
    monkeypatch.setattr(jax, "process_index", lambda: own)
    part = devices.process_slice(np.arange(8), mesh_of([0, 0, 1, 1]))
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("processes", [[0, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1]])
def test_a_mesh_that_mixes_processes_is_refused(processes):
    with pytest.raises(ValueError, match="one process after the other"):
        devices.process_slice(np.arange(12), mesh_of(processes))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 64 * 8), (512, 512), (1000, 512), (100, 104), (3, 8)]
)
def test_a_batch_is_so_many_images_per_device_and_no_more_than_are_needed(count, expected):
    assert devices.global_batch(64, AbstractMesh((8,), ("data",)), count) == expected
