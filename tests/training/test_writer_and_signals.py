"""metrics.jsonl and TensorBoard events; SIGTERM and SIGINT as requests."""

import hashlib
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest

from warm_diffusion.runtime import storage
from warm_diffusion.training import signals
from warm_diffusion.training import writer as writer_module
from warm_diffusion.training.signals import stop_requests
from warm_diffusion.training.writer import Writer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_go_to_jsonl_and_to_tensorboard(place, tmp_path):
    writer = Writer(place)
    writer.scalars(10, {"loss": 0.5, "grad_norm": 2.0})
    writer.image(10, "samples", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert lines(place) == [{"step": 10, "loss": 0.5, "grad_norm": 2.0}]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = place.glob("events.out.tfevents.*")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5)]
    assert len(events.Images("samples")) == 1


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    writer = Writer(tmp_path)
    writer.scalars(1, {"loss": float("nan"), "rate": float("inf")})
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "rate": None}]


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(place):
    writer = Writer(place)
    for step in (10, 20, 30):
        writer.scalars(step, {"loss": step})
    writer.close()
    cut_off = (place / "metrics.jsonl").read_bytes() + b'{"step": 40, "lo'  # killed while writing
    storage.write_bytes(place / "metrics.jsonl", cut_off)
    writer = Writer(place, first_step=20)
    writer.scalars(30, {"loss": 31})
    writer.close()
    assert [(row["step"], row["loss"]) for row in lines(place)] == [(10, 10), (20, 20), (30, 31)]


def test_two_writers_in_one_second_do_not_share_a_file(place):
    writers = [Writer(place), Writer(place)]
    for writer in writers:
        writer.close()
    assert len(list(place.glob("events.out.tfevents.*"))) == 2


def test_events_reach_gs_during_a_run(store, monkeypatch):
    place, now = storage.path("gs://bucket/events"), [0.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    writer = Writer(place)
    sizes = []
    for n in range(3):
        writer.scalars(n, {"loss": 0.5})
        sizes.append(sum(len(file.read_bytes()) for file in place.glob("events.*")))
        now[0] += 100
    assert sizes[0] == sizes[1] == 0 < sizes[2]  # every 120 seconds
    writer.close()


class Wandb:
    """The part of wandb that is used, which keeps what it is told."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self):
        self.runs, self.told = [], []

    def init(self, **options):
        self.runs.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "training_step")

    def log(self, values):
        self.told.append(values)

    def Image(self, image):
        return image.shape

    def finish(self):
        self.told.append("finished")


def test_wandb_receives_the_same_numbers_and_continues_its_run(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (10, 20):
        writer = Writer(tmp_path, step - 10, ("wandb",), {"seed": 3})
        writer.scalars(step, {"loss": 0.5, "rate": float("nan")})
        writer.close()
    assert [row["rate"] for row in lines(tmp_path)] == [None, None]
    assert fake.told == [
        {"training_step": 10, "loss": 0.5}, "finished",
        {"training_step": 20, "loss": 0.5}, "finished",
    ]  # fmt: skip
    assert fake.runs[0]["config"] == {"seed": 3}
    assert fake.runs[0]["id"] == fake.runs[1]["id"]
    assert fake.runs[0]["resume"] == "allow"
    (tmp_path / "wandb.json").unlink()  # a workdir made anew at the same place is another run
    Writer(tmp_path, 0, ("wandb",), {"seed": 3}).close()
    assert fake.runs[2]["id"] != fake.runs[0]["id"]
    assert not list(tmp_path.glob("events.*"))  # not asked for


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    fake = Wandb()

    def init(**_):
        raise fake.errors.Error("no API key")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"no API key\); wandb login, WANDB_MODE=offline"):
        Writer(tmp_path, writers=("wandb",))


def test_a_writer_that_is_not_installed_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(writer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="names wandb, which is not installed: pip install wandb"):
        writer_module.check(("tensorboard", "wandb"))
    writer_module.check(("tensorboard",))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_acts(number):
    acted = []

    def own(*_):
        acted.append(True)

    before = signal.signal(number, own)
    try:
        with stop_requests() as stop_request:
            assert stop_request() == ""
            os.kill(os.getpid(), number)
            assert stop_request() == number.name
            assert not acted
            os.kill(os.getpid(), number)
            assert acted
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_while_a_program_compiles_the_first_signal_is_answered_and_the_second_ends(
    monkeypatch, capsys
):
    """Hashing a password is as deaf as XLA: neither looks at signals before it is done."""
    ended, said = [], []
    monkeypatch.setattr(signals, "_PATIENCE", 0.05)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    monkeypatch.setattr(signals, "say", said.append)

    def press(after):
        def send():
            told.append(capsys.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(after, send)
        timer.start()
        return timer

    told = []
    with signals.stop_requests() as stop_request:
        with signals.compiling("the step"):
            presses = [press(0.1), press(0.2)]
            hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second
        for timer in presses:
            timer.join()
        assert stop_request() == "SIGINT"
    assert told == ["", "stopping once this is compiled and saved; again: end now, unsaved\n"]
    assert ended == [128 + signal.SIGINT]
    assert said == ["compile  the step: seconds for a small network, minutes for a large one"]
    assert signal.set_wakeup_fd(-1) == -1


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
