"""Prints messages of jobs: one line at a time, beside any progress bar."""

import logging
import sys
import warnings

import jax
from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line, on the first process only."""
    if jax.process_index() == 0:
        # A file name may hold bytes that are no text.
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        tqdm.write(shown, file=sys.stdout)
        sys.stdout.flush()


def shorten(text: str, most: int = 300) -> str:
    """One line of text; of a longer one than `most` characters the beginning and the end."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - most // 3 - 5]} ... {line[-most // 3 :]}"


def say_weights(info: dict, checkpoint: str) -> None:
    """Prints which weights a job uses."""
    step = f", step {info['step']:,}" if "step" in info else ""
    say(f"weights  {info.get('weights', 'as they are')}{step} of {checkpoint}")


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar, on a terminal and on the first process only."""
    hidden = None if jax.process_index() == 0 else True
    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=hidden)


def hide_libraries() -> None:
    """Hides libraries' warnings and the tracebacks of their threads; --debug shows them.

    The caller that waits for a thread reports its error in one line.
    """
    warnings.simplefilter("ignore")
    for name in ("absl", "asyncio", "fsspec", "gcsfs", "google", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.exc_info)
    sys.excepthook = sys.unraisablehook = lambda *_: None
