"""Are samples recognisable digits? A classifier's verdict on a run of configs/digits.py.

    python -m benchmarks.digits_quality --checkpoint=runs/digits

A logistic regression is trained on the 1,797 real digits and asked about samples drawn by the
run's own sampling settings. Reported: the share of images of whose class it is over 90 % sure, for
samples and, as the mark to reach, for real digits held out from it (5-fold); the share of each
class; and the pixel Frechet distance to the data.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from configs import saved
from warm_diffusion import pretrained
from warm_diffusion.app import build, settings
from warm_diffusion.data.images import from_uint8
from warm_diffusion.evaluation import distances

_SURE = 0.9


def classifier():
    """The judge: logistic regression on pixels scaled to [0, 1]."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2000)


def sure_share(probabilities: np.ndarray) -> float:
    """Share of rows whose largest probability is above 90 %."""
    return float(np.mean(probabilities.max(axis=1) > _SURE))


def judge(samples: np.ndarray, images: np.ndarray, labels: np.ndarray) -> dict:
    """The classifier's verdict on uint8 samples, given the real digits."""
    from sklearn.model_selection import cross_val_predict

    real = images.reshape(len(images), -1) / 255
    drawn = samples.reshape(len(samples), -1) / 255
    held_out = cross_val_predict(classifier(), real, labels, cv=5, method="predict_proba")
    probabilities = classifier().fit(real, labels).predict_proba(drawn)
    classes = np.bincount(probabilities.argmax(axis=1), minlength=10) / len(drawn)
    one, two = (distances.Moments.of(from_uint8(a).reshape(len(a), -1)) for a in (samples, images))
    distance = distances.frechet(one.mean, one.covariance, two.mean, two.covariance)
    return {
        "sure_of_samples": sure_share(probabilities),
        "sure_of_real_held_out": sure_share(held_out),
        "class_shares": [round(float(share), 3) for share in classes],
        f"fd_pixels_{len(samples)}": distance,
    }


def main() -> None:
    """Draws the samples and prints the verdict as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="training workdir or model folder")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    config = saved.get_config(str(pathlib.Path(arguments.checkpoint) / "config.json"))
    settings.enable_compilation_cache(config.compilation_cache_dir)
    data, model = build.dataset(config), pretrained.load(arguments.checkpoint)
    options = config.sampling
    samples = model.sample(
        range(arguments.samples), options.solver, options.num_steps, batch_size=options.batch_size
    )
    report = judge(samples, np.asarray(data.images), data.labels)
    report |= {key: model.info[key] for key in ("step", "weights")}
    report |= {"solver": options.solver, "num_steps": options.num_steps}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
