"""The processes of one run: who is there, whether they agree, and why one of them ended.

JAX's own runtime (`jax.distributed`) joins the devices. It does not say which process is missing,
and when one ends the others wait in a collective for ever or abort with a crash dump. So the
processes keep connections of their own beside JAX's (`cluster_group.py`).

A run of one process has no group; what is below then does nothing.
"""

import os
import pathlib
import re
import sys
import time

import jax

from warm_diffusion.runtime import storage
from warm_diffusion.runtime.cluster_group import Group, connect

# How errors of JAX's runtime begin, whatever the class: gloo's are ValueErrors.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|[A-Z]+_[A-Z_]+): ")
_group: Group | None = None


def join(
    address: str | None, count: int | None, index: int | None, *, seconds: float = 300.0
) -> None:
    """Joins the other processes of the run and starts JAX's runtime over them.

    Args:
      address: host:port of process 0.
      count: of processes.
      index: of this one, from 0.
      seconds: how long to wait for the others.

    What is None comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
    the cluster, where JAX knows it (TPU, Slurm, Open MPI, Kubernetes).

    Raises:
      ValueError: not known who and where the others are, or some did not come in time.
    """
    global _group
    # JAX's own detection, so that both connections are of the same processes. JAX has no public
    # name for it.
    from jax._src.clusters import ClusterEnv

    environment = os.environ
    address = address or environment.get("JAX_COORDINATOR_ADDRESS")
    given = [
        _number("JAX_NUM_PROCESSES") if count is None else count,
        _number("JAX_PROCESS_ID") if index is None else index,
    ]
    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        address, *given, None, None, int(seconds)
    )
    missing = [
        name
        for name, value in (
            ("--coordinator_address=HOST:PORT of process 0", address),
            ("--num_processes", count),
            ("--process_id", index),
        )
        if value is None
    ]
    if missing:
        raise ValueError(
            "this is no cluster that JAX knows (TPU, Slurm, Open MPI, Kubernetes), so the other "
            f"processes must be told: {', '.join(missing)} is missing"
        )
    if not 0 <= index < count:
        raise ValueError(f"--process_id must be 0 to {count - 1} (--num_processes), got {index}")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"--coordinator_address must be HOST:PORT, got {address!r}")
    group = connect(host, int(port), count, index, seconds)
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds),
    )
    _group = group


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return int(text)


def agree(**facts) -> None:
    """Waits for all processes and compares what they say.

    Raises:
      ValueError: in every process, with what differs and where.
    """
    if _group:
        _group.agree(facts)


def first_says(value):
    """The value of process 0 (JSON), in all processes."""
    return _group.agree({}, value) if _group else value


def check_shared(folder: pathlib.Path) -> None:
    """Raises ValueError unless what process 0 writes to a folder is there for all processes."""
    if not _group:
        return
    probe = folder / "probe-of-a-start.json"
    if _group.index == 0:
        storage.write_json(probe, time.time())
    agree()
    seen = storage.read_json(probe) if probe.exists() else None
    try:
        agree(**{f"what is in {probe} (--workdir must be one folder that all see)": seen})
    finally:
        if _group.index == 0:
            probe.unlink()


def unused_devices() -> str:
    """What to say where Slurm gives a node more GPUs than tasks, each of which takes one."""
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


def end(status: int, reason: str) -> None:
    """Says why and exits; the other processes end as well, with the same status."""
    if _group:
        _group.end(status, reason)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(status)


def leave() -> None:
    """Tells the others that this process has done its part."""
    if _group:
        _group.leave()


def caused_by_another(error: Exception) -> tuple[int, str] | None:
    """Status and reason of another process that ended, if that is what `error` came from.

    A collective fails in all processes when one has gone; JAX reports it by various exceptions.
    """
    if _group and (isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))):
        return _group.why_others_ended()
    return None
