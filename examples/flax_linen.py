"""A whole training with a network of flax.linen, Adam and an EMA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, oracle, samplers, schedules, spectra


class Network(nn.Module):
    """Two convolutions; noise and blur level shift the features between them."""

    @nn.compact
    def __call__(self, x, c_noise, c_blur):  # [B, H, W, C], ln(beta) / 4 [B], log1p(alpha) / 4 [B]
        levels = nn.Dense(64)(jnp.stack([c_noise, c_blur], axis=1))
        h = nn.silu(nn.Conv(64, (3, 3))(x) + levels[:, None, None, :])
        return nn.Conv(2 * x.shape[-1], (3, 3))(h)  # two heads


x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path, network = schedules.constant_bnr(0.5), Network()
params = network.init(jax.random.key(0), x0[:1], jnp.zeros(1), jnp.zeros(1))


def denoise(params):
    """A denoiser of the parameters."""
    return denoiser.precondition(lambda *inputs: network.apply(params, *inputs))


@jax.jit
def step(params, ema, state, key):
    """One step of Adam on 128 digits, and of the average of the weights."""
    draw, levels = jax.random.split(key)
    batch = x0[jax.random.randint(draw, (128,), 0, len(x0))]

    def loss_fn(params):
        return losses.score_matching_loss(denoise(params), levels, batch, path).total.mean()

    loss, gradient = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(gradient, state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, ema, 0.01), state, loss


# What to expect: the best linear denoiser has this loss, and a network must get below it.
linear = oracle.gaussian(x0.mean(axis=0), spectra.power_spectrum(x0))
bound = losses.score_matching_loss(linear, jax.random.key(0), x0, path).total.mean()

optimizer = optax.adam(1e-3)
ema, state = params, optimizer.init(params)
for n in range(1000):
    params, ema, state, loss = step(params, ema, state, jax.random.key(n))
print(f"loss {loss:.3f}; of the best linear denoiser {bound:.3f}")
images = samplers.sample(denoise(ema), samplers.initial_noise(jnp.arange(16), (8, 8, 1)), path)
