"""A whole training with a network of Equinox (which takes single images), Adam and an EMA."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, oracle, samplers, schedules, spectra


class Network(eqx.Module):
    """Two convolutions; noise and blur level shift the features between them."""

    first: eqx.nn.Conv2d
    levels: eqx.nn.Linear
    last: eqx.nn.Conv2d

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 64, 3, padding=1, key=keys[0])
        self.levels = eqx.nn.Linear(2, 64, key=keys[1])
        self.last = eqx.nn.Conv2d(64, 2, 3, padding=1, key=keys[2])  # two heads

    def __call__(self, x, c_noise, c_blur):  # [H, W, C], ln(beta) / 4, log1p(alpha) / 4
        levels = self.levels(jnp.stack([c_noise, c_blur]))
        h = jax.nn.silu(self.first(jnp.moveaxis(x, -1, 0)) + levels[:, None, None])
        return jnp.moveaxis(self.last(h), 0, -1)


x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path, network = schedules.constant_bnr(0.5), Network(jax.random.key(0))


def loss_fn(network, key):
    """Mean loss of 128 digits at levels drawn by the path."""
    draw, levels = jax.random.split(key)
    batch = x0[jax.random.randint(draw, (128,), 0, len(x0))]
    denoise = denoiser.precondition(jax.vmap(network))
    return losses.score_matching_loss(denoise, levels, batch, path).total.mean()


@eqx.filter_jit
def step(network, ema, state, key):
    """One step of Adam, and of the average of the weights that samples are drawn with."""
    loss, gradient = eqx.filter_value_and_grad(loss_fn)(network, key)
    updates, state = optimizer.update(gradient, state)
    network = eqx.apply_updates(network, updates)
    return network, optax.incremental_update(network, ema, 0.01), state, loss


# What to expect: the best linear denoiser has this loss, and a network must get below it.
linear = oracle.gaussian(x0.mean(axis=0), spectra.power_spectrum(x0))
bound = losses.score_matching_loss(linear, jax.random.key(0), x0, path).total.mean()

optimizer = optax.adam(1e-3)
ema, state = network, optimizer.init(eqx.filter(network, eqx.is_array))
for n in range(1000):
    network, ema, state, loss = step(network, ema, state, jax.random.key(n))
print(f"loss {loss:.3f}; of the best linear denoiser {bound:.3f}")
noise = samplers.initial_noise(jnp.arange(16), (8, 8, 1))
images = samplers.sample(denoiser.precondition(jax.vmap(ema)), noise, path)
