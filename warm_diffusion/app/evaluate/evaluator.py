"""Evaluation: distances between samples and data, the protocol in every name.

One JSON file a checkpoint, WORKDIR/eval/step_N.json, with mean, standard deviation and minimum over
`eval.seed_ranges` rounds of `eval.num_samples` images (seeds 0 to n - 1, n to 2 n - 1, ...), and
all that decides the numbers: network calls, solver, path, weights, features, reference, each with
its hash. The same numbers go to TensorBoard (WORKDIR/eval).

Every image is drawn from its own seed, so neither batches nor devices matter, and an evaluation
that is stopped goes on where it was: features so far are kept in WORKDIR/eval/partial. A report of
another protocol in the same place is renamed, never overwritten.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import time

import jax
from ml_collections import ConfigDict

from warm_diffusion import schedules
from warm_diffusion.app import build
from warm_diffusion.app.evaluate import bits_per_dim
from warm_diffusion.app.evaluate.kept_features import draw_features
from warm_diffusion.evaluation import metrics, reference
from warm_diffusion.pretrained import Model
from warm_diffusion.runtime import devices, processes, storage
from warm_diffusion.runtime.console import progress, say
from warm_diffusion.training.writer import Writer


class Evaluator:
    """Evaluates checkpoints of one run under one protocol."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path):
        options = config.eval
        for key, least in (("num_samples", 0), ("seed_ranges", 1)):
            if options[key] < least:
                raise ValueError(f"eval.{key} must be at least {least}, got {options[key]}")
        if options.num_samples == 1:
            raise ValueError("eval.num_samples must be at least 2 (0: as many as the data), got 1")
        self.folder, self.mesh = folder, devices.make_mesh()
        self._config, self._options = config, options
        self._data = self._sampler = self._statistics = self._extract = None

    def run(self, model: Model) -> dict:
        """Evaluates one checkpoint, or returns its report if that is there."""
        if self._statistics is None:
            self._sampler = build.sampler(self._config, model.architecture, self.mesh)
            self._extract = build.extractor(self._config, model.image_shape)
            self._statistics = self._reference(model)
        count = self._count()
        protocol = self._protocol(model, count)
        identity = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]
        name = f"step_{model.info['step']:08d}" if "step" in model.info else "model"
        path = self.folder / f"{name}.json"
        earlier, wanted = _read(path), bits_per_dim.protocol(self._config)
        processes.agree(**{f"the identity of {path}": earlier.get("identity")})
        same = earlier.get("identity") == identity
        if same and wanted in ({}, earlier.get("likelihood")):
            say(f"eval     {_label(model)} is evaluated already: {path}")
            return earlier
        began = time.monotonic()
        rounds = earlier["ranges"] if same else self._measure(model, count, identity)
        report = self._report(model, rounds, protocol, identity)
        if wanted:
            report |= {"likelihood": wanted} | self._likelihood(model)
        report["seconds"] = round(time.monotonic() - began, 1)
        if jax.process_index() == 0:
            self._write(path, report)
            partial = self.folder / "partial"
            storage.remove(partial / identity)
            if partial.exists() and not any(partial.iterdir()):
                storage.remove(partial)
        self._say(report, path)
        return report

    def _count(self) -> int:
        count = self._options.num_samples or self._statistics.provenance["count"]
        if not count:
            raise ValueError(
                f"{self._options.reference} does not say of how many images it is: set "
                "eval.num_samples (50000 for FID)"
            )
        return count

    def _likelihood(self, model: Model) -> dict[str, float]:
        data, split = self._dataset(), build.split_name(self._config)
        found = build.provenance(self._config, data, self._extract)
        expected = {"image_shape": list(model.image_shape)}
        if split == "train" and "data_sha256" in model.info:
            expected["data_sha256"] = model.info["data_sha256"]
        reference.check(found, expected, "config.data, for its likelihood,")
        return bits_per_dim.measure(self._config, model, data, split, self.mesh)

    def _dataset(self):
        if self._data is None:
            self._data = build.dataset(self._config)
        return self._data

    def _reference(self, model: Model) -> reference.FeatureStatistics:
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
            found = build.provenance(self._config, self._dataset(), self._extract)
            key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
            kept = self.folder / f"reference_{key}.npz"
            there = kept.exists()
            processes.agree(**{f"whether {kept} is there": there})
            if there:
                statistics = reference.load(kept)
                expected = found | expected
            else:
                reference.check(found, expected, "config.data")
                statistics = self._collect(found)
                reference.save(kept, statistics)
        # Called train, it must be what the network was trained on; of another part at least
        # prepared alike.
        if statistics.provenance["split"] == "train":
            if "data_sha256" in model.info:
                expected["data_sha256"] = model.info["data_sha256"]
        elif given:
            expected["recipe"] = self._dataset().info["resize"]
        reference.check(statistics.provenance, expected, given or "config.data as reference")
        return statistics

    def _collect(self, found: dict) -> reference.FeatureStatistics:
        images = self._dataset().images
        with progress(len(images), "reference", " images") as bar:
            return reference.collect(self._extract, images, found, report=bar.update)

    def _protocol(self, model: Model, count: int) -> dict:
        """All that decides the numbers."""
        sampling = self._config.sampling.to_dict()
        sampling.pop("batch_size")
        path = self._sampler.schedule
        return {
            "step": model.info.get("step", 0),
            "weights_sha256": model.info["weights_sha256"],
            "training_data_sha256": model.info.get("data_sha256", "not known"),
            "dtype": model.architecture.network.dtype.__name__,
            "weights": model.info["weights"],
            "num_samples": count,
            "seed_ranges": self._options.seed_ranges,
            "network_calls": self._sampler.num_calls,
            "solver": sampling["solver"],
            "bnr": path_bnr(path),
            "sampling": sampling,
            "schedule": build.chosen_path(self._config),
            "features": {"name": self._extract.name, "weights_hash": self._extract.weights_hash},
            "metric_settings": metrics.settings(count, self._statistics),
            "reference": self._statistics.provenance,
        }

    def _measure(self, model: Model, count: int, identity: str) -> list[dict]:
        """The metrics of each seed range."""
        total = self._options.seed_ranges * count
        if total > 2**32:
            raise ValueError(f"seeds must stay below 2^32, got {total} images in all")
        start = self._dataset().images if self._sampler.schedule.needs_start else None
        params = devices.put_replicated(model.params, self.mesh)
        rounds = []
        with progress(total, _label(model), " images") as bar:
            for first in range(0, total, count):
                folder = self.folder / "partial" / identity / f"seeds_{first}"
                done = _read(folder / "metrics.json")
                if done:
                    bar.update(count)
                    rounds.append(done)
                    continue
                seeds = range(first, first + count)
                drawn = draw_features(
                    self._sampler, params, seeds, self._extract, folder, images=start, bar=bar
                )
                name = {"seeds": f"{seeds[0]}-{seeds[-1]}"}
                rounds.append(name | metrics.compare(drawn, self._statistics))
                storage.write_json(folder / "metrics.json", rounds[-1])
                for part in folder.glob("features_*"):  # summed up; large
                    storage.remove(part)
        return rounds

    def _report(self, model: Model, rounds: list[dict], protocol: dict, identity: str) -> dict:
        count, provenance = protocol["num_samples"], protocol["reference"]
        report = metrics.summarise(_numbers(rounds))
        report["metric"] = metrics.metric_name("fd", self._extract.name, count, provenance["split"])
        if count < metrics.FEW_SAMPLES:
            report["warning"] = (
                f"{count} samples are few: compare only with distances of as many samples"
            )
        report |= protocol
        report["seeds"] = f"0-{len(rounds) * count - 1}"
        report["ranges"] = rounds
        report["reference"] = provenance | {"sha256": reference.fingerprint(self._statistics)}
        report["device"] = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        report["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
        report["identity"] = identity
        return report

    def _write(self, path: pathlib.Path, report: dict) -> None:
        earlier = _read(path)
        # The same samples and now a likelihood as well: nothing is lost by writing over it.
        extends = earlier.get("identity") == report["identity"] and "likelihood" not in earlier
        if earlier and not extends:
            aside = path.with_suffix(f".{earlier.get('identity', 'earlier')}.json")
            while aside.exists():
                aside = aside.with_suffix(".again.json")
            storage.move(path, aside)
            say(f"note     the report of another protocol is now {aside}")
        storage.write_json(path, report)
        writer = Writer(self.folder, first_step=None)
        numbers = metrics.summarise(_numbers(report["ranges"])) | _bits(report)
        writer.scalars(report["step"], {k: v for k, v in numbers.items() if v is not None})
        writer.close()

    def _say(self, report: dict, path: pathlib.Path) -> None:
        name = report["metric"]
        spread = ""
        if report[f"{name}_std"] is not None:
            spread = (
                f" +- {report[f'{name}_std']:.4f} over {len(report['ranges'])} seed ranges, "
                f"least {report[f'{name}_min']:.4f}"
            )
        if "warning" in report:
            say(f"warning  {report['warning']}")
        say(
            f"eval     {name} = {report[name]:.4f}{spread} ({report['solver']}, "
            f"{report['network_calls']} network calls, {report['weights']}, "
            f"{report['seconds']:.1f} s), in {path}"
        )
        for name, value in _bits(report).items():
            say(f"eval     {name} = {value:.4f}")


def path_bnr(path: schedules.Schedule) -> float | list[float]:
    """Blur-to-noise ratio of a path, to four digits; both ends' where it is not constant."""
    ends = [float(f"{float(path.bnr(t)):.4g}") for t in (path.t_min, path.t_max)]
    return ends[0] if ends[0] == ends[1] else ends


def _bits(report: dict) -> dict[str, float]:
    return {name: value for name, value in report.items() if name.startswith("bpd")}


def _numbers(rounds: list[dict]) -> list[dict]:
    return [{name: v for name, v in round_.items() if name != "seeds"} for round_ in rounds]


def _label(model: Model) -> str:
    """Of a checkpoint, or of a model that does not know its step."""
    return f"step {model.info['step']:,}" if "step" in model.info else "the model"


def _read(path: pathlib.Path) -> dict:
    """What a JSON file says; {} if there is none."""
    try:
        return storage.read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{error}: delete it") from error
