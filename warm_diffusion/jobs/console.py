"""What jobs say to a person: one line at a time, beside any progress bar."""

import sys

import jax
from tqdm import tqdm


def say(text: str) -> None:
    """Prints a line, on the first process only."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar, on a terminal and on the first process only."""
    hidden = None if jax.process_index() == 0 else True
    return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=hidden)
