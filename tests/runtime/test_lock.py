"""One writer per workdir, on local disk and on gs:// (a real server, see object_store.py)."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from warm_diffusion.runtime import lock, storage


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name, seconds in (("RENEW", 0.05), ("STALE", 0.6), ("POLL", 0.05)):
        monkeypatch.setattr(lock, f"_{name}_SECONDS", seconds)


def test_a_second_writer_is_refused_with_the_name_of_the_first(place):
    with (
        lock.hold(place),
        pytest.raises(ValueError, match="is being written by") as caught,
        lock.hold(place),
    ):
        pass
    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lock_that_was_let_go_is_free_and_leaves_nothing(place):
    for _ in range(2):
        with lock.hold(place) as check:
            assert (place / "lock.json").exists()
            check()
        assert not (place / "lock.json").exists()


def test_an_error_lets_go_too(place):
    with pytest.raises(RuntimeError), lock.hold(place):
        raise RuntimeError
    with lock.hold(place):
        pass


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    program = "import sys, os, signal; from warm_diffusion.runtime import lock\n"
    program += f"with lock.hold({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -9
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] != os.getpid()
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_what_an_ended_process_of_this_machine_left_on_gs_is_taken_over_at_once(store, monkeypatch):
    monkeypatch.setattr(lock, "_STALE_SECONDS", 1000.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    place = storage.path("gs://bucket/left")
    left = {"host": socket.gethostname(), "pid": ended.pid, "since": "2026"}
    storage.write_json(place / "lock.json", left)
    with lock.hold(place):
        pass


def test_a_lock_on_gs_that_is_not_renewed_is_taken_over_and_its_holder_notices(store, monkeypatch):
    place = storage.path("gs://bucket/stale")
    with lock.hold(place) as check:
        store_of_first = storage.object_store()
        call = store_of_first.call
        cut_off = [True]

        def broken(method, *arguments, **options):
            if method == "PATCH" and cut_off[0]:
                raise OSError("no network")
            return call(method, *arguments, **options)

        monkeypatch.setattr(store_of_first, "call", broken)
        with lock.hold(place) as second:
            cut_off[0] = False
            time.sleep(1.0)  # 20 tries to renew
            with pytest.raises(ValueError, match="was taken over by another process"):
                check()
            second()
    assert not (place / "lock.json").exists()


def test_a_first_holder_does_not_delete_the_lock_of_the_second(store):
    place = storage.path("gs://bucket/two")
    with lock.hold(place):
        storage.object_store().rm_file(str(place / "lock.json"))
        storage.write_bytes(place / "lock.json", b"another's")
    assert (place / "lock.json").read_bytes() == b"another's"


def test_a_lock_whose_file_cannot_be_deleted_is_let_go(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise OSError(5, "Input/output error", str(self))

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="Input/output") as caught,
        lock.hold(tmp_path),
    ):
        patch.setattr(pathlib.Path, "unlink", refuse)
    assert caught.tb  # with all that its frames hold: nothing is let go by the garbage collector
    with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_run_on_a_file_system_without_locks_continues_with_a_note(
    tmp_path, monkeypatch, capsys, number
):
    def unable(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", unable)
    with lock.hold(tmp_path):
        assert (tmp_path / "lock.json").exists()
    assert "has no locks" in capsys.readouterr().out
