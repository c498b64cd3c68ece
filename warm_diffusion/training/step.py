"""One step of training, as one program over all devices: gradient, Adam, averages, guard.

    (1)  ema      <- params + d (ema - params),   d = 0.5^(batch / halflife)
         halflife <- min(halflife, rampup * images seen)                         EDM, sec. 5

Image i of step n has the key fold_in(fold_in(key of the run, n), i), so no random state is kept. A
step may run as several slices whose gradients add up, for batches that memory cannot hold; slicing
changes nothing but the dropout masks. A gradient that is not finite changes neither weights nor
averages nor optimizer: the decision is made inside the step, so all devices agree on it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from flax.training import train_state
from jax.sharding import Mesh

from warm_diffusion.losses import LossTerms
from warm_diffusion.process import _image_keys
from warm_diffusion.runtime import devices


class Batch(NamedTuple):
    """Images as they are stored, uint8 [B, H, W, C], and their classes, int [B] or None."""

    images: jax.Array
    labels: jax.Array | None = None


LossFn = Callable[[dict, jax.Array, Batch], LossTerms]  # (params, keys [B], batch)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a step; `config.training` has keys with the same names."""

    batch_size: int  # images per step, over all devices
    ema_halflife_images: tuple[float, ...] = ()  # one for each set of averaged weights
    ema_rampup: float = 0.0  # see eq. (1)
    grad_accumulation: int = 1  # slices that a batch is divided into, one after the other
    # Steps that one call of the devices takes; the batch then has one more axis in front, of this
    # size, and the numbers equal those of as many calls, up to rounding.
    steps_per_call: int = 1
    sharding: str = "replicated"  # of the state over the devices, `devices.state_shardings`


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
    # An array, as a restored one is: with Python's 0 the step would be traced again.
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


def choose_average(state: TrainState, index: int) -> dict:
    """Weights to draw with: average number `index`, or the weights themselves for -1."""
    return state.params if index < 0 else state.ema[index]


def is_finite(state: TrainState) -> bool:
    """Returns whether weights, averages and optimizer are finite."""

    def finite(leaf: jax.Array) -> bool:
        leaf = devices.host_view(leaf)
        return bool(np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _finite(leaf))

    return all(map(finite, jax.tree.leaves((state.params, state.ema, state.opt_state))))


# A program for each shape: one for a large network's 2,000 arrays compiles for a minute.
@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


