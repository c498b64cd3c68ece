"""Scores for an inverse problem: fill in a part of an image that was not measured.

Diffusion posterior sampling (Chung et al. 2022, arXiv 2209.14687): after each step of the sampler
the state moves down the gradient of the error of the clean estimate against the measurement.
"""

import itertools

import jax
import jax.numpy as jnp

from warm_diffusion import pretrained, process, samplers, schedules

model = pretrained.load("pretrained/digits")
path = schedules.constant_bnr(0.5)
times = schedules.time_grid(path, 25)

truth = jnp.asarray(model.sample([7], num_steps=9), jnp.float32) / 127.5 - 1  # [1, 8, 8, 1]
mask = jnp.ones((1, 8, 8, 1)).at[:, 4:].set(0.0)  # the upper half is measured
measured = mask * truth


def error(x, t):
    """Norms of what the clean estimates miss of the measurement, summed; and both heads."""
    heads = model.denoise(x, path.alpha(t), path.beta(t))
    missed = mask * heads.clean - measured
    return jnp.sqrt(jnp.sum(missed**2, axis=(1, 2, 3))).sum(), heads


@jax.jit
def step(x, t, t_next):
    """One Euler step of the probability flow, then one towards the measurement."""
    gradient, heads = jax.grad(error, has_aux=True)(x, t)
    x = x + (t_next - t) * process.velocity(x, heads, path, t)
    return x - gradient


x = path.beta(times[0]) * samplers.initial_noise(range(8), model.image_shape)
for t, t_next in itertools.pairwise(times[:-1]):
    x = step(x, t, t_next)
filled = model.denoise(x, path.alpha(path.t_min), path.beta(path.t_min)).clean  # eight answers
score = process.score(x, model.denoise(x, 0.5, 1.0).blurry, 1.0)  # grad log p, for your own sampler
