"""Signals [B, L, C] instead of images: two steps at random heights, learnt in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from warm_diffusion import denoiser, losses, samplers, schedules, spectra

rng = np.random.default_rng(0)
heights = rng.uniform(-1, 1, (512, 2, 1))
x0 = jnp.asarray(np.repeat(heights, 16, axis=1), jnp.float32)  # [512, 32, 1]

ratio = spectra.recommend_bnr(spectra.power_spectrum(x0))  # steps have a spectrum of 1 / f^2
path, deviation = schedules.constant_bnr(ratio), float(x0.std())
sizes = [(34, 256), (256, 256), (256, 64)]  # in: 32 numbers and two levels; out: two heads
params = [jax.random.normal(jax.random.key(i), s) / s[0] ** 0.5 for i, s in enumerate(sizes)]


def denoise(params):
    """A denoiser of the parameters."""

    def network(x, c_noise, c_blur):  # [B, 32, 1], ln(beta) / 4 [B], log1p(alpha) / 4 [B]
        h = jnp.concatenate([x[..., 0], c_noise[:, None], c_blur[:, None]], axis=1)
        h = jax.nn.silu(jax.nn.silu(h @ params[0]) @ params[1]) @ params[2]
        return h.reshape(len(x), 32, 2)

    return denoiser.precondition(network, sigma_data=deviation)  # the loss learns it from here


@jax.jit
def step(params, state, key):
    """One step of Adam on all signals."""
    loss, gradient = jax.value_and_grad(
        lambda params: losses.score_matching_loss(denoise(params), key, x0, path).total.mean()
    )(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss


optimizer = optax.adam(1e-3)
state = optimizer.init(params)
for n in range(500):
    params, state, loss = step(params, state, jax.random.key(n))
signals = samplers.sample(denoise(params), samplers.initial_noise(range(64), (32, 1)), path)
