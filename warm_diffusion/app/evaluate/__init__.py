"""Evaluation: distances between samples and data, the protocol in every name.

One JSON file per checkpoint, WORKDIR/eval/step_N.json, with mean, deviation and minimum over
`eval.repeats` rounds of `eval.num_samples` images (seeds 0 to n - 1, n to 2 n - 1, ...), and
all that decides the numbers: network calls, solver, path, weights, features, reference, each with
its hash. The same numbers go to TensorBoard (WORKDIR/eval).

Every image is drawn from its own seed, so neither batches nor devices matter. A round that is done
is kept, WORKDIR/eval/rounds: an evaluation that is stopped loses the round it was in, and one of
more rounds uses those there are. A report of another protocol in the same place is renamed, never
overwritten.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import pretrained, schedules
from warm_diffusion.app import Incomplete, Interrupted, build, settings
from warm_diffusion.app.evaluate import bits_per_dim
from warm_diffusion.app.evaluate.checkpoint_choice import chosen_steps
from warm_diffusion.evaluation import metrics, reference
from warm_diffusion.pretrained import NUM_SEEDS, Model
from warm_diffusion.runtime import devices, processes, storage
from warm_diffusion.runtime.console import say
from warm_diffusion.training.signals import stop_requests
from warm_diffusion.training.writer import Writer


def evaluate(config: ConfigDict, workdir: str, checkpoint: str, wait: float = 0.0) -> list[dict]:
    """Evaluates the checkpoints that `config.eval.checkpoint` names; returns their reports.

    `checkpoint` is a training workdir, its checkpoints/STEP, or a model folder; `workdir` may be
    the training's own; `wait` are the seconds of `chosen_steps`.

    Raises:
      ValueError: no usable checkpoint, a reference that does not fit, settings that do not work.
      Interrupted: SIGTERM or SIGINT; the same command continues with the round it was in.
      Incomplete: some checkpoints could not be evaluated, or did not come in time; the reports of
        the others are written.
    """
    evaluator = _Evaluator(config, storage.path(workdir) / "eval")
    if pretrained.is_model(checkpoint):
        return [evaluator.run(build.trained(config, checkpoint))]
    training, step = pretrained.split_checkpoint(checkpoint)
    which = config.eval.checkpoint
    if step is not None:
        if which not in ("latest", str(step)):
            raise ValueError(f"--checkpoint names step {step}, eval.checkpoint={which} another")
        which = str(step)
    run_config = training / "config.json"
    # Without it the configuration is the command line's alone: it must prove to be the run's.
    unproven = not run_config.exists()
    last, reports, skipped = config.training.num_steps, [], []
    for step in _of_first(
        chosen_steps(which, training, last=last, wait=wait, reports=evaluator.folder)
    ):
        if unproven and run_config.exists():
            settings.compare(config, storage.read_json(run_config), run_config)
            unproven = False
        try:
            model = build.trained(config, training / "checkpoints" / str(step))
        except ValueError as error:
            if which == "latest":  # it is damaged, or training has removed it meanwhile
                model = build.trained(config, training)  # the newest sound one
            elif which == "every":
                skipped.append(step)
                say(f"skipped  step {step:,}: {error}")
                continue
            else:
                raise
        reports.append(evaluator.run(model))
    if skipped:
        raise Incomplete(
            f"{len(skipped)} of {len(skipped) + len(reports)} checkpoints of {training} could not "
            f"be read (steps {skipped}); the others are evaluated"
        )
    return reports


def _of_first(steps: Iterator[int]) -> Iterator[int]:
    """Process 0 looks for checkpoints, and waits; the others go by what it has found."""
    first = jax.process_index() == 0
    while (step := processes.first_says(next(steps, None) if first else None)) is not None:
        yield step


class _Evaluator:
    """Evaluates checkpoints of one run under one protocol."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path):
        self.folder, self._mesh = folder, devices.make_mesh()
        self._config, self._options = config, config.eval
        self._sampler = self._extract = self._reference = None
        if config.eval.features != "auto":  # a wrong name shows before any waiting
            self._extract = build.extractor(config, ())

    def run(self, model: Model) -> dict:
        """Evaluates one checkpoint, or returns its report if it exists."""
        if self._sampler is None:
            self._extract = self._extract or build.extractor(self._config, model.image_shape)
            self._reference = self._find_reference(model)
            count = self._num_samples()
            self._sampler = build.sampler(self._config, model, self._mesh, num_images=count)
        began, options = time.monotonic(), self._options
        protocol = self._protocol(model)
        identity = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
        name = f"step_{model.info['step']:08d}" if "step" in model.info else "model"
        path, wanted = self.folder / f"{name}.json", {}
        if options.likelihood:
            wanted = {"images": options.likelihood_images, "trace": options.likelihood_trace}
        earlier = processes.first_says(_read(path))
        if (
            earlier.get("identity") == identity
            and len(earlier["rounds"]) == options.repeats
            and wanted in ({}, earlier.get("likelihood"))
        ):
            say(f"eval     {_label(model)} is evaluated already: {path}")
            return earlier
        count = protocol["num_samples"]
        if options.repeats * count > NUM_SEEDS:
            raise ValueError(
                f"seeds must stay below 2^32, got {options.repeats} times {count} images"
            )
        rounds = []
        for first in range(0, options.repeats * count, count):
            kept = self.folder / "rounds" / f"{name}_{identity}_{first}.json"
            found = processes.first_says(_read(kept))
            if not found:
                found = self._round(model, range(first, first + count))
                if jax.process_index() == 0:
                    storage.write_json(kept, found)
            rounds.append(found)
        report = metrics.summarise(rounds) | protocol
        report |= {
            "metric": metrics.main_metric(count, self._reference),
            "seeds": f"0-{len(rounds) * count - 1}",
            "rounds": rounds,
            "reference": protocol["reference"] | {"sha256": reference.fingerprint(self._reference)},
            "device": f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy")},
            "identity": identity,
        }
        if warning := metrics.warnings(count, self._reference):
            report["warning"] = warning
        if wanted:
            report |= {"likelihood": wanted} | self._likelihood(model)
        report["seconds"] = round(time.monotonic() - began, 1)
        if jax.process_index() == 0:
            self._store(path, report, earlier)
        _say(report, path)
        return report

    @functools.cached_property
    def _dataset(self):
        return build.dataset(self._config)

    def _find_reference(self, model: Model) -> reference.FeatureStatistics:
        """The statistics to compare with: `eval.reference`, or of `config.data`, kept for later."""
        expected = {
            "features": self._extract.name,
            "weights_hash": self._extract.weights_hash,
            "image_shape": list(model.image_shape),
        }
        given = self._options.reference
        if given:
            statistics = reference.load(given)
        else:
            found = build.provenance(self._config, self._dataset, self._extract)
            reference.check(found, expected, "config.data")
            key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
            kept = self.folder / f"reference_{key}.npz"
            there = kept.exists()
            processes.agree(**{f"whether {kept} is there": there})
            if there:
                statistics = reference.load(kept)
                expected |= found
            else:
                images = reference.in_batches(self._dataset.images)
                statistics = reference.collect(self._extract, images, found)
                if jax.process_index() == 0:
                    reference.save(kept, statistics)
        # Called train, it must be what the network was trained on; of another part at least
        # prepared alike.
        if statistics.provenance["split"] == "train":
            if "data_sha256" in model.info:
                expected["data_sha256"] = model.info["data_sha256"]
        elif given:
            expected["recipe"] = self._dataset.info["resize"]
        reference.check(statistics.provenance, expected, given or "config.data as reference")
        return statistics

    def _num_samples(self) -> int:
        """Images of a round."""
        count = self._options.num_samples or self._reference.provenance["count"]
        if not count:
            raise ValueError(
                f"{self._options.reference} does not state its number of images: set "
                "eval.num_samples (50000 for FID)"
            )
        return count

    def _protocol(self, model: Model) -> dict:
        """All that decides the numbers of a round, given its seeds."""
        count, sampling = self._num_samples(), self._config.sampling.to_dict()
        sampling.pop("batch_size")
        return {
            "step": model.info.get("step", 0),
            "weights_sha256": model.info["weights_sha256"],
            "training_data_sha256": model.info.get("data_sha256", "not known"),
            "dtype": model.network.dtype.__name__,
            "weights": model.info["weights"],
            "num_samples": count,
            "network_calls": self._sampler.num_calls,
            "solver": sampling["solver"],
            "bnr": path_bnr(self._sampler.schedule),
            "sampling": sampling,
            "schedule": build.chosen_path(self._config),
            "features": {"name": self._extract.name, "weights_hash": self._extract.weights_hash},
            "metric_settings": metrics.settings(count, self._reference),
            "reference": self._reference.provenance,
        }

    def _round(self, model: Model, seeds: range) -> dict:
        """The metrics of the images of some seeds."""
        start = self._dataset.images if self._sampler.schedule.needs_start else None
        params = devices.put_replicated(model.params, self._mesh)
        name = f"{_label(model)}, seeds {seeds[0]}-{seeds[-1]}"

        def drawn(asked_to_stop) -> Iterator[np.ndarray]:
            for batch in self._sampler.generate(params, seeds, start):
                yield batch
                if reason := asked_to_stop():
                    raise Interrupted(
                        f"{reason}: stopped within the round of seeds {seeds[0]}-{seeds[-1]}; the "
                        "rounds before are kept, and the same command continues with this one"
                    )

        with stop_requests() as asked_to_stop:
            generated = reference.collect(
                self._extract, drawn(asked_to_stop), {"count": len(seeds)}, name
            )
        found = metrics.compare(generated, self._reference)
        return {"seeds": f"{seeds[0]}-{seeds[-1]}", **found}

    def _likelihood(self, model: Model) -> dict[str, float]:
        data, split = self._dataset, build.split_name(self._config)
        found = build.provenance(self._config, data, self._extract)
        expected = {"image_shape": list(model.image_shape)}
        if split == "train" and "data_sha256" in model.info:
            expected["data_sha256"] = model.info["data_sha256"]
        reference.check(found, expected, "config.data, for its likelihood,")
        return bits_per_dim.measure(self._config, model, data, split, self._mesh)

    def _store(self, path: pathlib.Path, report: dict, earlier: dict) -> None:
        numbers = metrics.summarise(report["rounds"]) | _bits(report)
        writer = Writer(self.folder, first_step=None)
        with contextlib.closing(writer):
            writer.scalars(report["step"], {k: v for k, v in numbers.items() if v is not None})
        # The same protocol with other rounds, which are kept, or now with a likelihood as well:
        # nothing is lost by writing over it.
        same = earlier.get("identity") == report["identity"]
        if earlier and not (same and earlier.get("likelihood") in (None, report.get("likelihood"))):
            aside = path.with_suffix(f".{earlier.get('identity', 'earlier')}.json")
            while aside.exists():
                aside = aside.with_suffix(".again.json")
            storage.move(path, aside)
            say(f"note     the report of another protocol is now {aside}")
        storage.write_json(path, report)  # last: where it is, nothing is done again


