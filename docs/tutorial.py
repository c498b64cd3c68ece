# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Warm diffusion in ten minutes
#
# A diffusion model learns to undo damage. *Hot* diffusion damages images with noise, *cold* diffusion with
# blur, and *warm* diffusion ([Hsueh et al., ICLR 2025](https://arxiv.org/abs/2511.16904)) with both at once.
# This notebook shows how: the forward process, the spectrum behind
# it, the exact solution, a small network trained from nothing, samples, and a restored photograph.
#
# It runs in about a minute on one CPU core and downloads nothing. Run it in a checkout of the repository,
# after `pip install '.[app]'`.

# %%
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from warm_diffusion import (
    dct,
    denoiser,
    losses,
    oracle,
    pretrained,
    process,
    restoration,
    samplers,
    schedules,
    spectra,
)
from warm_diffusion.app import plots

STEPS = 1500  # of training below
REPOSITORY = next(p for p in map(pathlib.Path, (".", "..")) if (p / "pretrained").is_dir())
plt.rcParams.update({"figure.dpi": 140, "figure.constrained_layout.use": True, "font.size": 12})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def show(rows, row_labels, titles=()):
    """Images in [-1, 1], a list of lists, with labels at the left and titles above."""
    side = (4 if any(row_labels) else 5) / len(rows[0])
    figsize = (5, side * len(rows) + 0.35)
    _, axes = plt.subplots(len(rows), len(rows[0]), squeeze=False, figsize=figsize)
    for row, line in zip(axes, rows):
        for cell, image in zip(row, line):
            pixels = np.clip(np.asarray(image) / 2 + 0.5, 0, 1)
            cell.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
            for spine in cell.spines.values():
                spine.set_visible(False)
    for cell, label in zip(axes.flat, titles):
        cell.set_title(label, fontsize=12)
    for row, label in zip(axes, row_labels):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    plt.show()


# %% [markdown]
# ## 1. The forward process
#
# An image $x_0$ with pixels in $[-1, 1]$ becomes
#
# $$x = B(\alpha)\, x_0 + \beta\, \epsilon, \qquad \epsilon \sim N(0, I).$$
#
# $B(\alpha)$ is a Gaussian blur of $\alpha$ pixels, $\beta$ the strength of the noise. Their quotient
# $\alpha / \beta$ is the **blur-to-noise ratio** (BNR). It is 0 for hot diffusion and infinite for cold
# diffusion; in between diffusion is warm. Each row below has one ratio, each column one noise level β.

