"""The loss and the sampler with a network in plain JAX: digits from nothing in half a minute."""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, samplers, schedules

x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path = schedules.constant_bnr(0.5)
sizes = [(66, 512), (512, 512), (512, 128)]  # in: 64 pixels and two levels; out: two heads
params = [jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, s in enumerate(sizes)]


def denoise(params):
    """A denoiser of the parameters."""

    def network(x, c_noise, c_blur):
        h = jnp.concatenate([x.reshape(len(x), 64), c_noise[:, None], c_blur[:, None]], axis=1)
        h = jax.nn.silu(jax.nn.silu(h @ params[0]) @ params[1]) @ params[2]
        return h.reshape(len(x), 8, 8, 2)

    return denoiser.precondition(network)


def loss_fn(params, key):
    """Mean loss of all digits at levels drawn by the path."""
    return losses.score_matching_loss(denoise(params), key, x0, path).total.mean()


@jax.jit
def step(params, state, key):
    """One step of Adam."""
    loss, gradient = jax.value_and_grad(loss_fn)(params, key)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


optimizer = optax.adam(1e-3)
state = optimizer.init(params)
for n in range(2000):
    params, state, loss = step(params, state, jax.random.key(n))
images = samplers.sample(denoise(params), samplers.initial_noise(jnp.arange(64), (8, 8, 1)), path)
