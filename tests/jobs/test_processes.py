"""Two processes of two devices each, over one workdir: the same as one process, and how they end."""

import signal

import numpy as np
import pytest

from tests.jobs.conftest import REPOSITORY, wait_for
from tests.jobs.test_train import STEPS, rows
from tests.test_cluster import free_port

DEVICES = ("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
# main.py once for each list of arguments, in the same process.
PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import main
from tests.jobs.conftest import _fresh_flags
from warm_diffusion import settings
settings_start = settings.start
for number, arguments in enumerate(json.loads(sys.argv.pop(1))):
    if number:  # joined already
        arguments = [a for a in arguments if not a.startswith(("--coord", "--num_proc", "--process"))]
    sys.argv[1:] = arguments
    with _fresh_flags():
        main.main(main.parse(sys.argv))
"""


def start(app, port, *arguments, program=None, apart=((), ())):
    """Both processes, each with arguments of its own besides."""
    common = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    return [
        app.start(
            *common, f"--process_id={index}", *arguments, *apart[index],
            before=(), environment=[DEVICES],
        )
        for index in range(2)
    ]  # fmt: skip


def ends(processes, timeout=120):
    """Exit status and (stdout, stderr) of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], outputs


def last_line(text):
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")][-1]


def training(app, *arguments, **options):
    """Both processes, in the middle of a long training."""
    workdir = app.folder / f"long-{free_port()}"
    long = ("--config.training.num_steps=100000", "--config.training.checkpoint_every=100000")
    processes = start(app, free_port(), f"--workdir={workdir}", *long, *arguments, **options)
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes[0])
    return workdir, processes


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_ends(app, killed):
    _, processes = training(app)
    processes[killed].send_signal(signal.SIGKILL)
    status, outputs = ends(processes, timeout=20)
    assert status[1 - killed] == 75
    assert last_line(outputs[1 - killed][1]).startswith(f"error: process {killed} (")
    assert "was lost" in last_line(outputs[1 - killed][1])


@pytest.mark.parametrize(("told", "number"), [((1,), signal.SIGTERM), ((0, 1), signal.SIGINT)])
def test_a_signal_to_one_or_all_saves_the_same_step_and_ends_with_75(app, told, number):
    workdir, processes = training(app)
    for index in told:
        processes[index].send_signal(number)
    status, outputs = ends(processes, timeout=60)
    assert status == [75, 75], outputs
    step = rows(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert f"stopped after step {step:,}" in outputs[0][1]


def test_a_process_without_data_ends_all_with_its_reason(app, tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((32, 8, 8), np.uint8))
    sources = [(f"--config.data.source=npy:{tmp_path}/{name}.npy",) for name in ("images", "gone")]
    status, outputs = ends(
        start(app, free_port(), f"--workdir={tmp_path / 'run'}", *STEPS, apart=sources), timeout=60
    )
    assert status == [2, 2]
    for _, err in outputs:
        assert "gone.npy" in last_line(err)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_images_or_settings_do_not_train(app, tmp_path):
    for name, value in (("one", 0), ("other", 9)):
        np.save(tmp_path / f"{name}.npy", np.full((32, 8, 8), value, np.uint8))
    sources = [(f"--config.data.source=npy:{tmp_path}/{name}.npy",) for name in ("one", "other")]
    common = (f"--workdir={tmp_path / 'run'}", *STEPS)
    both = [
        (start(app, free_port(), *common, apart=sources), "the hash of the images is '"),
        (start(app, free_port(), *common, apart=((), ("--config.seed=3",))), "config.seed is 3, not 0"),
    ]  # fmt: skip
    for processes, message in both:
        status, outputs = ends(processes, timeout=90)
        assert status == [2, 2]
        for _, err in outputs:
            assert last_line(err).startswith("error: process 1 (")
            assert message in last_line(err)
    assert not (tmp_path / "run").exists()
