"""Time from the start of `main.py` to its first training step, with an empty and a filled cache.

Also what `import warm_diffusion` costs beyond importing jax. Each pair runs one after the other, so
that a busy machine slows both; medians are reported.

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


def first_step(config: str, cache: pathlib.Path) -> float:
    """Seconds to the first step, from before the process starts to its console line."""
    with tempfile.TemporaryDirectory() as workdir:
        flags = [f"--config={config}", f"--workdir={workdir}", "--config.training.num_steps=1"]
        flags.append(f"--config.compilation_cache_dir={cache}")
        command = [sys.executable, str(ROOT / "main.py"), *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        begin = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
            for line in run.stdout:
                if re.match("compile +first step", line):
                    elapsed = time.perf_counter() - begin
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}")
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
    cold, warm, jax_alone, package = [], [], [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(options.config, pathlib.Path(cache)))
            warm.append(first_step(options.config, pathlib.Path(cache)))
        jax_alone.append(import_seconds("import jax"))
        package.append(import_seconds("import jax, warm_diffusion"))
    medians = [statistics.median(times) for times in (cold, warm, jax_alone, package)]
    result = {
        "first_step_cold_s": medians[0],
        "first_step_warm_s": medians[1],
        "warm_to_cold": statistics.median(w / c for w, c in zip(warm, cold, strict=True)),
        "import_beyond_jax_s": medians[3] - medians[2],
        "repeats": options.repeats,
        "config": options.config,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
