"""Training as a process: files, exact resume after kill and signals, guards, devices, isolation."""

import json
import shutil
import signal
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import REPOSITORY, STEPS, wait_for
from warm_diffusion import pretrained
from warm_diffusion.data import load_dataset
from warm_diffusion.runtime import storage


def rows(workdir):
    """Reported numbers by step, without those that measure time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "input_wait")}
        for line in lines
    ]


def final_arrays(workdir, step=8):
    """All arrays of a checkpoint (weights, averages, optimizer), read by orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        leaves = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        state = reader.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_run(one, other, step=8):
    assert rows(one) == rows(other)
    first, second = final_arrays(one, step), final_arrays(other, step)
    assert first.keys() == second.keys()
    assert any("ema" in name for name in first)
    assert any("opt_state" in name for name in first)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_run_writes_config_metrics_events_grids_and_checkpoints(trained):
    workdir, out, err = trained
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["model_channels"] == 8
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(row["loss"]) for row in rows(workdir))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    assert list(workdir.glob("events.out.tfevents.*"))
    # 8 x 8 digits four times as large, 8 x 8 of them with gaps of 2
    assert Image.open(workdir / "samples" / "step_00000006.png").size == (270, 270)
    assert "step 6/6 | 96 images | loss" in out
    assert err == ""


def test_images_and_steps_reported_agree(trained):
    assert [row["images"] for row in rows(trained[0])] == [16 * n for n in range(1, 7)]


def test_killed_and_restarted_equals_never_interrupted_bit_for_bit(app, uninterrupted, place):
    """On gs:// in the middle of a save, whose objects are there already, but for the marker."""
    process = app.start(f"--workdir={place}", *STEPS)
    folder = place / "checkpoints"
    sign = folder / "4" / "commit_success.txt" if storage.is_local(place) else folder / "8"
    wait_for(sign.exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "8" / "commit_success.txt").exists()
    out, _ = app.run(f"--workdir={place}", *STEPS)
    assert "continues at step 4 (64 images)" in out
    assert_same_run(place, uninterrupted)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_stop_signal_finishes_the_step_saves_and_exits_with_75(app, uninterrupted, number):
    workdir = app.folder / f"stopped-{number.name}"
    long = ("--config.training.num_steps=100000", "--config.training.checkpoint_every=100000")
    process = app.start(f"--workdir={workdir}", *long)
    metrics = workdir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75
    assert f"{number.name}: stopped after step" in err
    stopped_at = rows(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()
    end = stopped_at + 2
    more = (f"--config.training.num_steps={end}", "--config.training.checkpoint_every=100000")
    app.run(f"--workdir={workdir}", *more)
    assert [row["step"] for row in rows(workdir)] == list(range(1, end + 1))
    shared = min(end, 8)
    assert rows(workdir)[:shared] == rows(uninterrupted)[:shared]


def test_a_finished_run_has_nothing_to_do(app, trained):
    out, _ = app.run(
        f"--workdir={trained[0]}", f"--config={trained[0] / 'config.json'}", tiny=False
    )
    assert "nothing to do: 6 steps of 6 are done" in out


@pytest.mark.long
def test_eight_devices_train_as_one_does(app, uninterrupted):
    """Losses and weights to float32 round-off: sums over the batch are taken in another order."""
    workdir = app.folder / "eight"
    flags = [("XLA_FLAGS", "--xla_force_host_platform_device_count=8")]
    out, _ = app.run(f"--workdir={workdir}", *STEPS, environment=flags)
    assert "8 x cpu, batch 16 in all, 2 a device" in out
    for one, eight in zip(rows(uninterrupted), rows(workdir), strict=True):
        for name in ("loss", "denoise", "deblur"):
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-4)
    one, eight = final_arrays(uninterrupted), final_arrays(workdir)
    for name in (name for name in one if "params" in name or "ema" in name):
        # Adam divides by the root of the squared gradient: tiny gradients turn round-off into
        # a difference of up to the learning rate (2e-3 after warm-up, here 1.3e-3 in all)
        np.testing.assert_allclose(eight[name], one[name], atol=5e-4, err_msg=name)


