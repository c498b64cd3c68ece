"""Shared settings: JAX on the CPU, no silent rank promotion, float64 where a test asks for it."""

import getpass
import os
import tempfile
from pathlib import Path

# Nearly all of the suite's time is compilation, so XLA leaves its costliest passes out, here and in
# the processes that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# The same holds for the platform: with libtpu installed, JAX would look for a TPU, loudly.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
# An [H, W] factor that meets [B, H, W, C] images must fail here, not broadcast along a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A second run takes compiled programs from this cache. Its keys are programs and versions: changed
# code never meets an old result.
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    _CACHE = Path(tempfile.gettempdir()) / f"warm_diffusion_tests_{getpass.getuser()}"
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
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
