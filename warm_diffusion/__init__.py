"""Blur-noise mixture diffusion models in JAX: the public API is the modules below.

    dct         orthonormal DCT and Gaussian blur
    schedules   paths through blur and noise
    grids       the sampler's times from the data's spectrum
    process     forward SDE, transitions, score, probability flow
    denoiser    network -> denoiser: preconditioning and parameterizations
    losses      score matching on both heads
    samplers    euler, heun, multistep, churn
    oracle      closed-form denoisers
    spectra     power spectra and the recommended blur-to-noise ratio
    sizes       spectra and networks at other image sizes
    levels      blur and noise of a photograph, read off its spectrum
    restoration from a blurred and noisy photograph back to a clean one

They are pure functions of arrays and need only jax and numpy. `warm_diffusion.pretrained` loads a
trained network and saves one for others. Architectures, data, training and
evaluation are sub-packages, imported by name.
"""

from warm_diffusion import (
    dct,
    denoiser,
    grids,
    levels,
    losses,
    oracle,
    process,
    restoration,
    samplers,
    schedules,
    sizes,
    spectra,
)

__version__ = "0.1.0"
__all__ = [
    "dct",
    "denoiser",
    "grids",
    "levels",
    "losses",
    "oracle",
    "process",
    "restoration",
    "samplers",
    "schedules",
    "sizes",
    "spectra",
]
