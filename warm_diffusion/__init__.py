"""Blur-noise mixture diffusion models in JAX: the public API is the modules below.

    dct         orthonormal DCT and Gaussian blur, over any number of axes
    schedules   paths through blur and noise, and the sampler's times
    process     forward SDE, transitions, score, probability flow
    denoiser    network -> denoiser: preconditioning and parameterizations
    losses      score matching on both heads
    samplers    from noise, or from any state, to clean data: euler, heun, multistep, churn
    oracle      closed-form denoisers
    spectra     power spectra and the recommended blur-to-noise ratio
    restoration blur and noise of a photograph, and the way back to a clean one

They are pure functions of arrays and need only jax and numpy. `warm_diffusion.pretrained` loads a
trained network and saves one for others. Architectures, data, training and
evaluation are sub-packages, imported by name.
"""

from warm_diffusion import (
    dct,
    denoiser,
    losses,
    oracle,
    process,
    restoration,
    samplers,
    schedules,
    spectra,
)

__version__ = "0.1.0"
__all__ = [
    "dct",
    "denoiser",
    "losses",
    "oracle",
    "process",
    "restoration",
    "samplers",
    "schedules",
    "spectra",
]
