"""A run on one page: report.html shows what is in a workdir, and needs no other file."""

import json
import math
import pathlib

import numpy as np
from ml_collections import ConfigDict

from warm_diffusion import pretrained
from warm_diffusion.app import page, plots
from warm_diffusion.app.plots import style
from warm_diffusion.data.sources import short_name
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say
from warm_diffusion.training.checkpoints import last_checkpoint

_GRIDS = 24  # sample grids shown, evenly over the run
_PICTURES = {
    "forward.png": "Forward process",
    "film.png": "Sampling: states, and what the heads see in them",
}
_PROTOCOL = (
    "weights", "weights_sha256", "training_data_sha256", "dtype", "num_samples", "seeds", "bnr",
    "sampling", "schedule", "features", "metric_settings", "reference", "likelihood", "device",
    "versions", "identity", "seconds",
)  # fmt: skip


def report(config: ConfigDict, workdir: str, checkpoint: str) -> pathlib.Path:
    """Writes `workdir`/report.html about the training run `checkpoint`; returns its path.

    Evaluations and analyses are those of both folders.

    Raises:
      ValueError: no training run there, or files of it that cannot be read.
    """
    run, folder = pretrained.split_checkpoint(checkpoint)[0], storage.path(workdir)
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is not a training workdir: it has no config.json")
    configuration = storage.read_json(run / "config.json")
    if "format" in configuration:
        raise ValueError(f"{run} is a model folder, whose README.md is its report: give a run")
    places = dict.fromkeys((run, folder))
    steps, about = last_checkpoint(run)
    metrics = _metrics(run / "metrics.jsonl")
    figures, pictures = _analysis(places)
    content = page.render(
        "report.html",
        title=f"{run.name}: {short_name(config.data.source)}, {config.schedule.name}",
        summary=_summary(config, metrics, steps, about),
        curves=_curves(metrics),
        grids=_grids(run / "samples"),
        evaluations=_evaluations(places),
        figures=figures,
        pictures=pictures,
        configuration=_by_section(configuration),
        origins=_origins(about),
    )
    path = folder / "report.html"
    storage.write_bytes(path, content)
    say(f"report   {path}, {len(content) / 1e6:.1f} MB: open it in a browser")
    return path


def _summary(config: ConfigDict, metrics: list[dict], steps: list[int], about: dict) -> dict:
    model, training = config.model, config.training
    last = metrics[-1] if metrics else {"step": 0}
    found = {
        "data": short_name(config.data.source),
        "network": f"{model.name}, width {model.model_channels}, {model.parameterization}",
        "path": f"{config.schedule.name}, blur-to-noise ratio {config.schedule.bnr}",
        "trained": f"{last['step']:,} of {training.num_steps:,} steps of {training.batch_size}",
    }
    if last.get("loss") is not None:
        heads = ", ".join(f"{n} {last[n]:.4f}" for n in ("denoise", "deblur") if n in last)
        found["last loss"] = f"{last['loss']:.4f} ({heads})"
    if skipped := last.get("nonfinite_total"):
        found["steps skipped, not finite"] = f"{skipped:,.0f}"
    found["checkpoints"] = ", ".join(f"{step:,}" for step in steps) or "none"
    if "versions" in about:
        found["versions"] = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return found


