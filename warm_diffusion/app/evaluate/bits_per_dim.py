"""Bits per dimension of images of the data set, by the probability flow of a trained network."""

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warm_diffusion.app import build
from warm_diffusion.data import Dataset
from warm_diffusion.evaluation import metrics
from warm_diffusion.pretrained import Model
from warm_diffusion.runtime import devices
from warm_diffusion.runtime.console import progress


def measure(
    config: ConfigDict, model: Model, data: Dataset, split: str, mesh: Mesh
) -> dict[str, float]:
    """Mean over a random part of the data set's images, and its standard error.

    Raises:
      ValueError: settings that do not work, a guided path or one that does not end in noise, a
        solver that did not come to the end.
    """
    # Here and not above: evaluations without likelihood do not wait for diffrax.
    from warm_diffusion.evaluation import likelihood

    options = config.eval
    count = options.likelihood_images or len(data.images)
    if not 2 <= count <= len(data.images):
        raise ValueError(
            f"eval.likelihood_images must be 2 to {len(data.images)} (the images there are), or 0 "
            f"for all, got {options.likelihood_images}"
        )
    if config.sampling.guidance != 1.0:
        raise ValueError("eval.likelihood: a guided network has none; set sampling.guidance=1")
    rows = np.sort(np.random.default_rng(0).permutation(len(data.images))[:count])
    labels = build.labels(config, data)
    path = build.sampling_schedule(config, model.statistics)
    everywhere, split_over = devices.replicated(mesh), devices.split(mesh)

    def bits(params, images, labels, numbers):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(numbers)
        denoise = model.denoiser(params, labels)
        return likelihood.bits_per_dim(
            denoise, images, path, key=keys, trace=options.likelihood_trace
        )

    shardings = (everywhere, *[split_over] * 3)
    run = devices.jit(bits, mesh, in_shardings=shardings, out_shardings=everywhere)
    batch = devices.global_batch(config.sampling.batch_size, mesh, count)
    weights = devices.put_replicated(model.params, mesh)
    values = []
    with progress(count, "likelihood", " images") as bar:
        for first in range(0, count, batch):
            numbers = rows[first : first + batch]
            filled = np.resize(numbers, batch)
            classes = None if labels is None else labels[filled]
            inputs = np.asarray(data.images[filled]), classes, filled.astype(np.uint32)
            found = run(weights, *devices.put_split(inputs, mesh))
            if not bool(found.converged) or not np.all(np.isfinite(found.values)):
                raise ValueError(
                    "eval.likelihood: the solver did not come to the end of the flow; the network "
                    "may not be trained enough for its likelihood"
                )
            values.append(np.asarray(found.values)[: len(numbers)])
            bar.update(len(numbers))
    values = np.concatenate(values).astype(np.float64)
    name = metrics.metric_name("bpd", options.features, count, split)
    return {
        name: float(values.mean()),
        f"{name}_standard_error": float(values.std(ddof=1) / np.sqrt(count)),
    }
