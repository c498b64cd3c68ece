"""Training state and one step of training: gradient, Adam, averages, guard.

    (1)  ema      <- params + d (ema - params),   d = 0.5^(batch / halflife)
         halflife <- min(halflife, rampup * images seen)                         EDM, sec. 5

A step may run as several slices whose gradients add up, for batches that memory cannot hold. Loss
keys are an image's own, so slicing changes nothing but the dropout masks.

A gradient that is not finite changes neither weights nor averages nor optimizer: the decision is
made inside the step, so all devices agree on it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax.training import train_state

from warm_diffusion.losses import LossTerms
from warm_diffusion.process import image_keys


class Batch(NamedTuple):
    """Images as they are stored, uint8 [B, H, W, C], and their classes, int [B] or None."""

    images: jax.Array
    labels: jax.Array | None = None


LossFn = Callable[[dict, jax.Array, Batch], LossTerms]  # (params, keys [B], batch)


class TrainState(train_state.TrainState):
    """flax's state (step, params, opt_state) with averaged weights and the non-finite counters."""

    ema: tuple[dict, ...]
    nonfinite_total: jax.Array
    nonfinite_in_a_row: jax.Array


def create_state(
    apply_fn: Callable, params: dict, optimizer: optax.GradientTransformation, num_ema: int
) -> TrainState:
    """The state before the first step; the averages start at the weights."""
    state = TrainState.create(
        apply_fn=apply_fn,
        params=params,
        tx=optimizer,
        # Copies: the step donates the state, and one buffer cannot be donated twice.
        ema=tuple(jax.tree.map(jnp.copy, params) for _ in range(num_ema)),
        nonfinite_total=jnp.zeros((), jnp.int32),
        nonfinite_in_a_row=jnp.zeros((), jnp.int32),
    )
    # Typed as a restored one is: of Python's 0 the step would be traced anew.
    return state.replace(step=jnp.zeros((), jnp.int32))


def warmup_schedule(learning_rate: float, warmup_images: int, batch_size: int) -> optax.Schedule:
    """Learning rate at each step: linear over the first `warmup_images` images, then constant."""
    if warmup_images <= 0:
        return optax.constant_schedule(learning_rate)
    return lambda step: learning_rate * jnp.minimum(step * (batch_size / warmup_images), 1.0)


def ema_decay(images: jax.Array, batch_size: int, halflife: float, rampup: float) -> jax.Array:
    """Factor d of eq. (1) for the step after `images` images; 0 at the very first with ramp-up."""
    halflife = jnp.minimum(halflife, images * rampup) if rampup > 0 else jnp.asarray(halflife)
    return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))


