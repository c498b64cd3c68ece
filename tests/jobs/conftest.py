"""Running main.py as people do, on a network that compiles in seconds."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TINY = (
    "--config.model.model_channels=8",
    "--config.model.channel_mult=1,",
    "--config.model.attention_resolutions=8,",
    "--config.training.batch_size=16",
    "--config.training.sample_every=0",
    "--config.training.log_every=1",
    "--config.training.ema_halflife_images=100,",
    "--config.optimizer.warmup_images=100",
    "--config.sampling.num_steps=2",
    "--config.sampling.batch_size=8",
)


class App:
    """Starts `python main.py` with tiny settings and caches of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, *arguments, tiny=True, before=(), environment=()):
        command = [sys.executable, *(before or (str(REPOSITORY / "main.py"),))]
        return subprocess.Popen(
            [*command, *(TINY if tiny else ()), *map(str, arguments)],
            env={**self.environment, **dict(environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, status=0, **options):
        """Runs to the end; returns (stdout, stderr) after checking the exit status."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        return out, err


def wait_for(condition, process, seconds=240):
    """Polls until `condition()`; fails if the process ends before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    return App(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="session")
def trained(app):
    """A workdir with 6 tiny steps of training, and what the run printed."""
    workdir = app.folder / "trained"
    out, err = app.run(
        f"--workdir={workdir}",
        "--config.training.num_steps=6",
        "--config.training.checkpoint_every=3",
        "--config.training.sample_every=6",
    )
    return workdir, out, err
