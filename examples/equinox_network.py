"""The loss and the sampler with a network of Equinox, which works on single images."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, samplers, schedules


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

    def __call__(self, x, c_noise, c_blur):
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
def step(network, state, key):
    """One step of Adam."""
    loss, gradient = eqx.filter_value_and_grad(loss_fn)(network, key)
    updates, state = optimizer.update(gradient, state)
    return eqx.apply_updates(network, updates), state, loss


optimizer = optax.adam(1e-3)
state = optimizer.init(eqx.filter(network, eqx.is_array))
for n in range(1000):
    network, state, loss = step(network, state, jax.random.key(n))
noise = samplers.initial_noise(jnp.arange(16), (8, 8, 1))
images = samplers.sample(denoiser.precondition(jax.vmap(network)), noise, path)
