"""A long run neither grows nor slows down (docs/reliability.md).

SOAK_STEPS=3000 python -m pytest -m long tests/proofs/test_soak.py -s
"""

import json
import os
import pathlib
import re
import time

import numpy as np
import pytest

from tests.proofs.test_kills import start

STEPS = int(os.environ.get("SOAK_STEPS", "20000"))


def held(process):
    """Resident megabytes and open files."""
    place = pathlib.Path("/proc") / str(process.pid)
    resident = re.search(r"VmRSS:\s+(\d+) kB", (place / "status").read_text())[1]
    return int(resident) / 1024, len(list((place / "fd").iterdir()))


@pytest.mark.long
def test_memory_open_files_and_step_time_stay_flat(tmp_path):
    """Medians of the last third against the middle third: the first one warms up."""
    every = STEPS // 40
    process = start(
        tmp_path, tmp_path / "run", STEPS, f"--config.training.sample_every={every}",
        f"--config.training.checkpoint_every={every}", f"--config.training.log_every={every}",
    )  # fmt: skip
    metrics, seen = tmp_path / "run" / "metrics.jsonl", []
    while process.poll() is None:
        time.sleep(1)
        try:
            if metrics.exists():
                seen.append(held(process))
        except (FileNotFoundError, ProcessLookupError, TypeError):
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    rates = [json.loads(line)["images_per_second"] for line in metrics.read_text().splitlines()]
    table = {"resident MB": [m for m, _ in seen], "open files": [f for _, f in seen],
             "images per second": rates}  # fmt: skip
    thirds = {
        name: [float(np.median(part)) for part in np.array_split(values, 3)]
        for name, values in table.items()
    }
    print(f"\n{STEPS} steps, medians of the thirds: {thirds}")
    for name in ("resident MB", "open files"):
        _, middle, last = thirds[name]
        assert last <= 1.02 * middle, thirds
    # Other work on the machine moves the rate; a step that slows down would move it for ever.
    assert thirds["images per second"][2] >= 0.8 * thirds["images per second"][1], thirds
