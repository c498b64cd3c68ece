"""Networks (flax linen): DDPM++ and NCSN++ with a second head and a blur embedding."""

from warm_diffusion.models.edm_weights import from_edm
from warm_diffusion.models.unet import UNet, ddpmpp, ncsnpp

__all__ = ["UNet", "ddpmpp", "from_edm", "ncsnpp"]
