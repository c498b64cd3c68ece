"""A whole training in plain JAX, with Adam and an EMA: digits from nothing in half a minute."""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from warm_diffusion import denoiser, losses, oracle, samplers, schedules, spectra

x0 = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1] in [-1, 1]
path = schedules.constant_bnr(0.5)
sizes = [(66, 512), (512, 512), (512, 128)]  # in: 64 pixels and two levels; out: two heads
params = [jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, s in enumerate(sizes)]


def denoise(params):
    """A denoiser of the parameters."""

    def network(x, c_noise, c_blur):  # [B, 8, 8, 1], ln(beta) / 4 [B], log1p(alpha) / 4 [B]
        h = jnp.concatenate([x.reshape(len(x), 64), c_noise[:, None], c_blur[:, None]], axis=1)
        h = jax.nn.silu(jax.nn.silu(h @ params[0]) @ params[1]) @ params[2]
        return h.reshape(len(x), 8, 8, 2)  # blurry image and residual, scaled

    return denoiser.precondition(network)


def loss_fn(params, key):
    """Mean loss of all digits at levels drawn by the path."""
    return losses.score_matching_loss(denoise(params), key, x0, path).total.mean()


@jax.jit
def step(params, ema, state, key):
    """One step of Adam, and of the average of the weights that samples are drawn with."""
    loss, gradient = jax.value_and_grad(loss_fn)(params, key)
    updates, state = optimizer.update(gradient, state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, ema, 0.01), state, loss


# What to expect: the best linear denoiser has this loss, and a network must get below it.
linear = oracle.gaussian(x0.mean(axis=0), spectra.power_spectrum(x0))
bound = losses.score_matching_loss(linear, jax.random.key(0), x0, path).total.mean()

optimizer = optax.adam(1e-3)
ema, state = params, optimizer.init(params)
for n in range(2000):
    params, ema, state, loss = step(params, ema, state, jax.random.key(n))
print(f"loss {loss:.3f}; of the best linear denoiser {bound:.3f}")
images = samplers.sample(denoise(ema), samplers.initial_noise(jnp.arange(64), (8, 8, 1)), path)
