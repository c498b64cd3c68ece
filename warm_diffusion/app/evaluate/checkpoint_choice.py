"""Which checkpoints of a training run to evaluate, and waiting for those that are still to come."""

import pathlib
import time
from collections.abc import Iterator

from warm_diffusion.app import Incomplete
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say
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
      wait: seconds to wait for a checkpoint that is not there yet; with `every` they count anew
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
        yield best_step(reports, finished_steps(training))
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
                f"training ends at step {last}. The same command goes on"
            )
        # One at a time: training may save, and remove, others meanwhile.
        step = min(set(steps) - done)
        done.add(step)
        yield step
        if not set(finished_steps(training)) - done and (step >= last or not wait):
            return


def best_step(reports: pathlib.Path, steps: list[int]) -> int:
    """The saved step with the smallest Frechet distance of the metric that most reports have."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(reports.glob("step_*.json")):
        report = storage.read_json(path)
        if report["step"] in steps and "metric" in report:
            values = found.setdefault(report["metric"], {})
            value = report[report["metric"]]
            values[report["step"]] = min(value, values.get(report["step"], value))
    if not found:
        raise ValueError(
            f"eval.checkpoint=best: no report in {reports} of a checkpoint that is there; evaluate "
            "with --config.eval.checkpoint=every first"
        )
    metric, values = max(found.items(), key=lambda item: len(item[1]))
    step = min(values, key=values.get)
    say(f"best     step {step:,} of {len(values)}: {metric} {values[step]:.4f}")
    return step