@flax.struct.dataclass
class Largest(clu_metrics.Metric):
    """The largest of some integers of at least 0."""

    value: jax.Array

    @classmethod
    def empty(cls) -> "Largest":
        """Of none."""
        return cls(jnp.zeros((), jnp.int32))

    @classmethod
    def from_model_output(cls, value: jax.Array, **_) -> "Largest":
        """Of an array's, whatever the mask."""
        return cls(value.max())

    def merge(self, other: "Largest") -> "Largest":
        """Of both's."""
        # Of the class it has: another would be another argument, and compile the step once more.
        return self.replace(value=jnp.maximum(self.value, other.value))

    def compute(self) -> jax.Array:
        """The number."""
        return self.value


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Means over the steps since the last report that had a finite gradient; and how many in a row
    had none, at most."""

    loss: clu_metrics.Average.from_output("loss")
    denoise: clu_metrics.Average.from_output("denoise")
    deblur: clu_metrics.Average.from_output("deblur")
    consistency: clu_metrics.Average.from_output("consistency")
    grad_norm: clu_metrics.Average.from_output("grad_norm")
    streak: Largest.from_output("streak")


def _slice_gradients(gradients: Callable, params: dict, batch: tuple, slices: int, unroll: bool):
    """Means over the slices of what `gradients` returns: (gradients, LossTerms of all images)."""
    if slices == 1:
        return gradients(params, *batch)
    # Slice j is every image j, j + slices, ...: each device works on images that it holds.
    parts = jax.tree.map(
        lambda leaf: leaf.reshape(-1, slices, *leaf.shape[1:]).swapaxes(0, 1), batch
    )

    def add(total, part):
        new, terms = gradients(params, *part)
        return jax.tree.map(jnp.add, total, new), terms

    # Plain sums: TPU's compiler then adds up over the chips once, after the loop.
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, terms = jax.lax.scan(add, zeros, parts, unroll=slices if unroll else 1)
    return jax.tree.map(lambda t: t / slices, total), terms


def make_train_step(
    loss_fn: LossFn,
    key: jax.Array,
    *,
    batch_size: int,
    ema_halflives: Sequence[float],
    ema_rampup: float,
    grad_accumulation: int = 1,
    unroll: bool = False,
) -> Callable[[TrainState, TrainMetrics, Batch], tuple[TrainState, TrainMetrics]]:
    """The training step, to be jitted with the state and the metrics donated.

    Args:
      loss_fn: (params, keys [B], batch) -> LossTerms, one number an image.
      key: seed key of the run; image i of step n has the key fold_in(fold_in(key, n), i), so no
        random state is kept.
      batch_size: global number of images a step.
      ema_halflives: in images, one per set of averaged weights.
      ema_rampup: see eq. (1).
      grad_accumulation: slices that a batch is divided into, one after the other.
      unroll: writes the slices out instead of a loop: longer to compile; for CPUs, where XLA makes
        gradients of convolutions slow in a loop.

    Returns:
      (state, metrics, batch) -> (state, metrics).

    Raises:
      ValueError: a batch that the slices cannot share evenly.
    """
    if grad_accumulation < 1 or batch_size % grad_accumulation:
        raise ValueError(
            f"training.grad_accumulation must divide the batch of {batch_size}, "
            f"got {grad_accumulation}"
        )

    def train_step(state, metrics, batch):
        def objective(params, keys, part):
            terms = loss_fn(params, keys, part)
            return terms.total.mean(), terms

        keys = image_keys(jax.random.fold_in(key, state.step), batch_size)
        gradients = jax.grad(objective, has_aux=True)
        grads, terms = _slice_gradients(
            gradients, state.params, (keys, batch), grad_accumulation, unroll
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm)
        updated = state.apply_gradients(grads=grads)
        images_seen = state.step.astype(jnp.float32) * batch_size
        decays = [ema_decay(images_seen, batch_size, half, ema_rampup) for half in ema_halflives]
        ema = tuple(
            jax.tree.map(lambda p, e, d=decay: p + d * (e - p), updated.params, average)
            for decay, average in zip(decays, state.ema, strict=True)
        )
        kept, fresh = ((s.params, s.opt_state, e) for s, e in ((state, state.ema), (updated, ema)))
        params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(finite, a, b), fresh, kept)
        bad = 1 - finite.astype(jnp.int32)
        state = updated.replace(
            params=params,
            opt_state=opt_state,
            ema=ema,
            nonfinite_total=state.nonfinite_total + bad,
            nonfinite_in_a_row=(state.nonfinite_in_a_row + 1) * bad,
        )
        output = {
            "loss": terms.total,
            "denoise": terms.denoise,
            "deblur": terms.deblur,
            "consistency": terms.consistency,
            "grad_norm": grad_norm,
        }
        step_metrics = TrainMetrics.single_from_model_output(
            **{name: value.mean().reshape(1) for name, value in output.items()},
            streak=state.nonfinite_in_a_row.reshape(1),
            mask=finite.reshape(1),
        )
        return state, metrics.merge(step_metrics)

    return train_step


def choose_average(state: TrainState, index: int) -> dict:
    """Weights to draw with: average number `index`, or the weights themselves for -1."""
    return state.params if index < 0 else state.ema[index]


def is_finite(state: TrainState) -> jax.Array:
    """Whether weights, averages and optimizer hold finite numbers only."""
    tree = (state.params, state.ema, state.opt_state)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
