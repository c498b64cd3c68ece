"""benchmarks/accelerator.py: what fails costs itself alone, and time that runs out is told."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import accelerator, accelerator_parts


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on():
    told = []

    def run(name, seconds):
        if name == "two":
            raise MemoryError("RESOURCE_EXHAUSTED")
        return {"images_per_second": 5.0}

    found = accelerator.measure(
        ["one", "two", "three"], run, lambda name, figures: told.append((name, figures)), 100.0
    )
    assert [name for name, _ in told] == ["one", "two", "three"]
    assert found["two"]["error"] == "MemoryError: RESOURCE_EXHAUSTED"
    assert found["three"]["images_per_second"] == 5.0


def test_parts_that_there_is_no_time_for_are_named_and_not_begun(monkeypatch):
    now, begun = [0.0], []
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(accelerator, "time", clock)

    def run(name, seconds):
        begun.append((name, seconds))
        now[0] += 70.0
        return {}

    found = accelerator.measure(["one", "two", "three"], run, lambda *_: None, 150.0)
    assert begun == [("one", 150.0), ("two", 80.0)]
    assert "no time left" in found["three"]["error"]


def test_the_table_shows_medians_peaks_and_the_slowest_operations():
    figures = {"seconds": {"median": 0.5, "low": 0.4, "high": 0.6}, "images_per_second": 1234.5}
    figures |= {"slowest": [{"name": "convolution.7", "milliseconds": 3.25}]}
    line = accelerator.line("sample", figures)
    assert "seconds 0.5" in line
    assert "images_per_second 1234" in line
    assert "3.25 ms convolution.7" in line


def test_the_dct_on_a_cpu_is_that_of_float64_to_float32_rounding():
    found = accelerator_parts.dct_error(None)
    assert 0 < found["dct"] < 2e-6
    assert 0 < found["round_trip"] < 4e-6


def test_a_profile_names_operations_of_the_program_the_slowest_first(tmp_path):
    a = jnp.ones((700, 700))
    product = jax.jit(lambda a: jnp.sin(a @ a).sum()).lower(a).compile()
    product(a).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        product(a).block_until_ready()
    (path,) = tmp_path.rglob("*.xplane.pb")
    found = accelerator_parts.slowest(jax.profiler.ProfileData.from_file(str(path)), rounds=1)
    times = [row["milliseconds"] for row in found["slowest"]]
    assert times == sorted(times, reverse=True)
    assert found["milliseconds"] >= times[0] > 0
    assert all(f"%{row['name']} " in product.as_text() for row in found["slowest"])


def test_edm_wants_a_checkout():
    torch = importlib.util.find_spec("torch")
    if torch is None:
        pytest.skip("needs torch")
    from benchmarks import edm

    with pytest.raises(ValueError, match="must be a checkout of"):
        edm.Edm("nowhere", None, half=False)


@pytest.mark.long
def test_all_parts_run_on_a_cpu_with_tiny_networks(tmp_path):
    command = ["-m", "benchmarks.accelerator", "--tiny", f"--out={tmp_path}/tiny", "--seconds=900"]
    root = pathlib.Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, *command], check=True, cwd=root)
    parts = json.loads((tmp_path / "tiny.json").read_text())["parts"]
    assert {name: part["error"] for name, part in parts.items() if "error" in part} == {}
    lines = (tmp_path / "tiny.txt").read_text().splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in parts)
    assert parts["profile"]["compile_seconds"] < parts["cifar10_bfloat16_8"]["compile_seconds"]
