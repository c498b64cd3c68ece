"""Killed at random moments, again and again, a run ends as one never killed (docs/reliability.md).

python -m pytest -m long tests/proofs -s
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.app.conftest import REPOSITORY, TINY, free_port

STEPS, GRIDS = 400, "--config.training.sample_every=100"
TEN = ("--config.training.checkpoint_every=10", "--config.training.log_every=10")


def start(folder, workdir, steps, *more):
    """With XLA's optimisations, which the rest of the suite leaves out to be quick."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, str(REPOSITORY / "main.py"), *TINY, f"--workdir={workdir}"]
    flags = (f"--config.training.num_steps={steps}", *TEN, *more)
    return subprocess.Popen(
        [*command, *flags], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end_of(workdir, steps):
    """Checksum of the last state, and the reported numbers."""
    about = workdir / "checkpoints" / str(steps) / "about" / "metadata"
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    rows = [
        {k: v for k, v in row.items() if k not in ("images_per_second", "input_wait")}
        for row in lines
    ]
    return json.loads(about.read_text())["digests"], rows


def uninterrupted(folder, steps, *more):
    process = start(folder, folder / "straight", steps, *more)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    return end_of(folder / "straight", steps)


def random_delay(chance):
    """Seconds: often while it starts, compiles or saves, sometimes in the middle of training."""
    return chance.choice((chance.uniform(0.5, 6), chance.uniform(4, 12), chance.uniform(8, 25)))


@pytest.mark.long
@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS", "20"))])
def test_one_process(tmp_path, kills):
    expected = uninterrupted(tmp_path, STEPS, GRIDS)
    workdir, chance, killed, starts = tmp_path / "killed", random.Random(0), 0, 0
    while True:
        process = start(tmp_path, workdir, STEPS, GRIDS)
        starts += 1
        if killed < kills:
            try:
                process.communicate(timeout=random_delay(chance))
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
        out, err = process.communicate(timeout=1200)
        assert process.returncode in (0, -signal.SIGKILL), out + err
        if process.returncode == 0:
            if killed >= kills:
                break
            # It came to its end between two kills: from the start again, so that all are tried.
            assert end_of(workdir, STEPS) == expected
            workdir = tmp_path / f"killed{starts}"
    print(f"\n{killed} kills in {starts} starts, {len(list(tmp_path.glob('killed*')))} runs")
    assert end_of(workdir, STEPS) == expected


@pytest.mark.long
@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS_OF_TWO", "10"))])
def test_two_processes(tmp_path, kills):
    def both(workdir):
        cluster = (GRIDS, f"--coordinator_address=localhost:{free_port()}", "--num_processes=2")
        return [start(tmp_path, workdir, STEPS, *cluster, f"--process_id={i}") for i in range(2)]

    def finished(processes):
        for process in processes:
            process.communicate(timeout=1200)
        return [process.returncode for process in processes]

    assert finished(both(tmp_path / "straight")) == [0, 0]
    expected = end_of(tmp_path / "straight", STEPS)
    chance, killed, workdir, runs, busy = random.Random(1), 0, tmp_path / "killed0", 1, 0
    while True:
        processes = both(workdir)
        if killed < kills:
            time.sleep(random_delay(chance) + 3)
            victim = chance.choice(processes)
            if victim.poll() is None:
                victim.kill()
                killed += 1
        statuses = finished(processes)
        if statuses == [0, 0]:
            assert end_of(workdir, STEPS) == expected
            if killed >= kills:
                break
            workdir, runs = tmp_path / f"killed{runs}", runs + 1
        else:
            # JAX aborts a process whose peer is gone, if it is not quicker to end by itself.
            assert set(statuses) <= {-signal.SIGKILL, -signal.SIGABRT, 75, 0}, statuses
            busy += -signal.SIGABRT in statuses
    print(f"\n{killed} kills of one of two, {runs} runs, {busy} ends by JAX's abort")
