"""SIGTERM and SIGINT: a quiet end, or a request to stop after the current step."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# Questions since the start: JAX wants consecutive numbers, the same in all processes.
_questions = itertools.count()


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