# %%
china, flower = load_sample_images().images  # two photographs that come with scikit-learn
size = [side // 2 for side in china.shape[1::-1]]
photos = [
    np.asarray(Image.fromarray(p).resize(size, Image.LANCZOS)) / 127.5 - 1 for p in (china, flower)
]
photo = jnp.asarray(photos[0][14:78, 71:135], jnp.float32)[None]  # [1, 64, 64, 3]

ratios = {"hot: 0": 0.0, "warm: 0.5": 0.5, "colder: 5": 5.0}
betas = [0.0, 0.25, 0.5, 1.0]
noise = samplers.initial_noise([0], photo.shape[1:])
states = [
    [process.perturb(photo, noise, ratio * beta, beta)[0] / np.sqrt(1 + beta**2) for beta in betas]
    for ratio in ratios.values()
]
show(states, ratios, [f"β {beta:g}" for beta in betas])

# %% [markdown]
# (Divided by $\sqrt{1 + \beta^2}$, so that the pictures stay visible.) The first two rows look alike: in the
# second row a blur is hidden in the noise. In the third row the blur is all too visible. Why is that?
#
# ## 2. Noise hides what blur takes
#
# Take the discrete cosine transform (DCT) of many small pieces of photographs. Coarse structure, at low frequency, varies
# strongly; fine detail hardly does. The black line below is the variance $S$ at each frequency. It falls like
# $1/f^2$, as it does for nearly all photographs.
#
# White noise has the same variance $\beta^2$ at every frequency: the dashed line. **What lies below the dashed
# line is hidden by noise.** Blur takes away high frequencies first: the coloured lines. With ratio 0.5 the blur
# only takes what the noise hides already. With ratio 5 it takes what could still be seen.

# %%
tiles = np.concatenate([
    p[:208, :320].reshape(13, 16, 20, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3) for p in photos
]).astype(np.float32)  # fmt: skip
spectrum = spectra.power_spectrum(tiles)  # variance of each DCT coefficient [16, 16]
frequency, power = spectra.radial_mean(spectrum)

beta = 0.3
plt.figure(figsize=(5, 3.6))
plt.loglog(frequency[1:], power[1:], color=plots.INK, linewidth=3, label="photographs")
for label, ratio in ratios.items():
    m = dct.transfer(ratio * beta, 16, 16)[..., 0]  # what the blur leaves of each coefficient
    left = spectra.radial_mean(m**2 * spectrum)[1]
    if ratio:
        plt.loglog(
            frequency[1:], left[1:], color=plots.ratio_colour(ratio), label=f"blurred, {label}"
        )
plt.axhline(beta**2, color=plots.NOISE, linestyle="--", label=f"noise floor, β = {beta}")
plt.ylim(1e-4)
plots.plain_log_ticks(plt.gca().xaxis)
plt.xlabel("frequency (cycles per pixel)")
plt.ylabel("variance of a DCT coefficient")
plt.title("16x16 pieces of two photographs")
plt.legend(fontsize=10)
plt.show()

# %% [markdown]
# So the data say how much blur is free. At the noise level that reaches a frequency's variance, what share of
# it has the blur left? If the worst frequency keeps 95 %, hardly anything visible was taken.
# `recommend_bnr` finds that ratio. For CIFAR-10 it gives 0.53; the paper found 0.5 best by training.

# %%
for ratio in (0.1, 0.5, 1.0, 2.0, 10.0):
    print(f"ratio {ratio:4}: the worst frequency keeps {spectra.least_kept(spectrum, ratio):.1%}")
recommended = spectra.recommend_bnr(spectrum)
print(f"recommended for these photographs: {recommended:.2f}")

# %% [markdown]
# What is gained? A network that only removes noise must draw all fine detail itself. Under warm diffusion the
# task is divided between two *heads*:
#
# * the **denoiser** $D$ estimates the blurry image $B x_0$ from $x$;
# * the **deblurrer** $R$ estimates the rest, $x_0 - B x_0$.
#
# Their sum is an estimate of the clean image.
#
# ## 3. The exact solution
#
# For a handful of images both heads can be computed exactly: every image is weighted by how well it explains
# $x$ (`oracle.mixture`). It shows what a perfect network would do. Here it knows ten digits and sees one of them,
# damaged more and more. With little damage it is sure; with much it answers with an average: the
# mean of all images that are still possible. (D is the denoiser's estimate, R the deblurrer's; α is half of β.)

# %%
digits = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # [1797, 8, 8, 1]
ten = digits[:10]
exact = oracle.mixture(ten)
levels = [0.2, 0.5, 1.0, 2.0]
noise = samplers.initial_noise([5], ten.shape[1:])
damaged = [process.perturb(ten[3:4], noise, 0.5 * b, b) for b in levels]
heads = [exact(x, 0.5 * b, b) for x, b in zip(damaged, levels)]
show(
    [
        [x[0] / np.sqrt(1 + b**2) for x, b in zip(damaged, levels)],
        [head.blurry[0] for head in heads],
        [head.residual[0] for head in heads],
        [head.clean[0] for head in heads],
    ],
    ["state x", "D", "R", "D + R"],
    [f"β {b:g}" for b in levels],
)

# %% [markdown]
# A sampler starts from pure noise and follows these estimates to lower and lower levels (`samplers.sample`). With the exact
# heads it ends at one of the ten digits on every path. So the sampler is right, and everything that
# follows depends on how well a network replaces the oracle.

# %%
start = samplers.initial_noise(jnp.arange(8), ten.shape[1:])
path = schedules.constant_bnr(0.5)
found, way = jax.jit(lambda z: samplers.sample(exact, z, path, return_trajectory=True))(start)
nearest = jnp.min(jnp.max(jnp.abs(found[:, None] - ten[None]), axis=(2, 3, 4)), axis=1)
print(
    f"largest difference of a pixel from the nearest of the ten digits: {float(nearest.max()):.4f}"
)
times = schedules.time_grid(path, 18)
shown = [8, 10, 12, 14, 18]
show(
    [[way[i][seed] / np.sqrt(1 + times[i] ** 2) for i in shown] for seed in range(3)],
    [f"seed {seed}" for seed in range(3)],
    [f"β {times[i]:.2g}" for i in shown],
)

# %% [markdown]
# ## 4. A network with two heads
#
# Any function of the image and two numbers will do: `c_noise` is ln(β) / 4, `c_blur` is ln(1 + α) / 4. This one has three layers and knows
# nothing of images. `denoiser.precondition` wraps it, so that its inputs and outputs have unit size, and
# `losses.score_matching_loss` damages a batch at random levels and compares both heads with the truth.
# It is trained at all ratios from 0 to 4 (`any_bnr`), so that it can follow any path later.

# %%
training_path = schedules.any_bnr(0.5, bnr_range=(0.2, 4.0), hot_share=0.25)
sizes = [(66, 384), (384, 384), (384, 128)]  # in: 64 pixels, two levels; out: two heads of 64
keys = jax.random.split(jax.random.key(0), len(sizes))
params = [jax.random.normal(key, s) / s[0] ** 0.5 for key, s in zip(keys, sizes)]


def heads_of(params):
    def network(x, c_noise, c_blur):
        h = jnp.concatenate([x.reshape(len(x), 64), c_noise[:, None], c_blur[:, None]], axis=1)
        for layer in params[:-1]:
            h = jax.nn.silu(h @ layer)
        return (h @ params[-1]).reshape(len(x), 8, 8, 2)

    return denoiser.precondition(network)


optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def step(carry, key):
    params, state = carry
    batch_key, loss_key = jax.random.split(key)
    x0 = digits[jax.random.randint(batch_key, (256,), 0, len(digits))]

    def loss(params):
        terms = losses.score_matching_loss(heads_of(params), loss_key, x0, training_path)
        return terms.total.mean(), (terms.denoise.mean(), terms.deblur.mean())

    gradient, parts = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), jnp.stack(parts)


