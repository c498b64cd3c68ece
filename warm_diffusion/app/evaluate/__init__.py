"""Evaluation of checkpoints, and of saved models: `evaluator.py` says what is measured and kept."""

import pathlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from warm_diffusion import pretrained
from warm_diffusion.app import Incomplete, build, settings
from warm_diffusion.app.evaluate.checkpoint_choice import chosen_steps
from warm_diffusion.app.evaluate.evaluator import Evaluator
from warm_diffusion.runtime import processes, storage
from warm_diffusion.runtime.console import say, say_weights
from warm_diffusion.training.checkpoints import Damaged


def evaluate(config: ConfigDict, workdir: str, checkpoint: str, wait: float = 0.0) -> list[dict]:
    """Evaluates the checkpoints that `config.eval.checkpoint` names; returns their reports.

    Args:
      config: see section eval of `configs/default.py`.
      workdir: gets eval/step_N.json; may be the training's own.
      checkpoint: training workdir, its checkpoints/STEP, or a model folder.
      wait: seconds to wait for a checkpoint that is not there yet, see `chosen_steps`.

    Raises:
      ValueError: no usable checkpoint, a reference that does not fit, settings that do not work.
      Interrupted: SIGTERM or SIGINT; the same command continues.
      Incomplete: some checkpoints could not be evaluated, or did not come in time; the reports of
        the others are written.
    """
    evaluator = Evaluator(config, storage.path(workdir) / "eval")
    if pretrained.is_model_folder(checkpoint):
        return [evaluator.run(_load(config, checkpoint))]
    training, step = pretrained.split_checkpoint(checkpoint)
    which = config.eval.checkpoint
    if step is not None:
        if which not in ("latest", str(step)):
            raise ValueError(f"--checkpoint names step {step}, eval.checkpoint={which} another")
        which = str(step)
    run_config = training / "config.json"
    # Without it the configuration is the command line's alone: it must prove to be the run's.
    unproven = not run_config.exists()
    steps = _steps_of_first(
        chosen_steps(
            which, training, last=config.training.num_steps, wait=wait, reports=evaluator.folder
        )
    )
    reports, skipped = [], []
    for step in steps:
        if unproven and run_config.exists():
            settings.compare(config, storage.read_json(run_config), run_config)
            unproven = False
        try:
            model = _load(config, training / "checkpoints" / str(step))
        except ValueError as error:
            if which == "latest" and isinstance(error, Damaged):
                reports.append(evaluator.run(_load(config, training)))  # the newest sound one
                continue
            if which != "every":
                raise
            skipped.append(step)
            say(f"skipped  step {step:,}: {error}")
            continue
        reports.append(evaluator.run(model))
    if skipped:
        raise Incomplete(
            f"{len(skipped)} of {len(skipped) + len(reports)} checkpoints of {training} could not "
            f"be read (steps {skipped}); the others are evaluated"
        )
    return reports


def _steps_of_first(steps: Iterator[int]) -> Iterator[int]:
    """Process 0 looks for checkpoints, and waits; the others go by what it has found."""
    first = jax.process_index() == 0
    while (step := processes.first_says(next(steps, None) if first else None)) is not None:
        yield step


def _load(config: ConfigDict, checkpoint: str | pathlib.Path) -> pretrained.Model:
    model = pretrained.load(checkpoint, config.sampling.ema)
    say_weights(model.info, checkpoint)
    built = build.trained_architecture(config, model.architecture)
    return pretrained.Model(built, model.params, model.info)
