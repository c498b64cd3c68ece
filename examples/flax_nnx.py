"""The loss and the sampler with a network of flax.nnx."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, samplers, schedules


class Network(nnx.Module):
    """Two convolutions; noise and blur level shift the features between them."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 64, (3, 3), rngs=rngs)
        self.levels = nnx.Linear(2, 64, rngs=rngs)
        self.last = nnx.Conv(64, 2, (3, 3), rngs=rngs)  # two heads

    def __call__(self, x, c_noise, c_blur):
        levels = self.levels(jnp.stack([c_noise, c_blur], axis=1))
        return self.last(nnx.silu(self.first(x) + levels[:, None, None, :]))


x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path, network = schedules.constant_bnr(0.5), Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def step(network, optimizer, key):
    """One step of Adam on 128 digits."""
    draw, levels = jax.random.split(key)
    batch = x0[jax.random.randint(draw, (128,), 0, len(x0))]

    def loss_fn(network):
        denoise = denoiser.precondition(network)
        return losses.score_matching_loss(denoise, levels, batch, path).total.mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, gradient)
    return loss


for n in range(1000):
    loss = step(network, optimizer, jax.random.key(n))
noise = samplers.initial_noise(jnp.arange(16), (8, 8, 1))
structure, state = nnx.split(network)  # the sampler's loop is jax.lax.scan: give it a pure function
denoise = denoiser.precondition(lambda *inputs: nnx.merge(structure, state)(*inputs))
images = samplers.sample(denoise, noise, path)
