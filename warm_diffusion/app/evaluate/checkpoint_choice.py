"""Chooses the checkpoints of a training run to evaluate, and waits for future ones."""

import collections
import json
import pathlib
import time
from collections.abc import Iterator

from warm_diffusion import pretrained
from warm_diffusion.app import Incomplete
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say, shorten
from warm_diffusion.training.checkpoints import finished_steps

_POLL_SECONDS = 1.0


def chosen_steps(
    which: str, training: pathlib.Path, *, last: int, wait: float, reports: pathlib.Path
) -> Iterator[int]:
    """The steps to evaluate: the latest, every, the best, or one.

    Args:
      which: latest, every, best, or a step.
      training: workdir of the training run.
      last: the step with which training ends.
      wait: seconds to wait for a checkpoint that is not there yet; with `every` they count again
        after each checkpoint.
      reports: folder of earlier evaluations, among which to look for the best.

    Raises:
      ValueError: no such checkpoint, or no report to tell the best one by.
      Incomplete: the time ran out before the last checkpoint came (`every`).
    """
    if which not in ("latest", "every", "best") and not which.isdigit():
        raise ValueError(f"eval.checkpoint must be latest, every, best or a step, got {which!r}")
    if not wait >= 0:
        raise ValueError(f"--wait must be seconds, at least 0, got {wait}")
    if which == "every":
        yield from _every(training, last, wait)
        return
    if which == "best":
        yield best_step(reports, training)
        return
    wanted = int(which) if which.isdigit() else None
    steps = _wait_for(training, wait, lambda steps: wanted in steps if which != "latest" else steps)
    if not steps:
        raise ValueError(
            f"there is no checkpoint{'' if wanted is None else f' of step {wanted}'} in "
            f"{training / 'checkpoints'}: there are {finished_steps(training) or 'none'}"
            + (f" after {wait:g} s of waiting" if wait else "; train first, or set --checkpoint")
        )
    yield steps[-1] if wanted is None else wanted


def _wait_for(training: pathlib.Path, wait: float, is_enough) -> list[int]:
    """Polls until the saved steps are enough; then returns them, or [] when the time is up."""
    limit, announced = time.monotonic() + wait, False
    while not is_enough(steps := finished_steps(training)):
        if time.monotonic() >= limit:
            return []
        if not announced:
            say(f"wait     for a checkpoint in {training}, up to {wait:g} s")
            announced = True
        time.sleep(min(_POLL_SECONDS, wait))
    return steps


def _every(training: pathlib.Path, last: int, wait: float) -> Iterator[int]:
    done: set[int] = set()
    while True:
        steps = _wait_for(training, wait, lambda steps: set(steps) - done)
        if not steps and not done:
            raise ValueError(
                f"there are no checkpoints in {training / 'checkpoints'}"
                + (f" after {wait:g} s of waiting" if wait else ": train first")
            )
        if not steps:
            raise Incomplete(
                f"no checkpoint of {training} came within {wait:g} s after step {max(done)}; "
                f"training ends at step {last}. The same command continues"
            )
        # One at a time: training may save, and remove, others meanwhile.
        step = min(set(steps) - done)
        done.add(step)
        yield step
        if not set(finished_steps(training)) - done and (step >= last or not wait):
            return


# In which two reports must agree to be compared; what is left are the step and its weights.
_PROTOCOL = (
    "metric", "seeds", "training_data_sha256", "dtype", "weights", "num_samples", "network_calls",
    "sampling", "schedule", "features", "metric_settings", "reference",
)  # fmt: skip


def best_step(reports: pathlib.Path, training: pathlib.Path) -> int:
    """The saved step of least distance, under the protocol by which most steps are reported.

    Reports on other weights than the step has, and unreadable ones, are skipped with a note.
    """
    steps, found = finished_steps(training), collections.defaultdict(list)
    for path in sorted(reports.glob("step_*.json")):
        try:
            report = storage.read_json(path)
            protocol = json.dumps([report[key] for key in _PROTOCOL], sort_keys=True)
            value = float(report[report["metric"]])
        except (ValueError, KeyError, TypeError) as error:
            say(f"note     {path} is skipped: it is no report ({shorten(repr(error))})")
            continue
        if report["step"] in steps:
            found[protocol].append((value, report["step"], path, report))
    by_number = sorted(found.values(), key=lambda group: len({g[1] for g in group}), reverse=True)
    for group in by_number:
        for value, step, path, report in sorted(group, key=lambda one: one[:2]):
            try:
                place = training / "checkpoints" / str(step)
                weights = pretrained.load(place, report["sampling"]["ema"]).info["weights_sha256"]
                if weights != report["weights_sha256"]:
                    raise ValueError("it reports on other weights than this checkpoint's")
            except (ValueError, KeyError, TypeError) as error:
                say(f"note     {path} is skipped: {shorten(str(error))}")
                continue
            say(f"best     step {step:,} of {len(group)}: {report['metric']} {value:.4f}")
            return step
    raise ValueError(
        f"eval.checkpoint=best: no report in {reports} of a checkpoint that is there; evaluate "
        "with --config.eval.checkpoint=every first"
    )