@flax.struct.dataclass
class Largest(clu_metrics.Metric):
    """The largest of some counts."""

    value: jax.Array

    @classmethod
    def empty(cls) -> "Largest":
        """No count: 0."""
        return cls(jnp.zeros((), jnp.int32))

    @classmethod
    def from_model_output(cls, count: jax.Array, **_) -> "Largest":
        """The largest of an array, masked or not."""
        return cls(count.max())

    def merge(self, other: "Largest") -> "Largest":
        """The larger of both, in the class of this one: another would compile the step again."""
        return self.replace(value=jnp.maximum(self.value, other.value))

    def compute(self) -> jax.Array:
        """The count."""
        return self.value


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Means over the steps since the last report that had a finite gradient, and the longest row of
    steps that had none."""

    loss: clu_metrics.Average.from_output("loss")
    denoise: clu_metrics.Average.from_output("denoise")
    deblur: clu_metrics.Average.from_output("deblur")
    consistency: clu_metrics.Average.from_output("consistency")
    grad_norm: clu_metrics.Average.from_output("grad_norm")
    longest_row: Largest.from_output("longest_row")


def _sliced(gradients: Callable, params: dict, batch: tuple, slices: int, unroll: bool) -> tuple:
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


def train_step(
    loss_fn: LossFn,
    options: Options,
    state: TrainState,
    metrics: TrainMetrics,
    batch: Batch,
    seed: jax.Array,
    *,
    unroll: bool = False,
) -> tuple[TrainState, TrainMetrics]:
    """The state and the metrics after a step, a pure function; `jitted` compiles it.

    The metrics are added to. With `unroll` slices are written out instead of a loop.
    """

    def objective(params, keys, part):
        terms = loss_fn(params, keys, part)
        return terms.total.mean(), terms

    keys = _image_keys(jax.random.fold_in(jax.random.key(seed), state.step), options.batch_size)
    gradients = jax.grad(objective, has_aux=True)
    grads, terms = _sliced(
        gradients, state.params, (keys, batch), options.grad_accumulation, unroll
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updated = state.apply_gradients(grads=grads)
    images_seen = state.step.astype(jnp.float32) * options.batch_size
    ema = []
    for halflife, average in zip(options.ema_halflife_images, state.ema, strict=True):
        d = ema_decay(images_seen, options.batch_size, halflife, options.ema_rampup)
        ema.append(jax.tree.map(lambda p, e, d=d: p + d * (e - p), updated.params, average))
    params, opt_state, ema = jax.tree.map(
        functools.partial(jnp.where, finite),
        (updated.params, updated.opt_state, tuple(ema)),
        (state.params, state.opt_state, state.ema),
    )
    bad = 1 - finite.astype(jnp.int32)
    state = updated.replace(
        params=params,
        opt_state=opt_state,
        ema=ema,
        nonfinite_total=state.nonfinite_total + bad,
        nonfinite_in_a_row=(state.nonfinite_in_a_row + 1) * bad,
    )
    means = terms._asdict() | {"grad_norm": grad_norm}
    means["loss"] = means.pop("total")
    means = {name: value.mean().reshape(1) for name, value in means.items()}
    return state, metrics.merge(
        TrainMetrics.single_from_model_output(
            **means, mask=finite.reshape(1), longest_row=state.nonfinite_in_a_row.reshape(1)
        )
    )


def jitted(loss_fn: LossFn, options: Options, mesh: Mesh, *, resident: bool = False) -> Callable:
    """Compiles the step: state and metrics donated, the batch split, the state as it is given.

    With `resident` the batch is (all images, everywhere; the indices of the batch, split).

    Returns:
      (state, metrics, batch, seed) -> (state, metrics), see `train_step`.

    Raises:
      ValueError: a batch that devices and slices cannot share evenly.
    """
    devices.check_slices(options.grad_accumulation, options.batch_size, mesh)
    # By XLA's CPU compiler gradients of convolutions take 20 times as long in the body of a loop.
    unroll = devices.platform(mesh) == "cpu"
    steps, split_loss = options.steps_per_call, loss_fn
    shardings = functools.partial(devices.state_shardings, options.sharding, mesh=mesh)
    if options.sharding != "replicated":

        def split_loss(params, *arguments):
            return loss_fn(devices.gathered(params, mesh, shardings(params)), *arguments)

    def call(state, metrics, batch, seed):
        stored, batches = batch if resident else (None, batch)

        def one(carry, part):
            if resident:
                part = jax.tree.map(lambda leaf: leaf[part], stored)
            state, metrics = train_step(split_loss, options, *carry, part, seed, unroll=unroll)
            return (jax.lax.with_sharding_constraint(state, shardings(state)), metrics), None

        if steps == 1:
            return one((state, metrics), batches)[0]
        return jax.lax.scan(one, (state, metrics), batches, unroll=steps if unroll else 1)[0]

    everywhere, split = devices.replicated(mesh), devices.split(mesh, axis=int(steps > 1))
    batch = (everywhere, split) if resident else split
    return devices.jit(
        call,
        mesh,
        donate_argnums=(0, 1),
        in_shardings=(None, everywhere, batch, everywhere),  # None: as it is given
        out_shardings=(None, everywhere),
    )


def abstract_arguments(
    state: TrainState,
    data: Batch,
    options: Options,
    mesh: Mesh,
    *,
    resident: bool = False,
) -> tuple:
    """The abstract arguments of what `jitted` gives, of an abstract state.

    `data` are all images and their classes; their number matters to `resident` alone.
    """
    steps = options.steps_per_call
    everywhere, split = devices.replicated(mesh), devices.split(mesh, axis=int(steps > 1))
    leading = (steps, options.batch_size) if steps > 1 else (options.batch_size,)

    def put(tree, sharding, shape=lambda leaf: leaf.shape):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(shape(leaf), leaf.dtype, sharding=sharding), tree
        )

    if resident:
        indices = jax.ShapeDtypeStruct(leading, np.dtype("int32"), sharding=split)
        batch = put(data, everywhere), indices
    else:
        batch = put(data, split, lambda leaf: (*leading, *leaf.shape[1:]))
    metrics = put(jax.eval_shape(TrainMetrics.empty), everywhere)
    seed = jax.ShapeDtypeStruct((), np.dtype("uint32"), sharding=everywhere)
    return state, metrics, batch, seed
