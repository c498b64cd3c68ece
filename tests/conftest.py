"""Shared settings: JAX on the CPU, no silent rank promotion, float64 where a test asks for it."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
# An [H, W] factor that meets [B, H, W, C] images must fail here, not broadcast along a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")


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
