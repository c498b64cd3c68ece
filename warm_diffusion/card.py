"""The README.md of a model folder: what it is, how it was trained, how good it is, how to use."""

import math
import pathlib

import numpy as np

from warm_diffusion.data.images import grid, png
from warm_diffusion.runtime import storage

_CARD = """---
library_name: warm_diffusion
tags: [{tags}, diffusion, jax, warm-diffusion]
---

# {name}

A blur-noise diffusion model ([Warm Diffusion](https://arxiv.org/abs/2511.16904)) {of}
{shape} images: {network}, {parameters:,} parameters, path `{schedule}`.
{picture}
## Use

{use}

## Training

{training}

## Evaluation

{evaluation}

## Limits

{limits}
"""

# What depends on whether the path ends in noise that hides the image, which images are drawn from.
_DRAWS = {
    "tags": "image-generation",
    "of": "of",
    "use": """```python
from warm_diffusion import pretrained
model = pretrained.load("{name}")  # the path of this folder
images = model.sample(range(16))  # uint8 {example}
```

`python main.py --mode=sample --checkpoint={name} --workdir=OUT` writes PNG files.""",
    "limits": "It draws what its training images look like, at their size, with their biases and "
    "no others.",
}
_RESTORES = {
    "tags": "image-restoration",
    "of": "that undoes blur and noise, trained on",
    "use": """```python
import numpy as np
from warm_diffusion import pretrained
model = pretrained.load("{name}")  # the path of this folder
images = np.zeros({example})  # yours, in [-1, 1]; of other sizes as well
clean = model.denoise(images, alpha=1.0, beta=0.1).clean  # at their blur and noise
```

`python main.py --mode=restore --checkpoint={name} --input=PHOTOS --workdir=OUT` reads off both
levels. The network cannot draw images from noise: its path ends where the image still shows.""",
    "limits": "The blur is Gaussian and the same everywhere, the noise white and Gaussian: motion "
    "blur, defocus and the blocks of JPEG are other things. What it adds to an image looks like "
    "its training images.",
}
_STARTS = _DRAWS | {
    "use": """`python main.py --mode=sample --checkpoint={name} --workdir=OUT` starts from training
images, for its path ends where the image still shows, and writes PNG files.

```python
from warm_diffusion import pretrained
model = pretrained.load("{name}")  # the path of this folder; model.denoise is the network
```""",
}


def files(
    name: str, config: dict, samples: np.ndarray, caption: str, *, draws: bool
) -> dict[str, bytes]:
    """README.md, and samples.png where there are some, for a model folder's config.json; `draws`
    says whether images can be drawn from noise."""
    found, picture = {}, ""
    if len(samples):
        found["samples.png"] = png(grid(samples, min_side=48))
        picture = (
            f"\n![{len(samples)} samples](samples.png)\n\n"
            f"*Seeds 0 to {len(samples) - 1}: {caption}.*\n"
        )
    network, info, shape = config["network"], config["info"], config["image_shape"]
    schedule = config["schedule"]
    restores = schedule["name"] == "any_bnr"
    parts = _DRAWS if draws else _RESTORES if restores else _STARTS
    numbers = ", ".join(f"{key}={value}" for key, value in schedule.items() if key != "name")
    text = _CARD.format(
        name=name,
        shape="x".join(map(str, shape)),
        network={"ddpmpp": "DDPM++", "ncsnpp": "NCSN++"}[network["name"]],
        parameters=config["parameters"],
        schedule=f"{schedule['name']}({numbers})",
        picture=picture,
        **{part: text.format(name=name, example=[16, *shape]) for part, text in parts.items()},
        training=_training(name, info),
        evaluation=_evaluation(info.get("evaluation", [])),
    )
    return found | {"README.md": text.encode()}


def _training(name: str, info: dict) -> str:
    if "configuration" not in info:
        return info.get("origin", "Not known.")
    run, data = info["configuration"], info["configuration"]["data"]
    unknown = "not known"
    rows = {
        "data": f"`{data['source']}`, content hash `{info.get('data_sha256', unknown)[:16]}`",
        "images seen": unknown,
        "weights": f"{info.get('weights', unknown)}, SHA-256 `{info['weights_sha256'][:16]}`",
        "versions": ", ".join(f"{key} {value}" for key, value in info.get("versions", {}).items()),
    }
    if "images_seen" in info:
        steps = f"{info['step']:,} steps of {run['training']['batch_size']}"
        rows["images seen"] = f"{info['images_seen']:,} ({steps})"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    stopped = info.get("step", run["training"]["num_steps"])
    again = f"python main.py --config={name}/config.json --workdir=RUN"
    if stopped != run["training"]["num_steps"]:
        again += f" --config.training.num_steps={stopped}"
    return (
        f"| | |\n| --- | --- |\n{table}\n\nEvery setting is in `config.json` under "
        f"`info.configuration`; this trains it again:\n\n"
        f"```sh\n{again}\n```"
    )


def _evaluation(reports: list[dict]) -> str:
    if not reports:
        return "None is recorded."
    lines = ["| metric | value | solver | network calls | BNR | seeds |", "|" + " --- |" * 6]
    for report in reports:
        metric, spread = report["metric"], report.get(f"{report['metric']}_std")
        value = f"{report[metric]:.4g}"
        if spread is not None and math.isfinite(spread):
            value += f" ± {spread:.2g}"
        lines.append(
            f"| `{metric}` | {value} | {report['solver']} | {report['network_calls']} | "
            f"{report['bnr']} | {report['seeds']} |"
        )
    note = (
        "\n\nA metric's name says features, number of samples and, unless it is the training "
        "set, what they are compared with; only `fid` is FID."
    )
    return "\n".join(lines) + note


def evaluations(workdir: pathlib.Path, weights_sha256: str) -> list[dict]:
    """The reports of `--mode=eval` in a workdir on these weights, without their details."""
    details = ("ranges", "schedule", "versions", "metric_settings", "identity", "seconds")
    found = []
    for path in sorted((workdir / "eval").glob("*.json")):
        try:
            report = storage.read_json(path)
        except ValueError:
            continue  # not one of ours, or damaged: evaluating says so
        if isinstance(report, dict) and report.get("weights_sha256") == weights_sha256:
            found.append({key: value for key, value in report.items() if key not in details})
    return found
