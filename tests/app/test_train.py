"""Training: files, exact resume after kill and signals, guards, devices, isolation."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import (
    STEPS,
    assert_same_but_for_round_off,
    assert_same_run,
    final_arrays,
    rows,
    wait_for,
)
from warm_diffusion import pretrained
from warm_diffusion.app.train.loop import Loop
from warm_diffusion.data import load_dataset
from warm_diffusion.runtime import storage

MORE = "--config.training.num_steps=7"


def test_a_run_writes_config_metrics_events_grids_and_checkpoints(trained):
    workdir, out, err = trained
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["model_channels"] == 8
    assert [(row["step"], row["images"]) for row in rows(workdir)] == [
        (step, 16 * step) for step in range(1, 7)
    ]
    assert all(np.isfinite(row["loss"]) for row in rows(workdir))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    assert list(workdir.glob("events.out.tfevents.*"))
    # 8 x 8 digits four times as large, 8 x 8 of them with gaps of 2
    assert Image.open(workdir / "samples" / "step_00000006.png").size == (270, 270)
    reports = [line for line in out.splitlines() if line.startswith("step ")]
    assert "images/s" not in reports[0]  # of the first step only the compilation was timed
    assert " images/s | ETA " in reports[1]
    assert reports[5].startswith("step 6/6 | loss")
    assert "ETA" not in reports[5]
    assert all(len(line) < 100 for line in reports)
    assert out.endswith(f"python main.py --mode=sample --workdir={workdir}\n")
    assert err == ""
    assert not (workdir / "lock.json").exists()


# --- a run that goes on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["local", pytest.param("gs", marks=pytest.mark.long)], indirect=True
)
def test_killed_and_restarted_equals_never_interrupted_bit_for_bit(app, uninterrupted, place):
    """A save to gs:// is interrupted when all its objects but the marker are there."""
    process = app.start(f"--workdir={place}", *STEPS)
    folder = place / "checkpoints"
    sign = folder / "4" / "commit_success.txt" if storage.is_local(place) else folder / "8"
    wait_for(sign.exists, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "8" / "commit_success.txt").exists()
    out, _ = app.run(f"--workdir={place}", *STEPS)
    assert "continues at step 4 (64 images)" in out
    assert_same_run(place, uninterrupted)


