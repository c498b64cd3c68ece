"""Running main.py as people do, on a network that compiles in seconds.

In this process where that tests the same, for a start costs seconds; in one of its own where the
process is what is tested: signals, kills, devices, several processes, what is imported.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags, logging

import main
from warm_diffusion.app import build, settings
from warm_diffusion.runtime import storage

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TINY = (
    "--config.model.model_channels=8",
    "--config.model.channel_mult=1,",
    "--config.model.attention_resolutions=()",
    "--config.training.batch_size=16",
    "--config.training.sample_every=0",
    "--config.training.log_every=1",
    "--config.training.ema_halflife_images=100,",
    "--config.optimizer.warmup_images=100",
    "--config.sampling.num_steps=2",
    "--config.sampling.batch_size=8",
)


class Programs:
    """Jitted functions of `build` kept between runs in this process: tracing is most of a run.

    The key is all that they are made of: runs share one where a second start would make the same.
    """

    def __init__(self):
        self._made = {}

    def keep(self, patch):
        for name in ("initial_state", "train_step", "sampler"):
            patch.setattr(build, name, self._kept(getattr(build, name)))

    def _kept(self, make):
        def made(config, built, mesh, **options):
            told, statistics = settings.plain(config), built.statistics or ()
            key = (
                make.__name__, repr(built.network), str(built.description), mesh,
                str([told[section] for section in _MADE_OF]), build.step_options(config),
                *(np.asarray(array).tobytes() for array in statistics), *sorted(options.items()),
            )  # fmt: skip
            if key not in self._made:
                self._made[key] = make(config, built, mesh, **options)
            return self._made[key]

        return made


_MADE_OF = ("seed", "denoiser", "augment", "loss", "optimizer", "sampling")


class App:
    """Starts `python main.py` with tiny settings and caches of its own."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self._programs, self._started = folder, Programs(), []
        self.environment = {
            "JAX_PLATFORMS": "cpu",
            # that of the tests in this process: many are of the same programs
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, *arguments, tiny=True, before=(), environment=()):
        command = [sys.executable, *(before or (str(REPOSITORY / "main.py"),))]
        # JAX has set the level of XLA's logs in this process; main.py would keep to it.
        mine = {k: value for k, value in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        process = subprocess.Popen(
            [*command, *(TINY if tiny else ()), *map(str, arguments)],
            env={**mine, **self.environment, **dict(environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def end(self):
        """Kills what a test has started and not waited for."""
        for process in self._started:
            process.kill()
            process.communicate()
        self._started.clear()

    def run(self, *arguments, status=0, tiny=True, process=False, **options):
        """Runs to the end; returns (stdout, stderr) after checking the exit status."""
        if process or options:
            started = self.start(*arguments, tiny=tiny, **options)
            out, err = started.communicate(timeout=300)
            found = started.returncode
        else:
            found, out, err = self._run_here([*(TINY if tiny else ()), *map(str, arguments)])
        assert found == status, f"exit status {found}\n{out}\n{err}"
        return out, err

    def _run_here(self, arguments):
        argv = [str(REPOSITORY / "main.py"), *arguments]
        out, err, status = io.StringIO(), io.StringIO(), 0
        own = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
        with pytest.MonkeyPatch.context() as patch, _fresh_flags():
            patch.setattr(sys, "argv", argv)  # ml_collections looks there
            self._programs.keep(patch)
            for name in own:
                patch.setenv(name, self.environment[name])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main.main(main.parse(argv))
                except SystemExit as end:
                    status = end.code or 0
        return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _fresh_flags():
    """main.py's flags as a new process has them, before and after."""
    verbosity = logging.get_verbosity()

    def reset():
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        for module_flags in flags.FLAGS.flags_by_module_dict().values():
            for flag in module_flags:
                flag.unparse()

    reset()
    try:
        yield
    finally:
        reset()
        logging.set_verbosity(verbosity)


def wait_for(condition, process, seconds=240):
    """Polls until `condition()`; fails if the process ends before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def rows(workdir):
    """Reported numbers by step, without those that measure time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "input_wait")}
        for line in lines
    ]


def final_arrays(workdir, step=8):
    """All arrays of a checkpoint (weights, averages, optimizer), read by orbax alone."""
    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        leaves = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        state = reader.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_run(one, other, step=8):
    """Bit for bit."""
    assert rows(one) == rows(other)
    first, second = final_arrays(one, step), final_arrays(other, step)
    assert first.keys() == second.keys()
    assert any("ema" in name for name in first)
    assert any("opt_state" in name for name in first)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def assert_same_but_for_round_off(one, other, steps=range(1, 9)):
    """The losses of these steps, and the end: other devices add up a batch in another order."""
    expected, found = (
        [row["loss"] for row in rows(place) if row["step"] in steps] for place in (one, other)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    expected, found = final_arrays(one), final_arrays(other)
    for name in (name for name in expected if "params" in name or "ema" in name):
        # Adam divides by the root of the squared gradient: tiny gradients turn round-off into
        # a difference of up to the learning rate (2e-3 after warm-up, here 1.3e-3 in all).
        np.testing.assert_allclose(found[name], expected[name], atol=5e-4, err_msg=name)


def copy(folder, url):
    """A local folder at a place on gs://, as a user would copy a run there."""
    place = storage.path(url)
    files = [path for path in folder.rglob("*") if path.is_file()]
    storage.write_files({place / str(p.relative_to(folder)): p.read_bytes() for p in files})
    return place


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    return App(tmp_path_factory.mktemp("app"))


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(app):
    yield
    app.end()


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


STEPS = ("--config.training.num_steps=8", "--config.training.checkpoint_every=4")


@pytest.fixture(scope="session")
def uninterrupted(app):
    """The workdir of a tiny run of 8 steps, with a checkpoint in the middle."""
    workdir = app.folder / "uninterrupted"
    app.run(f"--workdir={workdir}", *STEPS)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A workdir of 6 steps with checkpoints at 3 and 6, to do harm to."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"
