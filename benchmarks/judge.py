"""Who judges a comparison: distances in the features of a classifier trained on the same images.

All images but a tenth train it; its accuracy on that tenth is printed, its weights are kept beside
the results. The names of the distances say so: fd_classifier_N (Frechet) and kd_classifier_N
(kernel) for N samples against all images of the data set. No FID: compare within one comparison.
Other features are `config.eval.features`' names.
"""

import copy
import hashlib
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from warm_diffusion.app import build
from warm_diffusion.data import Dataset, batch_indices
from warm_diffusion.data.images import from_uint8
from warm_diffusion.evaluation import distances, features, metrics
from warm_diffusion.runtime import devices

_KERNEL_BLOCKS = 20


class Classifier(nn.Module):
    """A small convolutional network; its features are the layer before the last."""

    classes: int
    width: int = 32
    num_features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] in [-1, 1] to (features [B, num_features], logits [B, classes])."""
        width = self.width
        x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        while min(x.shape[1:3]) > 4:
            width = min(2 * width, 128)
            x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), strides=2)(x)))
        x = nn.silu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        hidden = nn.silu(nn.Dense(self.num_features)(x.reshape(len(x), -1)))
        return hidden, nn.Dense(self.classes)(hidden)


def _train_classifier(network: Classifier, data: Dataset, steps: int, batch: int = 128):
    """Weights, and accuracy on the tenth of the images that it has not seen."""
    order = np.random.default_rng(0).permutation(len(data.images))
    unseen, seen = np.split(order, [len(order) // 10])
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    params = jax.jit(network.init)(jax.random.key(0), from_uint8(jnp.asarray(data.images[:1])))

    @devices.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = network.apply(params, from_uint8(images))[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(steps):
        chosen = seen[batch_indices(0, n, batch, len(seen))]
        params, state = step(params, state, data.images[chosen], data.labels[chosen])
    apply = devices.jit(network.apply)
    right = [
        np.argmax(apply(params, from_uint8(jnp.asarray(data.images[part])))[1], 1)
        == data.labels[part]
        for part in np.array_split(np.sort(unseen), max(1, len(unseen) // 512))
    ]
    return params, float(np.mean(np.concatenate(right)))


def classifier_features(data: Dataset, out: pathlib.Path, steps: int) -> features.Extractor:
    """The judge, trained once and kept in `out`/classifier.npz; ValueError without labels."""
    if data.labels is None:
        raise ValueError(
            "the classifier needs classes: data with sub-folders, or --features=pixels"
        )
    network, path = Classifier(len(data.info["class_names"])), out / "classifier.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            flat = {tuple(name.split("/")): file[name] for name in file.files}
        accuracy = float(flat.pop(("accuracy",)))
        params = flax.traverse_util.unflatten_dict(flat)
    else:
        params, accuracy = _train_classifier(network, data, steps)
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, accuracy=accuracy, **{name: np.asarray(a) for name, a in flat.items()})
        partial.replace(path)
    print(f"classifier accuracy {accuracy:.1%} on the tenth of the images it has not seen")
    apply = devices.jit(lambda images: network.apply(params, from_uint8(images))[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return features.Extractor("classifier", digest, 512, lambda images: np.asarray(apply(images)))


class Judge:
    """Distances of generated images to all images of the data set.

    Attributes:
      names: of the Frechet and the kernel distance.
    """

    def __init__(self, config: ConfigDict, data: Dataset, out: pathlib.Path, options):
        """`options`: features (classifier or as config.eval's), samples, classifier_steps."""
        if options.features == "classifier":
            self._extract = classifier_features(data, out, options.classifier_steps)
        else:
            config = copy.deepcopy(config)
            config.eval.features = options.features
            self._extract = build.extractor(config, data.images.shape[1:])
        self._real = np.concatenate(
            [
                self._extract(np.asarray(data.images[first : first + 1024]))
                for first in range(0, len(data.images), 1024)
            ]
        )
        self._moments = distances.Moments.of(self._real)
        kinds = ("fd", "kd")
        self.names = tuple(
            metrics.metric_name(kind, self._extract.name, options.samples) for kind in kinds
        )

    def __call__(self, images: np.ndarray) -> dict[str, float]:
        """Both distances of uint8 images [N, H, W, C]."""
        values, real = self._extract(images), self._moments
        own = distances.Moments.of(values)
        smaller = min(len(values), len(self._real))
        kernel, _ = distances.kernel_distance(
            values, self._real, num_blocks=_KERNEL_BLOCKS,
            block_size=min(1000, smaller // 2),
        )  # fmt: skip
        frechet = distances.frechet(own.mean, own.covariance, real.mean, real.covariance)
        return dict(zip(self.names, (frechet, kernel), strict=True))
