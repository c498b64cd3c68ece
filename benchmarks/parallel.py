"""What several devices, several processes and an object store cost a training on this machine.

`main.py` trains the digits network, each way in turn, in rounds, so that a busy machine slows all
alike; an interval's time per step is `batch_size / images_per_second` of the run's own report, the
first interval left out. The batch is the same global one everywhere. Forced CPU devices share the
machine's cores: what is measured is overhead, not a gain.

    python -m benchmarks.parallel --rounds=3

    one             one process, one device
    eight           one process, eight forced CPU devices
    eight_fsdp      the same, weights and optimizer split over them
    two_devices     one process, two devices: what two processes are compared with
    two_processes   two processes, one device each (gloo over localhost)
    gs              one process, one device, its workdir on a local Google Cloud Storage server
                    (of the `dev` extra); the whole run's seconds are compared with `one`'s
"""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from tests import object_store
from warm_diffusion.runtime import storage

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = ("one", "eight", "eight_fsdp", "two_devices", "two_processes", "gs")
AGAINST = {"eight": "one", "eight_fsdp": "one", "two_processes": "two_devices", "gs": "one"}


def flags_of(way: str, steps: int) -> list[list[str]]:
    """The flags of each process."""
    shared = [
        f"--config={ROOT / 'configs/digits.py'}",
        f"--config.training.num_steps={steps}",
        f"--config.training.log_every={steps // 5}",
        f"--config.training.checkpoint_every={steps // 2}",
        "--config.training.sample_every=0",
    ]
    if way == "eight_fsdp":
        return [[*shared, "--config.training.sharding=fsdp"]]
    if way != "two_processes":
        return [shared]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{probe.getsockname()[1]}"
    return [[*shared, address, "--num_processes=2", f"--process_id={i}"] for i in range(2)]


def train(way: str, steps: int, cache: str) -> tuple[float, float]:
    """Median seconds per step and seconds of the whole run."""
    count = {"eight": 8, "eight_fsdp": 8, "two_devices": 2}.get(way, 1)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workdir = f"{folder}/run"
        if way == "gs":
            server = object_store.environment(stack.enter_context(object_store.serving()))
            os.environ |= server  # for the metrics that are read below
            environment |= server
            workdir = "gs://bucket/run"
        commands = [
            [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *flags]
            for flags in flags_of(way, steps)
        ]
        begin = time.perf_counter()
        runs = [
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True,
            )
            for command in commands
        ]  # fmt: skip
        errors = [run.communicate()[1] for run in runs]
        elapsed = time.perf_counter() - begin
        if any(run.returncode for run in runs):
            raise RuntimeError(f"{way} failed:\n" + "\n".join(errors))
        lines = storage.path(f"{workdir}/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return statistics.median(128 / row["images_per_second"] for row in rows[1:]), elapsed


def main() -> None:
    """Prints a line per training and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    step, whole = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        for way in options.ways:  # fills the cache of compiled programs
            train(way, 5, cache)
        for _ in range(options.rounds):
            for way in options.ways:
                seconds, elapsed = train(way, options.steps, cache)
                step.setdefault(way, []).append(seconds)
                whole.setdefault(way, []).append(elapsed)
                print(f"{way:14} {seconds:.4f} s per step, {elapsed:.1f} s in all", flush=True)
    report = {"cores": os.cpu_count(), "rounds": options.rounds, "steps": options.steps}
    for way in options.ways:
        report[way] = {
            "seconds_per_step": statistics.median(step[way]),
            "seconds": statistics.median(whole[way]),
        }
        other = AGAINST.get(way)
        if other in step:
            for name, values in (("step", step), ("whole", whole)):
                pairs = zip(values[way], values[other], strict=True)
                ratio = statistics.median(mine / theirs for mine, theirs in pairs)
                report[way][f"{name}_against_{other}"] = ratio
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
