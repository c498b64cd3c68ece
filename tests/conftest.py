"""Shared settings: JAX on the CPU, no silent rank promotion, float64 where a test asks for it."""

import getpass
import os
import tempfile
import uuid
import zlib
from pathlib import Path

# Nearly all of the suite's time is compilation, so XLA leaves its costliest passes out, here and in
# the processes that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# The same holds for the platform: with libtpu installed, JAX would look for a TPU, loudly.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from tests import object_store
from warm_diffusion.runtime import storage

jax.config.update("jax_platforms", "cpu")
# An [H, W] factor that meets [B, H, W, C] images must fail here, not broadcast along a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A second run takes compiled programs from this cache, however small. Its keys are programs
# and versions: changed code never meets an old result. Processes that tests start share it.
_CACHE = Path(tempfile.gettempdir()) / f"warm_diffusion_tests_{getpass.getuser()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def x64():
    """Double precision for one test; a module opts in by `pytest.mark.usefixtures("x64")`."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of data sets and golden arrays beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder beside the repository ({folder}): not there")
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A safetensors file of random weights that keep activations near 1 through all layers."""
    import safetensors.numpy

    from warm_diffusion.evaluation import inception

    arrays = {}
    for name, shape in inception.array_shapes().items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("conv.weight"):
            array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            array = np.ones(shape) if name.endswith(("weight", "var")) else np.zeros(shape)
        arrays[name] = array.astype(np.float32)
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    return path


@pytest.fixture(scope="session")
def store():
    """The URL of an object store whose `gs://bucket` this process reads and writes."""
    with object_store.serving() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment(url).items():
            patch.setenv(name, value)
        yield url


@pytest.fixture
def faulty_store(store, monkeypatch):
    """A proxy before the object store, by which this test reads and writes `gs://bucket`."""
    storage.path("gs://bucket")  # which is asked once
    with object_store.before(store) as proxy:
        for name, value in object_store.environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path):
    """A folder that is not there yet: on disk, and on gs://."""
    if request.param == "local":
        return tmp_path / "place"
    request.getfixturevalue("store")
    return storage.path(f"gs://bucket/{uuid.uuid4().hex}")


# The longest files, longest first: a worker that takes one last is waited for by the others.
_LONGEST = (
    "app/test_train.py",
    "app/test_processes.py",
    "app/test_export.py",
    "test_tutorial.py",
    "app/test_build.py",
    "app/test_reliability.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        found = [
            n for n, name in enumerate(_LONGEST) if item.nodeid.partition("::")[0].endswith(name)
        ]
        return found[0] if found else len(_LONGEST)

    items.sort(key=place)
