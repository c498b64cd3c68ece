"""Batches of training: batches ahead of the devices, no read of their results, profiles."""

import concurrent.futures
import contextlib
import pathlib
import threading
import time

import jax
import numpy as np
import pytest

from tests.app.conftest import STEPS, assert_same_but_for_round_off, rows
from tests.test_benchmarks import tiny_config
from warm_diffusion.app.train import profile
from warm_diffusion.app.train.loop import Loop, batches
from warm_diffusion.runtime import devices, storage


def test_two_batches_are_under_way_while_one_is_used():
    loaded = threading.Semaphore(0)
    started = []

    def load(done):
        started.append(done)
        loaded.release()
        return done

    found = batches(load, range(4, 20, 2))
    assert next(found).result() == 4
    for _ in range(3):
        loaded.acquire()
    time.sleep(0.05)  # a fourth would have begun by now
    assert started == [4, 6, 8]
    assert [batch.result() for batch in found] == [6, 8, 10, 12, 14, 16, 18]


def test_an_error_of_the_thread_reaches_the_step_that_needs_the_batch():
    def load(done):
        if done == 1:
            raise OSError("the disk is gone")
        return done

    found = batches(load, range(5))
    assert next(found).result() == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(found).result()
    found.close()


class Unread:
    """A result that is on the devices: nothing of it may be asked for."""

    def __init__(self, step):
        self.step = step  # read before the first step alone

    def __getattr__(self, name):
        raise AssertionError(f"the loop asked for {name} of step {self.step}")


def test_between_reports_the_loop_reads_no_result_and_waits_for_none(tmp_path, monkeypatch):
    """All but the first step, whose time is reported."""
    config = tiny_config()
    config.training.num_steps, config.training.log_every = 20, 10
    monkeypatch.setattr(jax, "block_until_ready", lambda state: waited.append(state.step))
    # Batches are there before the loop asks for them.
    monkeypatch.setattr(concurrent.futures.Future, "done", lambda future: True)
    reports, waited = [], []

    class Watched(Loop):
        def _report(self, step, state, metrics, clock):
            reports.append(step)

        def _save(self, step, state):
            pass

    loop = Watched(
        config, tmp_path, lambda state, *_: (Unread(state.step + 1), None), lambda done: done,
        *[None] * 6, devices.make_mesh(1),
    )  # fmt: skip
    assert loop.run(Unread(0)).step == 20
    assert reports == [10, 20]
    assert waited == [1, 20]  # the last is saved


@pytest.mark.parametrize("sharding", ["replicated", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_step_sends_and_reads_nothing_takes_the_states_place_and_is_compiled_once(
    app, tmp_path, monkeypatch, sharding
):
    steps, programs = Loop._steps, []

    def guard(loop, *rest):
        step = loop.step

        def alone(state, *others):
            with jax.transfer_guard("disallow"):
                found = step(state, *others)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.ema)))
            programs.append(step._cache_size())
            return found

        loop.step = alone
        return steps(loop, *rest)

    monkeypatch.setattr(Loop, "_steps", guard)
    flags = "--config.training.num_steps=3", f"--config.training.sharding={sharding}"
    app.run(f"--workdir={tmp_path}", *flags)
    # Other tests may have compiled the step for other data before.
    assert programs == [programs[0]] * 3


@pytest.mark.long
def test_two_steps_a_call_from_disk_train_as_one_a_call_and_are_profiled(app, uninterrupted):
    """In two sittings; to rounding, for the compiler fuses other operations."""
    workdir = app.folder / "calls"
    flags = [
        "--config.training.steps_per_call=2", "--config.training.log_every=2",
        "--config.training.device_megabytes=0", "--config.training.profile_steps=3,4",
    ]  # fmt: skip
    app.run(f"--workdir={workdir}", *flags, "--config.training.num_steps=4",
            "--config.training.checkpoint_every=4")  # fmt: skip
    assert list(workdir.glob("plugins/profile/*/*.xplane.pb"))
    out, _ = app.run(f"--workdir={workdir}", *STEPS, *flags)
    assert "continues at step 4 (64 images)" in out
    assert [row["step"] for row in rows(workdir)] == [2, 4, 6, 8]
    assert_same_but_for_round_off(uninterrupted, workdir, steps=())


def test_steps_per_call_that_do_not_meet_the_edges_of_a_run_are_refused(app, trained, tmp_path):
    _, err = app.run(f"--workdir={tmp_path}", "--config.training.steps_per_call=7", status=2)
    assert "training.steps_per_call=7 must divide training.num_steps=1500" in err
    flags = ("--config.training.steps_per_call=4", "--config.training.num_steps=8",
             "--config.training.checkpoint_every=4", "--config.training.log_every=4")  # fmt: skip
    _, err = app.run(f"--workdir={trained[0]}", *flags, status=2)
    assert "steps_per_call=4 must divide the 6 steps of the run so far: continue it with 1" in err


def test_a_profile_that_cannot_be_written_is_the_disks_error(tmp_path, monkeypatch):
    """And none of the profiler's, which has ended by then."""
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    stops = iter([None])
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: next(stops))
    found = profile.Profile(tmp_path, (1, 1))
    found.look(0, 1, np.zeros(1))
    (pathlib.Path(found._local.name) / "trace").write_text("")

    def refuse(path, content):
        raise PermissionError(path)

    monkeypatch.setattr(storage, "write_bytes", refuse)
    with pytest.raises(PermissionError), contextlib.closing(found):
        found.look(1, 1, np.zeros(1))
    found.close()
