"""Networks (flax linen): DDPM++ and NCSN++ with a second head and a blur embedding."""

from warm_diffusion.models.edm import from_edm
from warm_diffusion.models.initial import load_initial
from warm_diffusion.models.unet import UNet, ddpmpp, ncsnpp

__all__ = ["UNet", "ddpmpp", "from_edm", "load_initial", "ncsnpp"]