def test_a_split_state_continues_a_whole_one_and_is_continued_by_one(app, uninterrupted):
    """One device, then four that split the state, then one: the checksums hold between them."""
    workdir = app.folder / "split"
    app.run(f"--workdir={workdir}", "--config.training.num_steps=4")
    four = [("XLA_FLAGS", "--xla_force_host_platform_device_count=4")]
    split = "--config.training.sharding=fsdp"
    out, _ = app.run(f"--workdir={workdir}", *STEPS, split, environment=four)
    assert "continues at step 4 (64 images)" in out
    for one, four in zip(rows(uninterrupted), rows(workdir), strict=True):
        np.testing.assert_allclose(four["loss"], one["loss"], rtol=1e-4)
    one, four = final_arrays(uninterrupted), final_arrays(workdir)
    for name in (name for name in one if "params" in name or "ema" in name):
        np.testing.assert_allclose(four[name], one[name], atol=5e-4, err_msg=name)  # as above
    out, _ = app.run(f"--workdir={workdir}", "--config.training.num_steps=9")
    assert "training.sharding: 'fsdp' -> 'replicated'" in out
    assert "continues at step 8 (128 images)" in out


@pytest.mark.long  # tests/app/test_processes.py has the same with --coordinator_address
def test_two_processes_train_draw_and_save_as_one_does(app, uninterrupted):
    """Started as Slurm starts them; JAX reads who is who from the environment."""
    workdir = app.folder / "processes"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    flags = ["--distributed", f"--workdir={workdir}", *STEPS, "--config.training.sample_every=8"]
    processes = [
        app.start(
            *flags, environment={**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}.items()
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu, batch 16 in all, 8 a device" in outputs[0][0]
    assert "step 8/8" not in outputs[1][0]  # one process reports
    for one, two in zip(rows(uninterrupted), rows(workdir), strict=True):
        np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-4)
    assert (workdir / "samples" / "step_00000008.png").is_file()
    one, two = final_arrays(uninterrupted), final_arrays(workdir)
    for name in (name for name in one if "params" in name or "ema" in name):
        # as between devices, above
        np.testing.assert_allclose(two[name], one[name], atol=5e-4, err_msg=name)


def test_a_batch_that_the_devices_cannot_share_is_refused(app, tmp_path):
    flags = [("XLA_FLAGS", "--xla_force_host_platform_device_count=3")]
    _, err = app.run(f"--workdir={tmp_path}", status=2, environment=flags)
    assert "training.batch_size is global" in err
    assert "expected a multiple of 3" in err


def test_data_read_from_disk_trains_as_data_on_the_device(app, uninterrupted):
    workdir = app.folder / "streamed"
    app.run(f"--workdir={workdir}", *STEPS, "--config.training.device_megabytes=0")
    for streamed, resident in zip(rows(workdir), rows(uninterrupted), strict=True):
        np.testing.assert_allclose(streamed["loss"], resident["loss"], rtol=1e-5)


def test_gradients_that_stay_non_finite_stop_the_run_and_save_nothing_bad(app, tmp_path):
    _, err = app.run(
        f"--workdir={tmp_path}", "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_images=0", "--config.training.max_nonfinite=3",
        "--config.training.num_steps=50", status=3,
    )  # fmt: skip
    assert "the gradient was not finite in 3 steps in a row" in err
    assert len(err.splitlines()) == 1
    assert rows(tmp_path)[-1]["nonfinite_total"] >= 3
    assert not any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())


def test_resuming_with_another_configuration_is_refused_with_the_difference(app, trained):
    _, err = app.run(f"--workdir={trained[0]}", "--config.model.dropout=0.25", status=2)
    assert "model.dropout: 0.0 -> 0.25" in err
    assert "--config=" in err
    assert len(err.splitlines()) == 1