def _metrics(path: pathlib.Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last one that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def _curves(metrics: list[dict]) -> list[str]:
    """Losses, consistency, gradient norm and speed over the images seen, as SVG."""
    if not metrics:
        return []
    images = [row.get("images", row["step"]) for row in metrics]
    names = {name for row in metrics for name in row}
    panels = {
        "loss of both heads": {
            "total": ("loss", style.INK),
            "denoise": ("denoise", style.NOISE),
            "deblur": ("deblur", style.BLUR),
        },
        "norm of the gradient": {"": ("grad_norm", style.INK)},
        "consistency of the heads": {"": ("consistency", style.INK)},
        "images per second": {"": ("images_per_second", style.INK)},
    }
    found = []
    for title, keys in panels.items():
        lines = {
            label: ([_or_nan(row.get(key)) for row in metrics], colour)
            for label, (key, colour) in keys.items()
            if key in names
        }
        if lines:
            log = title != "images per second"
            figure = plots.curves(images, lines, title, xlabel="images seen", log=log)
            found.append(style.svg(figure, title))
    return found


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _grids(folder: pathlib.Path) -> dict[int, bytes]:
    """PNG files of the sample grids by step."""
    files = sorted(folder.glob("step_*.png")) if folder.exists() else []
    if len(files) > _GRIDS:
        files = [files[round(i * (len(files) - 1) / (_GRIDS - 1))] for i in range(_GRIDS)]
    return {int(file.stem.removeprefix("step_")): file.read_bytes() for file in files}


def _evaluations(places) -> list[dict]:
    found = []
    for place in places:
        for path in sorted((place / "eval").glob("*.json")) if (place / "eval").exists() else []:
            told = storage.read_json(path)
            if "metric" not in told:
                continue  # not one of ours
            protocol = {name: _told(told[name]) for name in _PROTOCOL if name in told}
            found.append({"name": path.name, "row": _row(told), "protocol": protocol})
    return found


def _row(told: dict) -> dict[str, str]:
    """A line of the table."""
    metric = told["metric"]
    value, spread, least = (told.get(f"{metric}{end}") for end in ("", "_std", "_min"))
    bits = [f"{name} {v:.3f}" for name, v in told.items() if name.startswith("bpd")]
    several = spread is not None
    return {
        "step": f"{told['step']:,}",
        "metric": metric,
        "value": f"{value:.4g} ± {spread:.2g}" if several else f"{value:.4g}",
        "least": f"{least:.4g}" if several else "",
        "solver": told["solver"],
        "network calls": str(told["network_calls"]),
        "ratio": _told(told["bnr"]),
        "seeds": told["seeds"],
        "bits per dimension": ", ".join(bits),
        "note": told.get("warning", ""),
    }


def _analysis(places) -> tuple[list[str], dict[str, bytes]]:
    """Figures as SVG, redrawn from their JSON, and film strips as PNG files by title."""
    figures, pictures = [], {}
    for place in places:
        folder = place / "analysis"
        if (folder / "analysis.json").exists():
            told = storage.read_json(folder / "analysis.json")
            levels = [tuple(level.values()) for level in told.get("levels", [])]
            ratio = f"recommended blur-to-noise ratio {told['recommended_bnr']:.2f}"
            title = f"{short_name(told['source'])}: {ratio}"
            figure = plots.spectrum(*_arrays(told["frequency"], told["power"]), levels, title)
            figures.append(style.svg(figure, f"{folder} spectrum"))
        if (folder / "sampling.json").exists():
            told = storage.read_json(folder / "sampling.json")
            title, (frequency,) = told.get("title", "sampling"), _arrays(told["frequency"])
            steps = [
                {name: _numbers(value) for name, value in step.items()} for step in told["steps"]
            ]
            for draw, part in ((plots.departure, steps), (plots.heads, steps[:-1])):
                figure = draw(frequency, part, title)
                figures.append(style.svg(figure, f"{folder} {draw.__name__}"))
        for name, title in _PICTURES.items():
            if (folder / name).exists():
                shown = f"{title}: {place.name}" if len(places) > 1 else title
                pictures[shown] = (folder / name).read_bytes()
    return figures, pictures


def _arrays(*lists):
    return [np.asarray(numbers, float) for numbers in lists]


def _numbers(value):
    """JSON's null is not a number."""
    return [_or_nan(each) for each in value] if isinstance(value, list) else value


def _by_section(configuration: dict) -> dict[str, dict[str, str]]:
    """Keys and values of each section; those of none first."""
    found = {"general": {}}
    for name, value in configuration.items():
        if isinstance(value, dict):
            found[name] = {key: _told(each) for key, each in value.items()}
        else:
            found["general"][name] = _told(value)
    return found


def _origins(about: dict) -> dict[str, str]:
    """Versions and hashes that the last checkpoint tells."""
    names = ("step", "images_seen", "format", "data_sha256", "digests", "versions")
    return {name: _told(about[name]) for name in names if name in about}


def _told(value) -> str:
    """A value of JSON as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_told(each)}" for name, each in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
