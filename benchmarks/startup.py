"""How long a user waits: for the first training step, the first picture, an import, a network.

`main.py` to its first training step and to 64 images of two shipped networks on disk, each with an
empty and with a filled cache of compiled programs; `import warm_diffusion` and `pretrained` beyond
`import jax`; `pretrained.load`. What is compared runs one after the other, so that a busy machine
slows both; medians are reported.

    python -m benchmarks.startup
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def app_seconds(cache: pathlib.Path, flags: list[str], line: str) -> float:
    """Seconds from before `main.py` starts to a line on its console."""
    elapsed = None
    with tempfile.TemporaryDirectory() as workdir:
        flags = [*flags, f"--workdir={workdir}", f"--config.compilation_cache_dir={cache}"]
        command = [sys.executable, str(ROOT / "main.py"), *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        begin = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
            for printed in run.stdout:
                if re.match(line, printed):
                    elapsed = time.perf_counter() - begin
        if run.returncode or elapsed is None:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}, without {line}")
    return elapsed


def import_seconds(statement: str) -> float:
    """Seconds that a new interpreter takes for it."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
    return time.perf_counter() - begin


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs/digits.py"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    shown = {
        name: ["--mode=sample", f"--checkpoint={ROOT / 'pretrained' / name}"]
        for name in ("digits", "cifar10_16")
    }
    steps = [f"--config={options.config}", "--config.training.num_steps=1"]
    load = (
        "import time; from warm_diffusion import pretrained; began = time.perf_counter(); "
        f"pretrained.load({str(ROOT / 'pretrained/digits')!r}); "
        "print(time.perf_counter() - began)"
    )
    seconds = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                for what, flags, line in (
                    ("first_step", steps, "compile +done"),
                    *((f"picture_{name}", flags, "samples ") for name, flags in shown.items()),
                ):
                    note(f"{what}_{state}", app_seconds(pathlib.Path(cache), flags, line))
        alone = import_seconds("import jax")
        note("import_beyond_jax", import_seconds("import jax, warm_diffusion") - alone)
        pretrained = import_seconds("import jax; from warm_diffusion import pretrained")
        note("import_pretrained_beyond_jax", pretrained - alone)
        run = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True)
        note("load_digits", float(run.stdout))
    result = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    ratios = zip(seconds["first_step_warm"], seconds["first_step_cold"], strict=True)
    result |= {
        "first_step_warm_to_cold": statistics.median(warm / cold for warm, cold in ratios),
        "repeats": options.repeats,
        "config": options.config,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
