"""What several processes agree on, and what joins them; tests/app/test_processes.py starts two."""

import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.app.conftest import free_port
from warm_diffusion.runtime import processes


@pytest.fixture
def others_say(monkeypatch):
    """Imitates other processes that send these bytes."""

    def say(*told):
        monkeypatch.setattr(jax, "process_count", lambda: 1 + len(told))

        def gather(own):
            if own.ndim == 0:
                return np.array([own, *map(len, told)])
            rows = [np.frombuffer(text.ljust(len(own)), np.uint8) for text in told]
            return np.stack([own, *rows])

        monkeypatch.setattr(multihost_utils, "process_allgather", gather)

    return say


def test_processes_that_say_the_same_agree(others_say):
    others_say(b'{"a": 1, "b": [1, 2]}')
    processes.agree(b=(1, 2), a=1)


def test_what_differs_is_named(others_say):
    others_say(b'{"seed": 1, "jax": "x"}', b'{"seed": 2, "jax": "x"}')
    with pytest.raises(ValueError, match=r"^process 2 differs from process 0: seed is 2, not 1$"):
        processes.agree(seed=1, jax="x")


def test_messages_longer_than_a_block_arrive_whole(others_say):
    text = "x" * 3 * processes._BLOCK
    others_say(b'"y"')
    assert processes.first_says(text) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "must be HOST:PORT, got 'localhost'"),
        (("localhost:x", 2, 0), "must be HOST:PORT"),
        (("localhost:1234", 2, 2), "--process_id must be 0 to 1"),
    ],
)
def test_an_address_or_number_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*arguments)


def start(program, **options):
    return subprocess.Popen([sys.executable, "-c", program], text=True, **options)


ALONE = """
import sys
from warm_diffusion.runtime import processes
try:
    processes.join("localhost:{port}", 2, {index}, seconds=2)
except ValueError as error:
    print(error, file=sys.stderr)
    processes.exit(2)
"""


def test_a_process_that_waits_too_long_ends_with_one_line():
    programs = [ALONE.format(port=free_port(), index=index) for index in range(2)]
    for process in [start(program, stderr=subprocess.PIPE) for program in programs]:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert re.match(r"not all processes of the run at localhost:\d+ joined within 2 s", err)
        assert err.count("\n") == 1


ENDS = """
import os, signal, sys
from warm_diffusion.runtime import processes
processes._HEARTBEAT_SECONDS, processes._LEAVING_SECONDS = 8, 1
processes.join("localhost:{port}", 2, {index})
if {index}:
    {end}
try:
    processes.agree()
except Exception as error:
    status, told = processes.explain(error)
    print(told)
    processes.exit(status)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("processes.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)],
    ids=["error", "killed"],
)
def test_where_one_process_ends_too_early_the_others_end_too(end, status):
    """By the error of a collective, or at the latest aborted by JAX after the heartbeat's limit."""
    port = free_port()
    programs = [ENDS.format(port=port, index=index, end=end) for index in range(2)]
    first, second = (start(program, stdout=subprocess.PIPE) for program in programs)
    out, _ = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert second.returncode == status
    assert first.returncode in (75, -signal.SIGABRT)
    told = f"another process of the run at localhost:{port} ended or was lost: see"
    assert first.returncode != 75 or out.startswith(told)


LATE = """
import sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from warm_diffusion.runtime import processes
processes.join("localhost:{port}", 2, {index}, seconds=60)
time.sleep({index} * 35)  # more than the 30 s for which XLA waits at a first meeting
mesh = Mesh(np.array(jax.devices()), ("data",))
ones = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec("data")), np.ones(jax.local_device_count(), np.float32))
total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
print(f"total {{float(total)}}")
"""


@pytest.mark.long
def test_a_process_may_be_late_for_the_first_step():
    port = free_port()
    two = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        start(LATE.format(port=port, index=index), env=two, stdout=subprocess.PIPE)
        for index in range(2)
    ]
    for process in started:
        assert "total 4.0" in process.communicate(timeout=150)[0]


def test_without_a_cluster_what_must_be_given_is_named(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"division by zero\).*--num_processes and --process_id"):
        processes.join(None, None, None)


def test_an_error_of_one_process_alone_is_its_own():
    assert processes.explain(ValueError("UNKNOWN: Gloo AllGather failed")) is None


def test_gpus_that_no_slurm_task_takes_are_reported(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    assert "start one task per GPU (--ntasks-per-node=8)" in processes.unused_devices()
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x2)")
    assert processes.unused_devices() == ""