def _say(report: dict, path: pathlib.Path) -> None:
    name, spread = report["metric"], ""
    if report[f"{name}_std"] is not None:
        spread = (
            f" +- {report[f'{name}_std']:.4f} over {len(report['rounds'])} rounds, "
            f"least {report[f'{name}_min']:.4f}"
        )
    if "warning" in report:
        say(f"warning  {report['warning']}")
    say(f"eval     {name} = {report[name]:.4f}{spread}")
    how = f"{report['solver']}, {report['network_calls']} network calls, {report['weights']}"
    say(f"         {how}, {report['seconds']:.1f} s, in {path}")
    for name, value in _bits(report).items():
        say(f"eval     {name} = {value:.4f}")


def path_bnr(path: schedules.Schedule) -> float | list[float]:
    """Blur-to-noise ratio of a path, to four digits; both ends' where it is not constant."""
    ends = [float(f"{float(path.bnr(t)):.4g}") for t in (path.t_min, path.t_max)]
    return ends[0] if ends[0] == ends[1] else ends


def _bits(report: dict) -> dict[str, float]:
    return {name: value for name, value in report.items() if name.startswith("bpd")}


def _label(model: Model) -> str:
    """The name of a checkpoint by its step, or of a model that does not know its step."""
    return f"step {model.info['step']:,}" if "step" in model.info else "the model"


def _read(path: pathlib.Path) -> dict:
    """Returns the content of a JSON file, or {} if there is none."""
    try:
        return storage.read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{error}: delete it") from error
