"""A path of your own: any blur and noise that do not fall, checked when it is made."""

from warm_diffusion import oracle, pretrained, samplers, schedules

# Noise rises first, blur follows: alpha = beta^2 / 40 pixels.
path = schedules.from_functions(
    alpha=lambda t: t**2 / 40, beta=lambda t: t, t_min=0.002, t_max=80.0
)

# This network was trained at every ratio from 0 to 10, so it can be sampled along the path.
model = pretrained.load("pretrained/cifar10_16")
noise = samplers.initial_noise(range(4), model.image_shape)
images = samplers.sample(model.denoise, noise, path, solver="multistep", num_steps=18)

# Before training: does the sampler follow the path? Exact for Gaussian data of this spectrum.
gaussian = oracle.gaussian(model.mean, model.spectrum)
exact = samplers.sample(gaussian, noise, path, solver="multistep", num_steps=100)
