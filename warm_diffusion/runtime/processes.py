"""The processes of one run, over JAX's own runtime: they join, agree, and end together.

A process that vanishes shows in the others as a failed collective, or JAX aborts them when its
heartbeat has been missing for half a minute. A run of one process does none of this.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from warm_diffusion.runtime import storage

_HEARTBEAT_SECONDS = 30  # a process that has been silent for so long is lost
_SHUTDOWN_SECONDS = 86_400  # process 0 may still evaluate when the others are done
_LEAVING_SECONDS = 5.0  # for the others, to end for the same reason
_BLOCK = 4096  # bytes; messages are padded to multiples, so that few programs are compiled
_LOST = 75  # as after a signal: the same command continues from the last checkpoint
# How JAX's runtime reports, in various classes, that a collective or its coordinator has failed.
_OF_THE_OTHERS = re.compile(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
    ".*(gloo|connection|coordination|heartbeat|peer|remote|task)",
    re.IGNORECASE | re.DOTALL,
)


_waited_in_vain = threading.Event()
_address = ""  # of process 0, in messages, where the user gave it


def join(
    address: str | None, count: int | None, index: int | None, *, seconds: float = 300.0
) -> None:
    """Joins the other processes of the run; all devices are one system then.

    Process 0 is at `address`, host:port; this one is `index` of `count`, from 0. What is None comes
    from the cluster, where JAX knows it (TPU, Slurm, Open MPI, Kubernetes).

    Raises:
      ValueError: it is not known who and where the others are, or some did not come in time.
    """
    if address is not None and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise ValueError(f"--coordinator_address must be HOST:PORT, got {address!r}")
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(f"--process_id must be 0 to {count - 1} (--num_processes), got {index}")
    global _address
    _address = f" at {address}" if address else ""
    errors: list[Exception] = []

    def connect():
        try:
            jax.distributed.initialize(
                address, count, index,
                initialization_timeout=int(seconds) + 600,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )  # fmt: skip
        except Exception as error:
            errors.append(error)

    # In a thread, because JAX ends a process whose waiting timed out with a crash dump.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _waited_in_vain.set()
        raise ValueError(
            f"not all processes of the run{_address} joined within {seconds:g} s: start each with "
            "its own --process_id and process 0's --coordinator_address, and open that port"
        )
    if errors:
        raise ValueError(
            f"the processes cannot join ({errors[0]}); where JAX does not know the cluster (TPU, "
            "Slurm, Open MPI, Kubernetes), --coordinator_address=HOST:PORT of process 0, "
            "--num_processes and --process_id must be given"
        ) from errors[0]
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected equally many devices in each process, got {dict(counts)}")
    # XLA for CPUs waits only 30 s where a group of devices meets for the first time, and without
    # limit later: they meet here, before one process can be late because it compiles or reads.
    with _without_stdout():
        _meet()


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Hides what C++ prints there: Gloo, a line whenever devices meet."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _meet() -> None:
    agree()
    devices = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    own = np.zeros(jax.local_device_count(), np.float32)
    sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("all"))
    everywhere = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
    total = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    total(jax.make_array_from_process_local_data(sharding, own)).block_until_ready()


def agree(**facts) -> None:
    """Waits for all processes and compares what they say (JSON).

    Raises:
      ValueError: in every process, with what differs from process 0.
    """
    if jax.process_count() == 1:
        return
    first, *others = _exchange(facts)
    for process, other in enumerate(others, 1):
        differences = [
            f"{name} is {other.get(name)!r}, not {first.get(name)!r}"
            for name in sorted(first.keys() | other.keys())
            if other.get(name) != first.get(name)
        ]
        if differences:
            raise ValueError(f"process {process} differs from process 0: {'; '.join(differences)}")


def first_says(value):
    """The value of process 0 (JSON), in all processes."""
    return value if jax.process_count() == 1 else _exchange(value)[0]


def _exchange(value) -> list:
    """The value of each process, in all processes."""
    text = json.dumps(value).encode()
    longest = multihost_utils.process_allgather(np.int32(len(text))).max()
    padded = text.ljust(-(-int(longest) // _BLOCK) * _BLOCK)
    everything = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [json.loads(row.tobytes()) for row in everything]


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError unless all processes see what process 0 writes to a folder."""
    if jax.process_count() == 1:
        return
    probe = folder / "probe-of-a-start.json"
    storage.write_json(probe, time.time())
    agree()
    seen = storage.read_json(probe) if probe.exists() else None
    try:
        agree(**{f"what is in {probe} (--workdir must be one folder that all see)": seen})
    finally:
        storage.remove(probe)


def explain(error: Exception) -> tuple[int, str] | None:
    """Exit status and words for an error that the end of another process causes; None for others.

    JAX reports it by various exceptions, Gloo's are ValueErrors.
    """
    if not (jax.distributed.is_initialized() and _OF_THE_OTHERS.match(str(error))):
        return None
    # JAX's own words name addresses that no user has given: --debug shows them.
    return _LOST, (
        f"another process of the run{_address} ended or was lost: see its last line; if it was "
        "stopped or lost, the same command in all processes continues from the last checkpoint"
    )


def exit(status: int, at_once: bool = False) -> None:
    """Ends this process after an error, and with it the run; `at_once` waits for no thread.

    By `sys.exit` alone it would wait for the others, which may wait for it in a collective.
    """
    if not jax.distributed.is_initialized() and not at_once:
        sys.exit(status)

    def leave():
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # waits for the others, if all end for the same reason

    if not _waited_in_vain.is_set():  # nobody would be there, and JAX would report that at length
        thread = threading.Thread(target=leave, daemon=True)
        thread.start()
        thread.join(_LEAVING_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def unused_devices() -> str:
    """Returns a warning if Slurm gives a node more GPUs than tasks, each of which takes one."""
    gpus, tasks = (
        os.environ.get(f"SLURM_{name}", "").partition("(")[0]
        for name in ("GPUS_ON_NODE", "TASKS_PER_NODE")
    )
    if not (gpus.isdigit() and tasks.isdigit()) or int(tasks) >= int(gpus):
        return ""
    return (
        f"this node has {gpus} GPUs and {tasks} Slurm tasks, and JAX takes one GPU per task: start "
        f"one task per GPU (--ntasks-per-node={gpus})"
    )
