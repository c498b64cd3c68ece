"""Networks (flax linen): DDPM++ and NCSN++ with a second head and a blur embedding."""

from warm_diffusion.models.edm import from_edm
from warm_diffusion.models.unet import UNet, by_name, ddpmpp, ncsnpp
from warm_diffusion.models.weights import init_params

__all__ = ["UNet", "by_name", "ddpmpp", "from_edm", "init_params", "ncsnpp"]
