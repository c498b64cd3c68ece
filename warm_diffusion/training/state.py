"""Training state and one step of training: gradient, Adam, averages, guard.

    (1)  ema      <- params + d (ema - params),   d = 0.5^(batch / halflife)
         halflife <- min(halflife, rampup * images seen)                         EDM, sec. 5

A gradient that is not finite changes neither weights nor averages nor optimizer: the decision is
made inside the step, so all devices agree on it.
"""

from collections.abc import Callable, Sequence

import flax
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax.training import train_state

from warm_diffusion.losses import LossTerms

LossFn = Callable[[dict, jax.Array, jax.Array], LossTerms]  # (params, key, uint8 images)


class TrainState(train_state.TrainState):
    """flax's state (step, params, opt_state) with averaged weights and the non-finite counters."""

    ema: tuple[dict, ...]
    nonfinite_total: jax.Array
    nonfinite_in_a_row: jax.Array


def create_state(
    apply_fn: Callable, params: dict, optimizer: optax.GradientTransformation, num_ema: int
) -> TrainState:
    """The state before the first step; the averages start at the weights."""
    return TrainState.create(
        apply_fn=apply_fn,
        params=params,
        tx=optimizer,
        # Copies: the step donates the state, and one buffer cannot be donated twice.
        ema=tuple(jax.tree.map(jnp.copy, params) for _ in range(num_ema)),
        nonfinite_total=jnp.zeros((), jnp.int32),
        nonfinite_in_a_row=jnp.zeros((), jnp.int32),
    )


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
class TrainMetrics(clu_metrics.Collection):
    """Means over the steps since the last report that had a finite gradient."""

    loss: clu_metrics.Average.from_output("loss")
    denoise: clu_metrics.Average.from_output("denoise")
    deblur: clu_metrics.Average.from_output("deblur")
    consistency: clu_metrics.Average.from_output("consistency")
    grad_norm: clu_metrics.Average.from_output("grad_norm")


def make_train_step(
    loss_fn: LossFn,
    key: jax.Array,
    *,
    batch_size: int,
    ema_halflives: Sequence[float],
    ema_rampup: float,
) -> Callable[[TrainState, TrainMetrics, jax.Array], tuple[TrainState, TrainMetrics]]:
    """The training step, to be jitted with the state and the metrics donated.

    Args:
      loss_fn: (params, key, images) -> LossTerms, one number an image.
      key: seed key of the run; step n uses fold_in(key, n), so no random state is kept.
      batch_size: global number of images a step.
      ema_halflives: in images, one per set of averaged weights.
      ema_rampup: see eq. (1).

    Returns:
      (state, metrics, uint8 images [B, H, W, C]) -> (state, metrics).
    """

    def train_step(state, metrics, images):
        def objective(params):
            terms = loss_fn(params, jax.random.fold_in(key, state.step), images)
            return terms.total.mean(), terms

        grads, terms = jax.grad(objective, has_aux=True)(state.params)
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
            mask=finite.reshape(1),
        )
        return state, metrics.merge(step_metrics)

    return train_step


def is_finite(state: TrainState) -> jax.Array:
    """Whether weights, averages and optimizer hold finite numbers only."""
    tree = (state.params, state.ema, state.opt_state)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
