"""A whole training with a network of flax.nnx, Adam and an EMA."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, oracle, samplers, schedules, spectra


class Network(nnx.Module):
    """Two convolutions; noise and blur level shift the features between them."""

    def __init__(self, rngs):
        self.first = nnx.Conv(1, 64, (3, 3), rngs=rngs)
        self.levels = nnx.Linear(2, 64, rngs=rngs)
        self.last = nnx.Conv(64, 2, (3, 3), rngs=rngs)  # two heads

    def __call__(self, x, c_noise, c_blur):  # [B, H, W, C], ln(beta) / 4 [B], log1p(alpha) / 4 [B]
        levels = self.levels(jnp.stack([c_noise, c_blur], axis=1))
        return self.last(nnx.silu(self.first(x) + levels[:, None, None, :]))


x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path, network = schedules.constant_bnr(0.5), Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)
structure, ema = nnx.split(network)  # the average of the weights, which samples are drawn with


@nnx.jit
def step(network, ema, optimizer, key):
    """One step of Adam on 128 digits, and of the average of the weights."""
    draw, levels = jax.random.split(key)
    batch = x0[jax.random.randint(draw, (128,), 0, len(x0))]

    def loss_fn(network):
        denoise = denoiser.precondition(network)
        return losses.score_matching_loss(denoise, levels, batch, path).total.mean()

    loss, gradient = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, gradient)
    return optax.incremental_update(nnx.state(network), ema, 0.01), loss


# What to expect: the best linear denoiser has this loss, and a network must get below it.
linear = oracle.gaussian(x0.mean(axis=0), spectra.power_spectrum(x0))
bound = losses.score_matching_loss(linear, jax.random.key(0), x0, path).total.mean()

for n in range(1000):
    ema, loss = step(network, ema, optimizer, jax.random.key(n))
print(f"loss {loss:.3f}; of the best linear denoiser {bound:.3f}")
noise = samplers.initial_noise(jnp.arange(16), (8, 8, 1))
# The sampler's loop is jax.lax.scan: give it a pure function.
denoise = denoiser.precondition(lambda *inputs: nnx.merge(structure, ema)(*inputs))
images = samplers.sample(denoise, noise, path)