train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
(params, _), history = train(
    (params, optimizer.init(params)), jax.random.split(jax.random.key(1), STEPS)
)

width = max(1, STEPS // 50)
smooth = history[: STEPS // width * width].reshape(-1, width, 2).mean(axis=1)
plt.figure(figsize=(5, 3))
for i, (name, colour) in enumerate({"denoiser": plots.NOISE, "deblurrer": plots.BLUR}.items()):
    plt.semilogy(np.arange(len(smooth)) * width, smooth[:, i], color=colour, label=name)
plt.xlabel("step")
plt.ylabel("loss")
plots.plain_log_ticks(plt.gca().yaxis)
plt.title("digits, all ratios from 0 to 4")
plt.legend()
plt.show()

# %% [markdown]
# ## 5. Three paths, one network
#
# The same network, the same seeds, three paths from noise to digit. The images differ little: the start
# decides, and the paths lead to nearly the same place. (Larger networks show no significant difference either:
# see the results page.)

# %%
start = samplers.initial_noise(jnp.arange(6), (8, 8, 1))
draw = jax.jit(lambda z, ratio: samplers.sample(heads_of(params), z, schedules.constant_bnr(ratio)))
drawn = {ratio: draw(start, jnp.float32(ratio)) for ratio in (0.0, 0.5, 2.0)}
show(
    list(drawn.values()),
    ["hot: 0", "warm: 0.5", "ratio 2"],
    [f"seed {seed}" for seed in range(6)],
)

# %% [markdown]
# ## 6. Restoring a photograph
#
# A blurred and noisy photograph is a state of the forward process. So a trained network leads it back, and one
# that has learned both heads undoes the blur as well. The network here comes with the repository. It has
# learned from thumbnails of 16x16 pixels and takes images of any size. Both levels are read off the image: the
# blur comes out a little larger than the one put in, for the photograph itself is not perfectly sharp.

# %%
model = pretrained.load(REPOSITORY / "pretrained" / "cifar10_16")
noise = samplers.initial_noise([0], photo.shape[1:])
y = process.perturb(photo, noise, 1.0, 0.1)  # one pixel of blur, 13 grey levels of noise
alpha, beta = restoration.estimate_levels(y, model.spectrum, contrast=True)
print(f"estimated: blur {float(alpha[0]):.2f} pixels, noise {float(beta[0]):.3f}")

denoise = jax.jit(model.denoise)
without_blur = denoise(y, jnp.zeros(1), beta).clean  # as if there were only noise
with_blur = denoise(y, alpha, beta).clean


def psnr(x):
    return 10 * np.log10(4 / np.mean((np.asarray(x) - np.asarray(photo)) ** 2))


versions = {"input": y, "noise undone": without_blur, "both undone": with_blur}
labels = [f"{name}: {psnr(x):.1f} dB" for name, x in versions.items()] + ["clean"]
panels = [x[0] for x in versions.values()] + [photo[0]]
show([panels[:2], panels[2:]], [], labels)

# %% [markdown]
# ## What to take along
#
# * Warm diffusion blurs and noises together; the ratio runs from hot (0) to cold (infinity).
# * Photographs have little power at high frequency, so noise hides fine detail first. Blur in the right
#   ratio only takes what is hidden already, and the spectrum gives the ratio.
# * Two heads divide the work: one removes noise, the other brings the detail back.
#
# Next: draw images with `python main.py --mode=sample --checkpoint=pretrained/cifar10_16 --workdir=runs/first`,
# move two sliders over a photograph in the [explorer](explorer.html), or train on images of your own.
#
# (Photographs: scikit-learn's china.jpg and flower.jpg, CC BY 2.0, [danielbuechele](https://www.flickr.com/photos/danielbuechele/)
# and [vultilion](https://www.flickr.com/photos/vultilion/).)
