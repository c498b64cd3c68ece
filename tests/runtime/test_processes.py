"""Who is there, who differs, why one ended: the connections between the processes of a run."""

import socket
import subprocess
import sys
import threading

import pytest

from warm_diffusion.runtime import processes
from warm_diffusion.runtime.cluster_group import connect


def free_port():
    """A port that is free, and the one that the connections of the run use with it."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("localhost", port + (4096 if port + 4096 < 2**16 else -4096)))
            except OSError:
                continue
            return port


def in_threads(functions):
    """What each function returns or raises, all run at the same time."""
    found = [None] * len(functions)

    def run(i):
        try:
            found[i] = functions[i]()
        except ValueError as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def connected():
    """Connects processes of these numbers; at the end all have done their part."""
    made = []

    def make(indices, count=None, seconds=10.0):
        port, count = free_port(), count or len(indices)
        found = in_threads(
            [lambda i=i: connect("localhost", port, count, i, seconds) for i in indices]
        )
        made.extend(group for group in found if not isinstance(group, ValueError))
        return found

    yield make
    for group in made:
        group.leave()


def test_processes_that_say_the_same_agree(connected):
    groups = connected(range(3))
    assert [group.index for group in groups] == [0, 1, 2]
    for facts in ({"a": 1, "b": [1, 2]}, {}, {"c": None}):
        assert in_threads([lambda g=g, f=facts: g.agree(f) for g in groups]) == [None] * 3


def test_what_differs_is_said_in_every_process(connected):
    groups = connected(range(3))
    told = [{"seed": 1, "jax": "x"}, {"seed": 1, "jax": "x"}, {"seed": 2, "jax": "x"}]
    found = in_threads([lambda g=g, f=f: g.agree(f) for g, f in zip(groups, told, strict=True)])
    host = socket.gethostname()
    expected = f"process 2 ({host}) differs from process 0 ({host}): seed is 2, not 1"
    assert [str(error) for error in found] == [expected] * 3


def test_those_who_do_not_come_are_named_to_those_who_did(connected):
    found = connected([0, 2], count=4, seconds=0.5)
    assert [str(error) for error in found] == [
        "of 4 processes these did not come in 0.5 s: 1, 3"
    ] * 2


def test_without_process_0_it_is_said_where_it_was_looked_for(connected):
    (found,) = connected([1], count=2, seconds=0.3)
    assert "process 0 does not answer at localhost:" in str(found)
    assert "is it started, with this --coordinator_address, and the port open?" in str(found)


def test_two_processes_of_one_number_are_refused(connected):
    found = connected([0, 1, 1], count=3)
    assert any("came a second time" in str(error) for error in found[1:])
    assert "process 1 of 3" in str(found[0])
    assert "--process_id must differ" in str(found[0])


def test_different_numbers_of_processes_are_refused():
    port = free_port()
    found = in_threads(
        [
            lambda: connect("localhost", port, 3, 0, 10.0),
            lambda: connect("localhost", port, 2, 1, 10.0),
        ]
    )
    for error in found:
        assert "process 1 of 2" in str(error)
        assert "process 0 of 3 were started with different --num_processes" in str(error)


@pytest.mark.parametrize(
    "says", [b"GET / HTTP/1.1\r\n\r\n", b"5\n", b'{"kind": "bye"}\n', b"\xff\n"]
)
def test_a_stranger_on_the_port_is_passed_over(says):
    port = free_port()
    groups = []

    def first():
        groups.append(connect("localhost", port, 2, 0, 10.0))

    server = threading.Thread(target=first)
    server.start()
    own = port + (4096 if port + 4096 < 2**16 else -4096)
    while True:
        try:
            stranger = socket.create_connection(("localhost", own), timeout=5)
            break
        except ConnectionRefusedError:
            continue
    stranger.sendall(says)
    groups.append(connect("localhost", port, 2, 1, 10.0))
    server.join()
    stranger.close()
    assert in_threads([lambda g=g: g.agree({"a": 1}) for g in groups]) == [None, None]
    for group in groups:
        group.leave()


ENDING = """
import sys, threading, time
from warm_diffusion.runtime.cluster_group import connect
group = connect("localhost", {port}, 3, {index}, 20.0)
group.agree({{}})
{last}
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("last", "ends", "status", "said"),
    [
        ("group.end(3, 'diverged')", 1, 3, "ended with status 3: diverged"),
        ("group.end(2, 'no data')", 0, 2, "ended with status 2: no data"),
        ("import os; os._exit(0)", 1, 75, "was lost: killed, or its machine or the network"),
        ("import os; os._exit(0)", 0, 75, "was lost: killed, or its machine or the network"),
    ],
)  # fmt: skip
def test_when_one_process_ends_all_end_with_its_status_and_reason(last, ends, status, said):
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c",
             ENDING.format(port=port, index=index, last=last if index == ends else "")],
            stderr=subprocess.PIPE, text=True,
        )
        for index in range(3)
    ]  # fmt: skip
    for index, process in enumerate(started):
        _, err = process.communicate(timeout=50)
        if index != ends:
            assert process.returncode == status
            assert err.startswith(f"error: process {ends} (")
            assert said in err
            assert err.count("\n") == 1


def test_a_process_that_has_done_its_part_takes_nobody_with_it(connected):
    groups = connected(range(3))
    groups[1].leave()
    groups[1]._links[0]._connection.shutdown(socket.SHUT_RDWR)
    for group in (groups[0], groups[2]):
        assert group.why_others_ended(0.5) is None


def test_where_no_cluster_is_known_what_is_missing_is_told(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    message = "no cluster that JAX knows .* --num_processes, --process_id is missing"
    with pytest.raises(ValueError, match=message):
        processes.join("localhost:1234", None, None)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a number, got 'two'"):
        processes.join("localhost:1234", None, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost", 2, 0), "must be HOST:PORT, got 'localhost'"),
        (("localhost:x", 2, 0), "must be HOST:PORT"),
        (("localhost:99999", 2, 0), "must be HOST:PORT"),
        (("localhost:1234", 2, 2), "--process_id must be 0 to 1"),
    ],
)
def test_an_address_or_number_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*arguments)


def test_gpus_that_no_slurm_task_takes_are_told(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x2)")
    assert "start one task per GPU (--ntasks-per-node=8)" in processes.unused_devices()
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "8(x2)")
    assert processes.unused_devices() == ""


def test_an_error_of_one_process_alone_is_its_own():
    assert processes.caused_by_another(ValueError("UNKNOWN: Gloo AllGather failed")) is None
