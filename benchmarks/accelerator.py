"""All that a new accelerator should be asked, in one command of less than ten minutes.

    python -m benchmarks.accelerator --out=h100 [--edm=PATH]

writes h100.json and h100.txt, a table, after every part, so that what is cut off loses the part
under way alone. Each part (`accelerator_parts.py`) is a process of its own: one that fails or ends
by running out of memory is recorded with its error, and the rest goes on; peaks of memory are a
part's own. The most wanted come first; what --seconds leaves no time for is named.

    numbers     DCT against float64; bfloat16 and default precision against full float32; the same
                samples from the same seeds
    training    the paper's CIFAR-10 network by batch and type, FFHQ's at 64x64: images/s,
                utilisation of the chip's peak, memory, compile time (the parts share a new folder
                of compiled programs, so `profile`, which runs the first's once more, tells how long
                it takes when it is kept); the slowest operations of a step
    the rest    sampler at 18 and 35 network calls, Inception features, what a checkpoint keeps
                training waiting
    EDM         with a checkout of NVlabs/edm and PyTorch: its own step and sampler in turns with
                ours, and the ratios

`--tiny` runs the same with networks of some thousand weights, to try the script on a CPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

_SLOWEST = 5  # operations of a profile in the table; the JSON file has more
_LEAST_SECONDS = 15.0  # a part that has less is not begun


def make_setting(tiny: bool, edm: str):
    """What is measured; `tiny` on a CPU to try."""
    from benchmarks import accelerator_parts, train_step
    from configs import cifar10, ffhq64

    big = {"cifar10": cifar10.get_config(), "ffhq64": ffhq64.get_config()}
    big["numerics"] = cifar10.get_config("small")
    if not tiny:
        return accelerator_parts.Setting(**big, edm=edm)
    changes = {
        "model__model_channels": 8, "model__channel_mult": (1,), "model__num_blocks": 1,
        "model__attention_resolutions": (), "data__resolution": 8, "training__batch_size": 4,
        "augment__transforms": (),
    }  # fmt: skip
    small = {k: train_step.variant(config, **changes) for k, config in big.items()}
    model = pathlib.Path(__file__).resolve().parent.parent / "pretrained" / "digits"
    return accelerator_parts.Setting(
        **small, batches=(8, 4), drawn=4, rounds=3, model=model, edm=edm
    )


def measure(
    names: Iterable[str],
    run: Callable[[str, float], dict],
    report: Callable[[str, dict], None],
    seconds: float,
) -> dict[str, dict]:
    """Runs parts until the time is up, whatever becomes of one.

    Args:
      names: of the parts.
      run: (name, seconds left) -> figures.
      report: told of every part as it ends.
      seconds: for all.

    Returns:
      By name the figures, or {"error": what happened}, with the seconds of the part.
    """
    end, found = time.monotonic() + seconds, {}
    for name in names:
        began = time.monotonic()
        try:
            if end - began < min(_LEAST_SECONDS, seconds):
                raise TimeoutError("not begun: no time left")
            figures = run(name, end - began)
        except Exception as error:  # whatever it is, the rest goes on
            figures = {"error": f"{type(error).__name__}: {error}"}
        found[name] = {**figures, "part_seconds": round(time.monotonic() - began, 1)}
        report(name, found[name])
    return found


def in_a_process(flags: list[str], environment: dict) -> Callable[[str, float], dict]:
    """Runs a part by this script's --part."""

    def run(name: str, seconds: float) -> dict:
        command = [sys.executable, "-m", "benchmarks.accelerator", f"--part={name}", *flags]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"stopped after {seconds:.0f} s, at the end of --seconds") from error
        if done.returncode:
            told = [line for line in done.stderr.strip().splitlines() if line.strip()]
            raise RuntimeError(
                f"exit status {done.returncode}: {(told or ['no message'])[-1][:500]}"
            )
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


def line(name: str, figures: dict) -> str:
    """A part as a line of the table."""
    if "error" in figures:
        return f"{name:<26} {figures['error']}"
    told = []
    for key, value in figures.items():
        if key == "slowest":
            told += [
                f"\n{'':<26} {row['milliseconds']:.3g} ms {row['name'][:90]}"
                for row in value[:_SLOWEST]
            ]
        elif isinstance(value, dict):
            value = value.get("median", value.get("total", value.get("device")))
            told += [f"{key} {value:.4g}"] if value is not None else []
        elif isinstance(value, list):
            told.append(f"{key} " + " ".join(f"{each:.3g}" for each in value))
        elif isinstance(value, float):
            told.append(f"{key} {value:.4g}")
        else:
            told.append(f"{key} {value}")
    return f"{name:<26} {', '.join(told)}"


def main() -> None:
    """Writes the report and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="accelerator", help="of OUT.json and OUT.txt")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts")
    parser.add_argument("--edm", default="", help="checkout of github.com/NVlabs/edm")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    parser.add_argument("--only", default="", help="parts whose names begin so, by comma")
    parser.add_argument("--part", help="this part alone, in this process, to stdout")
    options = parser.parse_args()
    # Else the first of JAX and PyTorch takes the whole card; read when JAX starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks import accelerator_parts, train_step

    parts = accelerator_parts.parts(make_setting(options.tiny, options.edm))
    if options.part == "machine":
        print(json.dumps(train_step.machine()))
        return
    if options.part:
        print(json.dumps(parts[options.part]()))
        return
    flags = [f"--edm={options.edm}"] + ["--tiny"] * options.tiny
    names = [name for name in parts if name.startswith(tuple(options.only.split(",")))]
    out, table = pathlib.Path(options.out), []
    found = {"command": sys.argv[1:], "parts": {}}

    def report(name: str, figures: dict) -> None:
        found["parts"][name] = figures
        table.append(line(name, figures))
        print(table[-1], flush=True)
        for suffix, text in ((".json", json.dumps(found, indent=2)), (".txt", "\n".join(table))):
            unfinished = out.with_name(out.name + suffix + ".tmp")
            unfinished.write_text(text + "\n")
            unfinished.replace(out.with_name(out.name + suffix))

    with tempfile.TemporaryDirectory() as cache:  # new, so that the first compilation is cold
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        # This process must not start JAX's devices: a TPU has one user at a time.
        run = in_a_process(flags, environment)
        measure(["machine", *names], run, report, options.seconds)


if __name__ == "__main__":
    main()
