"""SIGTERM and SIGINT as a request to stop after the current step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Catches the first SIGTERM or SIGINT; a second one acts at once, as if nothing were caught.

    Yields:
      A function that tells the name of the signal received, empty before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""  # Python delivers signals to the main thread alone
        return
    received = []
    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in watched}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number, _):
        received.append(signal.Signals(number).name)
        restore()

    for number in watched:
        signal.signal(number, request)
    try:
        yield lambda: received[0] if received else ""
    finally:
        restore()
