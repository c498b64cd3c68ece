"""SIGTERM and SIGINT: a quiet end, or a request to stop after the current step."""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from warm_diffusion.runtime.console import say

# Questions since the start: JAX wants consecutive numbers, the same in all processes.
_questions = itertools.count()
_PATIENCE = 3.0  # seconds without a word


class Ended(BaseException):
    """SIGINT or SIGTERM where there is nothing to save; `status` is what a shell calls it."""

    def __init__(self, number: signal.Signals):
        self.status = 128 + number


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """Raises `Ended` at the first SIGINT or SIGTERM, which cleans up; a second one acts at once.

    With several processes SIGTERM is JAX's (`_agreed`).
    """

    def end(number: signal.Signals) -> None:
        raise Ended(number)

    with _first(end, signal.SIGINT, signal.SIGTERM):
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Catches the first SIGTERM or SIGINT; a second one acts at once, as if nothing were caught.

    Yields:
      A function that tells the name of the signal received, empty before. All processes of a run
      must ask equally often; they get the same answers, whichever received the signal.
    """
    if jax.process_count() == 1:
        received: list[signal.Signals] = []
        with _first(received.append, signal.SIGINT, signal.SIGTERM):
            yield lambda: received[0].name if received else ""
    else:
        with _first(lambda _: os.kill(os.getpid(), signal.SIGTERM), signal.SIGINT):
            yield _agreed


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says after three seconds that something is being compiled, and answers signals meanwhile.

    Python handles a signal when XLA, which cannot be interrupted, has finished. Until then a thread
    says so at the first SIGINT or SIGTERM, and ends the process at the second.
    """
    words = f"compile  {what}: seconds for a small network, minutes for a large one"
    note = threading.Timer(_PATIENCE, say, [words])
    note.daemon = True
    note.start()
    try:
        with _answered():
            yield
    finally:
        note.cancel()


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    # Python's handler in C writes the number of a signal there as it comes.
    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)

    def answer() -> None:
        waiting = False
        while numbers := ours.recv(64):
            for number in {signal.SIGINT, signal.SIGTERM} & set(numbers):
                if waiting or numbers.count(number) > 1:
                    os._exit(128 + number)
                words = "stopping once this is compiled and saved; again: end now, unsaved"
                print(words, file=sys.stderr, flush=True)
                waiting = True

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        pythons.close()
        thread.join()
        ours.close()


@contextlib.contextmanager
def _first(handle: Callable[[signal.Signals], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handles the first of these signals; then, and at the end, all is as it was before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number, _) -> None:
        restore()
        handle(signal.Signals(number))

    for number in numbers:
        signal.signal(number, first)
    try:
        yield
    finally:
        restore()


def _agreed() -> str:
    """JAX's runtime caught SIGTERM when it started, and chooses the step at which all stop."""
    if not multihost_utils.reached_preemption_sync_point(next(_questions)):
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX's handler stays deaf to the second one
    return "SIGTERM"
