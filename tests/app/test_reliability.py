"""The promises of docs/reliability.md, as a user meets them: one line, the status, nothing lost."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import STEPS, assert_same_run, rows
from warm_diffusion import pretrained
from warm_diffusion.app import build, sample
from warm_diffusion.app.train import loop
from warm_diffusion.runtime import lock, storage
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.writer import Writer

MORE = "--config.training.num_steps=7"


def damage(run, *steps):
    for step in steps:
        # Those that hold the arrays: orbax keeps a second copy, which it does not read.
        for file in (run / "checkpoints" / str(step) / "state" / "d").iterdir():
            content = bytearray(file.read_bytes())
            for at in range(0, len(content), 97):
                content[at] ^= 1
            file.write_bytes(content)


def one_line(err):
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process can grow beyond `size` bytes: like a full disk, but with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- what counts on resume -----------------------------------------------------------------------


def test_without_config_json_a_checkpoints_own_configuration_counts(app, run):
    (run / "config.json").unlink()
    _, err = app.run(f"--workdir={run}", "--config.optimizer.learning_rate=0.1", MORE, status=2)
    assert "optimizer.learning_rate: 0.002 -> 0.1" in one_line(err)
    assert not (run / "config.json").exists()
    out, _ = app.run(f"--workdir={run}", MORE)
    assert "continues at step 6" in out
    assert json.loads((run / "config.json").read_text())["training"]["num_steps"] == 7


def test_another_configuration_in_config_json_does_not_count(app, run):
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.1
    (run / "config.json").write_text(json.dumps(config))
    _, err = app.run(f"--workdir={run}", "--config.optimizer.learning_rate=0.1", MORE, status=2)
    assert "optimizer.learning_rate: 0.002 -> 0.1" in one_line(err)


@pytest.mark.parametrize("content", [b"{", b"\xff\x00\xfe", b"[1]"])
def test_a_damaged_config_json_is_named_where_nothing_else_says_what_was_trained(
    app, tmp_path, content
):
    (tmp_path / "config.json").write_bytes(content)
    _, err = app.run(f"--workdir={tmp_path}", MORE, status=2)
    assert f"{tmp_path / 'config.json'}" in one_line(err)
    assert (tmp_path / "config.json").read_bytes() == content


def test_metrics_with_a_binary_tail_and_wrong_types_lose_these_lines_alone(app, run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": "seven"}\n[7]\n{"step": null}\n\xff\xfe\x00{"step": 8')
    app.run(f"--workdir={run}", MORE)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6, 7]


# --- one writer ----------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_touches_nothing(app, run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with lock.hold(run):
        _, err = app.run(f"--workdir={run}", MORE, status=2)
    assert f"is being written by process {os.getpid()} on" in one_line(err)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p != run} == {
        p: stamp for p, stamp in before.items() if p != run
    }


# --- checked before anything is written ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.sampling.ema=5", "sampling.ema must be -1 (raw weights) or 0 to 0"),
        ("--config.model.attention_resolutions=(8,5)", "levels, 8, 4, got 5"),
        ("--config.model.model_channels=100000", "model.model_channels must be"),
        ("--config.seed=12345678901234567890", "seed must be"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(app, tmp_path, flag, message):
    _, err = app.run(f"--workdir={tmp_path / 'run'}", flag, tiny=False, status=2)
    assert message in one_line(err)
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_are_refused_before_anything_is_written(app, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "nine.png")
    _, err = app.run(
        f"--workdir={tmp_path / 'run'}", f"--config.data.source=folder:{tmp_path / 'images'}",
        "--config.data.resolution=0", tiny=False, status=2,
    )  # fmt: skip
    told = "must be divisible by 2, got 9x9; shorten channel_mult or resize the data"
    assert told in one_line(err)
    assert not (tmp_path / "run").exists()


def test_a_workdir_whose_checkpoints_could_not_be_read_is_refused_before_the_first_step(
    app, tmp_path
):
    _, err = app.run(f"--workdir={tmp_path / 'run[1]'}", MORE, status=2)
    assert "--workdir must be UTF-8 without * ? [ ]" in one_line(err)
    assert not (tmp_path / "run[1]").exists()


def test_what_only_tracing_the_step_finds_is_refused_before_anything_is_written(
    app, tmp_path, monkeypatch
):
    def broken(*_, **__):
        def loss_fn(*_):
            raise ValueError("this loss cannot be traced")

        return loss_fn

    monkeypatch.setattr(build, "loss", broken)
    # A seed of its own: runs of these tests share programs that were traced with the true loss.
    _, err = app.run(f"--workdir={tmp_path / 'run'}", "--config.seed=987", status=2)
    assert "this loss cannot be traced" in one_line(err)
    assert not (tmp_path / "run").exists()


# --- damaged checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "eval"])
def test_after_damage_the_checkpoint_before_is_used(app, run, tmp_path, mode):
    damage(run, 6)
    flags = {"sample": ["--seeds=0-1"], "eval": ["--config.eval.num_samples=8"]}[mode]
    common = [f"--mode={mode}", f"--checkpoint={run}", f"--workdir={tmp_path / 'out'}"]
    out, _ = app.run(*common, *flags, tiny=False)
    assert "checkpoint 6 of" in out
    assert "the one before is used" in out
    assert "step 3 of" in out


@pytest.mark.parametrize("mode", ["train", "sample", "eval"])
def test_where_no_checkpoint_is_sound_the_status_is_4(app, run, tmp_path, mode):
    damage(run, 3, 6)
    if mode == "train":
        _, err = app.run(f"--workdir={run}", MORE, status=4)
    else:
        folders = f"--checkpoint={run}", f"--workdir={tmp_path / 'out'}"
        _, err = app.run(f"--mode={mode}", *folders, tiny=False, status=4)
    one_line(err)


@pytest.mark.parametrize(("mode", "moment"), [("load", "about"), ("eval", "__init__")])
def test_a_checkpoint_that_training_removes_is_passed_over_for_the_next(
    app, run, tmp_path, monkeypatch, mode, moment
):
    """As with training.keep_latest=1: while it is read, or once it is chosen."""
    (run / "checkpoints" / "6").rename(tmp_path / "6")
    method = getattr(Checkpoints, moment)

    def meanwhile(*arguments, **options):
        if (tmp_path / "6").exists():
            (tmp_path / "6").rename(run / "checkpoints" / "6")
            shutil.rmtree(run / "checkpoints" / "3")
        return method(*arguments, **options)

    monkeypatch.setattr(Checkpoints, moment, meanwhile)
    if mode == "load":
        assert pretrained.load(run).info["step"] == 6
    else:
        out, err = app.run(
            "--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}",
            "--config.eval.num_samples=8", tiny=False,
        )  # fmt: skip
        assert err == ""
        assert f"step 6 of {run}" in out


# --- the disk ------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_run_continues_when_space_is_back(
    app, uninterrupted, tmp_path
):
    """Full from the first file on; in the first save; in a later part of it."""
    app.run(f"--workdir={tmp_path}", "--config.training.num_steps=4")
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    for size in (100, 3_000, 20_000):
        with files_up_to(size):
            _, err = app.run(f"--workdir={tmp_path}", *STEPS, status=74)
        assert "File too large. What was written before is sound" in one_line(err)
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before
        assert not list(tmp_path.rglob("*partial*"))
    out, _ = app.run(f"--workdir={tmp_path}", *STEPS)
    assert "continues at step 4" in out
    # Only now: orbax's threads may still have written after the save that failed.
    assert not list(tmp_path.rglob("*tmp*"))
    assert_same_run(tmp_path, uninterrupted)


def full_at(call, patch, module, name):
    """Makes the given call, from 1, of a function fail as on a full disk."""
    function, calls = getattr(module, name), itertools.count(1)

    def fails(*arguments, **options):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        return function(*arguments, **options)

    patch.setattr(module, name, fails)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (loop, "save_png", 1),
        pytest.param(Writer, "scalars", 6, marks=pytest.mark.long),
        pytest.param(Writer, "flush", 2, marks=pytest.mark.long),
    ],
)
def test_what_fails_at_the_very_end_of_training_is_made_by_the_same_command(
    app, trained, tmp_path, monkeypatch, module, name, call
):
    """The grid, the numbers and TensorBoard's events of the last step."""
    command = (
        f"--workdir={tmp_path}", "--config.training.num_steps=6",
        "--config.training.checkpoint_every=3", "--config.training.sample_every=6",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        full_at(call, patch, module, name)
        _, err = app.run(*command, status=74)
    assert "there: No space left on device" in one_line(err)
    out, _ = app.run(*command)
    assert "continues at step 3" in out
    assert_same_run(tmp_path, trained[0], step=6)
    picture = "samples/step_00000006.png"
    assert (tmp_path / picture).read_bytes() == (trained[0] / picture).read_bytes()


@pytest.mark.parametrize(
    ("module", "name", "call"), [(Writer, "scalars", 1), (storage, "write_json", 2)]
)
def test_what_fails_at_the_very_end_of_an_evaluation_is_made_by_the_same_command(
    app, run, tmp_path, monkeypatch, module, name, call
):
    """The line of its numbers, and the report, after the one round."""
    command = ("--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}",
               "--config.eval.num_samples=8", "--config.eval.repeats=1")  # fmt: skip
    with monkeypatch.context() as patch:
        full_at(call, patch, module, name)
        _, err = app.run(*command, tiny=False, status=74)
    assert "there: No space left on device" in one_line(err)
    for _ in range(2):
        app.run(*command, tiny=False)
    report = json.loads((tmp_path / "eval" / "step_00000006.json").read_text())
    (row,) = rows(tmp_path / "eval")
    assert row["fd_pixels_8"] == report["fd_pixels_8"]


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/metrics.jsonl/x"])
def test_a_file_where_a_folder_should_be_or_the_other_way_is_one_line(app, tmp_path, where):
    place = tmp_path / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")
    _, err = app.run(f"--workdir={tmp_path / 'run'}", *STEPS, status=2)
    assert str(tmp_path / "run") in one_line(err)


@pytest.mark.parametrize(("mode", "number"), [("train", errno.ENOSPC), ("sample", errno.EACCES)])
def test_a_disk_that_takes_nothing_more_is_one_line_and_the_run_is_as_it_was(
    app, run, tmp_path, monkeypatch, mode, number
):
    """Full, without permission (a test as root is never refused one)."""

    def refuse(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(tmp_path) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *rest, **more)

    def refuse_to_open(file, mode="r", *rest, **more):
        if set(mode) & set("wax+") and str(tmp_path) in str(file):
            raise OSError(number, os.strerror(number), str(file))
        return opened_file(file, mode, *rest, **more)

    opened, opened_file = os.open, builtins.open
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(builtins, "open", refuse_to_open)
        patch.setattr(io, "open", refuse_to_open)  # pathlib's
        _, err = app.run(
            f"--mode={mode}", f"--workdir={run}", *([MORE] if mode == "train" else []),
            tiny=mode == "train", status=2 if number == errno.EACCES else 74,
        )  # fmt: skip
    assert os.strerror(number) in one_line(err)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "number", "status"),
    [
        ("train", signal.SIGINT, 130), ("train", signal.SIGTERM, 143),
        ("sample", signal.SIGTERM, 143), ("analyze", signal.SIGINT, 130),
    ],
)  # fmt: skip
def test_a_signal_where_there_is_nothing_to_save_ends_quietly(
    app, run, tmp_path, monkeypatch, mode, number, status
):
    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not act")

    monkeypatch.setattr(build, "dataset", interrupted)
    monkeypatch.setattr(pretrained, "load", interrupted)
    before = signal.getsignal(number)
    out = tmp_path / "out"
    checkpoint = [] if mode == "train" else [f"--checkpoint={run}"]
    _, err = app.run(f"--mode={mode}", *checkpoint, f"--workdir={out}", tiny=False, status=status)
    assert err == ""
    assert not out.exists()
    assert signal.getsignal(number) is before


def test_images_drawn_before_a_signal_stay_and_the_same_command_continues(
    app, run, tmp_path, monkeypatch
):
    def save_and_interrupt(folder, images, seeds):
        save_pngs(folder, images, seeds)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal did not act")

    save_pngs, command = sample.save_pngs, ("--mode=sample", f"--checkpoint={run}", "--seeds=0-19")
    with monkeypatch.context() as patch:
        patch.setattr(sample, "save_pngs", save_and_interrupt)
        _, err = app.run(*command, f"--workdir={tmp_path / 'out'}", tiny=False, status=130)
    assert err == ""
    cut = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("0*.png")}
    assert 0 < len(cut) < 20
    for workdir in ("out", "whole"):
        app.run(*command, f"--workdir={tmp_path / workdir}", tiny=False)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("0*.png")}
    assert len(whole) == 20
    assert {name: whole[name] for name in cut} == cut
    assert {path.name for path in (tmp_path / "out").rglob("0*.png")} == set(whole)