def test_stopped_by_a_signal_and_continued_equals_never_interrupted_bit_for_bit(
    app, uninterrupted, tmp_path, monkeypatch
):
    report = Loop._report

    def signalled(loop, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        report(loop, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_report", signalled)
        _, err = app.run(f"--workdir={tmp_path}", *STEPS, status=75)
    assert err.startswith("SIGTERM: stopped after step 4 and saved in ")
    assert err.count("\n") == 1
    out, _ = app.run(f"--workdir={tmp_path}", *STEPS)
    assert "continues at step 4 (64 images)" in out
    assert_same_run(tmp_path, uninterrupted)


# main.py in a process where any connection or look-up of a host raises.
OFFLINE = """
import socket, sys
def blocked(*args, **kwargs):
    raise AssertionError("network used")
socket.socket.connect = socket.socket.connect_ex = blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = blocked
from absl import app
import main
try:
    app.run(main.main, flags_parser=main.parse)
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
assert not loaded, loaded
print("clean")
"""


def test_a_split_state_continues_a_whole_one_and_is_continued_by_one_without_network_or_tensorflow(
    app, uninterrupted, tmp_path
):
    """One device, then four that split the state, then one: the checksums hold between them."""
    app.run(f"--workdir={tmp_path}", "--config.training.num_steps=4")
    four = [("XLA_FLAGS", "--xla_force_host_platform_device_count=4")]
    split = "--config.training.sharding=fsdp"
    out, _ = app.run(
        f"--workdir={tmp_path}", *STEPS, split, environment=four, before=("-c", OFFLINE)
    )
    assert "continues at step 4 (64 images)" in out
    assert "4 x cpu, global batch 16, 4 per device" in out
    assert out.strip().endswith("clean")
    assert_same_but_for_round_off(uninterrupted, tmp_path)
    out, _ = app.run(f"--workdir={tmp_path}", "--config.training.num_steps=9")
    assert "training.sharding: 'fsdp' -> 'replicated'" in out
    assert "continues at step 8 (128 images)" in out


def test_a_finished_run_has_nothing_to_do(app, trained):
    out, _ = app.run(f"--workdir={trained[0]}", f"--config={trained[0]}/config.json", tiny=False)
    assert "nothing to do: 6 steps of 6 are done" in out


def test_resuming_with_another_configuration_is_refused_with_the_difference(app, trained):
    _, err = app.run(f"--workdir={trained[0]}", "--config.model.dropout=0.25", status=2)
    assert "model.dropout: 0.0 -> 0.25" in err
    assert "--config=" in err
    assert len(err.splitlines()) == 1


def test_a_run_is_continued_on_its_own_images_wherever_they_are(app, run, tmp_path):
    before = (run / "config.json").read_text()
    images = {
        "other": np.zeros((16, 8, 8), np.uint8),
        "moved": load_dataset("digits", cache_dir=str(tmp_path)).images,
    }
    for name, array in images.items():
        np.save(tmp_path / f"{name}.npy", array)
    flags = f"--workdir={run}", MORE, f"--config.data.source=npy:{tmp_path}"
    _, err = app.run(*flags[:2], f"{flags[2]}/other.npy", status=2)
    assert "holds other images than this run was trained on" in err
    assert (run / "config.json").read_text() == before
    out, _ = app.run(*flags[:2], f"{flags[2]}/moved.npy")
    assert "continues at step 6" in out


# --- data, gradients -----------------------------------------------------------------------------


def test_data_read_from_disk_trains_as_data_on_the_device(app, uninterrupted, tmp_path):
    app.run(f"--workdir={tmp_path}", *STEPS, "--config.training.device_megabytes=0")
    for streamed, resident in zip(rows(tmp_path), rows(uninterrupted), strict=True):
        np.testing.assert_allclose(streamed["loss"], resident["loss"], rtol=1e-5)


def test_a_batch_larger_than_the_data_is_reported(app, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9 * 64, dtype=np.uint8).reshape(9, 8, 8))
    out, _ = app.run(
        f"--workdir={tmp_path / 'run'}", f"--config.data.source=npy:{tmp_path}/a.npy",
        "--config.training.num_steps=1", "--config.training.device_megabytes=0",
    )  # fmt: skip
    assert "note     training.batch_size=16 is more than the 9 images" in out


def test_gradients_that_stay_non_finite_stop_the_run_and_save_nothing_bad(app, tmp_path):
    """Also where reports are rare, at step 100."""
    diverging = (
        "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_images=0",
        "--config.training.max_nonfinite_steps=3", "--config.training.num_steps=5000",
    )  # fmt: skip
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    _, err = app.run(f"--workdir={often}", *diverging, status=3)
    assert "the gradient was not finite in 3 steps in a row" in err
    assert len(err.splitlines()) == 1
    assert rows(often)[-1]["nonfinite_total"] >= 3
    assert not any(p.name.isdigit() for p in (often / "checkpoints").iterdir())
    log = "--config.training.log_every=5000"
    _, err = app.run(f"--workdir={seldom}", *diverging, log, status=3)
    assert "up to step 100 or before: stopped" in err


# --- weights to start from -----------------------------------------------------------------------


def test_a_run_starts_from_the_weights_it_is_given(app, trained, tmp_path):
    """The first step of a warm-up has rate 0: weights and averages are those of the other run."""
    pretrained.save(pretrained.load(trained[0]), tmp_path / "model", samples=np.zeros((0, 8, 8, 1)))
    # One of the runs was killed in its first save before: what orbax had written is no checkpoint.
    (tmp_path / "model_run" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    expected = {k: v for k, v in final_arrays(trained[0], 6).items() if k.startswith("['ema'][0]")}
    assert expected
    for source in (trained[0], tmp_path / "model"):
        workdir = tmp_path / f"{source.name}_run"
        # A ramp-up would forget what the averages begin with.
        flags = ("--config.training.num_steps=1", "--config.training.ema_rampup=0")
        out, _ = app.run(f"--workdir={workdir}", *flags, f"--config.init_from={source}")
        assert f"weights  from {source}" in out
        saved = final_arrays(workdir, step=1)
        for name, leaf in expected.items():
            for place in ("['params']", "['ema'][0]"):
                found = saved[name.replace("['ema'][0]", place)]
                np.testing.assert_array_equal(found, leaf, err_msg=place + name)


def test_weights_of_another_network_are_refused_before_anything_is_written(app, trained, tmp_path):
    for source, message in (
        (tmp_path / "nowhere", "there is no trained network in"),
        (trained[0], "these are weights of another network: missing dec_8x8_block2"),
    ):
        _, err = app.run(
            f"--workdir={tmp_path / 'run'}", f"--config.init_from={source}",
            "--config.model.num_blocks=2", status=2,
        )  # fmt: skip
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()