def test_training_imports_no_tensorflow_and_opens_no_socket(app, tmp_path):
    """The whole job in a process where any connection or look-up of a host raises."""
    program = f"""
import socket, sys
def blocked(*args, **kwargs):
    raise AssertionError("network used")
socket.socket.connect = socket.socket.connect_ex = blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = blocked
sys.path.insert(0, {str(REPOSITORY)!r})
sys.argv[0] = "main.py"
import runpy
try:
    runpy.run_path({str(REPOSITORY / "main.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
assert not loaded, loaded
print("clean")
"""
    out, _ = app.run(
        f"--workdir={tmp_path}", "--config.training.num_steps=2", before=("-c", program)
    )
    assert "step 2/2" in out
    assert out.strip().endswith("clean")


def test_bad_data_is_refused_before_anything_is_written(app, tmp_path):
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "nine.png")
    workdir = tmp_path / "run"
    _, err = app.run(
        f"--workdir={workdir}", f"--config.data.source=folder:{images.parent}",
        "--config.data.resolution=0", tiny=False, status=2,
    )  # fmt: skip
    assert "must be divisible by 2, got 9x9; shorten channel_mult or resize the data" in err
    assert not workdir.exists()


def test_a_library_user_gets_the_final_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    sys.modules.pop("configs", None)
    from configs import digits
    from warm_diffusion.app.train import train

    config = digits.get_config()
    config.model.model_channels, config.model.channel_mult = 8, (1,)
    config.model.attention_resolutions = (8,)
    config.training.num_steps, config.training.batch_size = 2, 8
    state = train(config, str(tmp_path / "run"))
    assert int(state.step) == 2


def first_average_only(workdir, step):
    return {k: v for k, v in final_arrays(workdir, step).items() if k.startswith("['ema'][0]")}


@pytest.mark.parametrize("kind", ["workdir", "checkpoint", "folder"])
def test_a_run_starts_from_the_weights_it_is_given(app, trained, tmp_path, kind):
    """The first step of a warm-up has rate 0: weights and averages are those of the other run."""
    source = {"workdir": trained[0], "checkpoint": trained[0] / "checkpoints" / "6"}.get(kind)
    if kind == "folder":
        source = tmp_path / "model"
        pretrained.save(pretrained.load(trained[0]), source, samples=np.zeros((0, 8, 8, 1)))
    flags = ["--config.training.num_steps=1"]
    flags.append("--config.training.ema_rampup=0")  # a ramp-up forgets what averages begin with
    flags.append(f"--config.init_from={source}")
    app.run(f"--workdir={tmp_path / 'run'}", *flags)
    saved = final_arrays(tmp_path / "run", step=1)
    expected = first_average_only(trained[0], step=6)
    assert expected
    for name, leaf in expected.items():
        for place in ("['params']", "['ema'][0]"):
            found = saved[name.replace("['ema'][0]", place)]
            np.testing.assert_array_equal(found, leaf, err_msg=place + name)


def test_after_a_kill_in_the_first_save_a_run_starts_from_its_weights_again(app, trained, tmp_path):
    """An unfinished save is no checkpoint: what orbax writes before it renames."""
    flags = [f"--config.init_from={trained[0]}", "--config.training.num_steps=1"]
    flags += ["--config.training.ema_rampup=0"]
    unfinished = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    out, _ = app.run(f"--workdir={tmp_path}", *flags)
    assert f"weights  from {trained[0]}" in out
    name, leaf = next(iter(first_average_only(trained[0], step=6).items()))
    np.testing.assert_array_equal(final_arrays(tmp_path, step=1)[name], leaf)


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


def test_a_run_is_not_continued_on_other_images(app, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    np.save(tmp_path / "other.npy", np.zeros((16, 8, 8), np.uint8))
    _, err = app.run(
        f"--workdir={tmp_path / 'run'}", f"--config.data.source=npy:{tmp_path}/other.npy",
        "--config.training.num_steps=7", status=2,
    )  # fmt: skip
    assert "holds other images than this run was trained on" in err
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_goes_on_where_its_images_were_moved(app, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    np.save(tmp_path / "moved.npy", load_dataset("digits", cache_dir=str(tmp_path)).images)
    out, _ = app.run(
        f"--workdir={tmp_path / 'run'}", f"--config.data.source=npy:{tmp_path}/moved.npy",
        "--config.training.num_steps=7",
    )  # fmt: skip
    assert "continues at step 6" in out
