"""metrics.jsonl and TensorBoard events; SIGTERM and SIGINT as requests."""

import json
import os
import signal

import numpy as np
import pytest

from warm_diffusion.training.signals import stop_requests
from warm_diffusion.training.writer import Writer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_go_to_jsonl_and_to_tensorboard(tmp_path):
    writer = Writer(tmp_path)
    writer.scalars(10, {"loss": 0.5, "grad_norm": 2.0})
    writer.image(10, "samples", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert lines(tmp_path) == [{"step": 10, "loss": 0.5, "grad_norm": 2.0}]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5)]
    assert len(events.Images("samples")) == 1


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    writer = Writer(tmp_path)
    writer.scalars(1, {"loss": float("nan"), "rate": float("inf")})
    writer.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "rate": None}]


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    writer = Writer(tmp_path)
    for step in (10, 20, 30):
        writer.scalars(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = Writer(tmp_path, first_step=20)
    writer.scalars(30, {"loss": 31})
    writer.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(10, 10), (20, 20), (30, 31)]


def test_two_writers_in_one_second_do_not_share_a_file(tmp_path):
    writers = [Writer(tmp_path), Writer(tmp_path)]
    for writer in writers:
        writer.close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


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


def test_signal_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
