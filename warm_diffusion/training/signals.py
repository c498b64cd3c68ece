"""SIGTERM and SIGINT: a quiet end, or a request to stop after the current step."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# Of all questions since the start: JAX wants consecutive numbers, the same in all processes.
_questions = itertools.count()


class Ended(BaseException):
    """SIGINT or SIGTERM where there is nothing to save; `status` is what a shell calls it."""

    def __init__(self, number: signal.Signals):
        self.status = 128 + number


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """Raises `Ended` at the first SIGINT or SIGTERM, which cleans up; a second one ends at once.

    With several processes SIGTERM is JAX's (`_agreed`).
    """

    def end(number, _):
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Ended(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Catches the first SIGTERM or SIGINT; a second one acts at once, as if nothing were caught.

    Yields:
      A function that tells the name of the signal received, empty before. All processes of a run
      must ask equally often; they get the same answers, whichever received the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""  # Python delivers signals to the main thread alone
    elif jax.process_count() == 1:
        with _caught(signal.SIGTERM, signal.SIGINT) as received:
            yield lambda: received[0].name if received else ""
    else:
        with _agreed() as request:
            yield request


@contextlib.contextmanager
def _caught(*numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    received: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in numbers}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number, _):
        received.append(signal.Signals(number))
        restore()

    for number in numbers:
        signal.signal(number, request)
    try:
        yield received
    finally:
        restore()


@contextlib.contextmanager
def _agreed() -> Iterator[Callable[[], str]]:
    """JAX's runtime caught SIGTERM when it started, and chooses the step at which all stop."""

    def pass_on(number, _):
        signal.signal(number, before)
        os.kill(os.getpid(), signal.SIGTERM)

    def request() -> str:
        if not multihost_utils.reached_preemption_sync_point(next(_questions)):
            return ""
        # JAX's handler stays deaf to the second one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return "SIGTERM"

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
