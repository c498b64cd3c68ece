"""EDM's own training step and sampler in PyTorch, from a checkout of NVlabs/edm that the user has.

Nothing of it is here: its classes (networks, loss, augmentation) and its sampler are imported from
the checkout, whose licence is CC BY-NC-SA 4.0. The loops around them are written for this benchmark
after the paper (arXiv 2206.00364, appendix F): Adam, the average of the weights, no TF32, as its
training has it; batches are random and on the device, as in `train_step.py`.
"""

import contextlib
import copy
import importlib
import pathlib
import sys
import time
from collections.abc import Iterator

import torch
from ml_collections import ConfigDict

# EDM's names of our configurations' transforms, and how much of each it applies; the flip's
# strength makes it happen to half of the images.
_AUGMENTATIONS = {
    "x_flip": {"xflip": 1e8}, "y_flip": {"yflip": 1}, "scale": {"scale": 1},
    "rotate": {"rotate_frac": 1}, "anisotropy": {"aniso": 1}, "translate": {"translate_frac": 1},
}  # fmt: skip


@contextlib.contextmanager
def _checkout(path: str) -> Iterator[None]:
    """Modules of the checkout can be imported.

    Raises:
      ValueError: it is none.
    """
    if not (pathlib.Path(path) / "training" / "networks.py").is_file():
        raise ValueError(f"--edm must be a checkout of github.com/NVlabs/edm, got {path}")
    sys.path.insert(0, str(pathlib.Path(path).absolute()))
    try:
        yield
    finally:
        sys.path.pop(0)


class Edm:
    """EDM's network of a configuration, its training step and its sampler.

    Attributes:
      batch_size: images per step.
      parameters: of the network.
    """

    def __init__(self, path: str, config: ConfigDict, half: bool):
        """`half` computes the convolutions in float16, EDM's --fp16."""
        with _checkout(path):
            networks, loss, augment = (
                importlib.import_module(f"training.{name}")
                for name in ("networks", "loss", "augment")
            )
            self._draw = importlib.import_module("generate").edm_sampler
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        options, data = config.model, config.data
        self._net = networks.EDMPrecond(
            img_resolution=data.resolution,
            img_channels=data.channels,
            use_fp16=half,
            model_type="SongUNet",
            model_channels=options.model_channels,
            channel_mult=list(options.channel_mult),
            num_blocks=options.num_blocks,
            attn_resolutions=list(options.attention_resolutions),
            dropout=options.dropout,
            augment_dim=9 if config.augment.transforms else 0,
        ).to(self._device)
        self._average = copy.deepcopy(self._net).eval().requires_grad_(False)
        self._loss = loss.EDMLoss()
        self._augment = None
        if config.augment.transforms:
            strengths = {}
            for name in config.augment.transforms:
                strengths |= _AUGMENTATIONS[name]
            self._augment = augment.AugmentPipe(p=config.augment.probability, **strengths)
        self.batch_size = config.training.batch_size
        self.parameters = sum(p.numel() for p in self._net.parameters())
        self._adam = torch.optim.Adam(self._net.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
        shape = (self.batch_size, data.channels, data.resolution, data.resolution)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self) -> float:
        """Runs one training step and waits for it."""
        began = time.perf_counter()
        self._net.train().requires_grad_(True)
        self._adam.zero_grad(set_to_none=True)
        images = self._images.to(torch.float32) / 127.5 - 1
        self._loss(self._net, images, augment_pipe=self._augment).sum().div(
            self.batch_size
        ).backward()
        for weight in self._net.parameters():
            if weight.grad is not None:
                torch.nan_to_num(weight.grad, nan=0, posinf=1e5, neginf=-1e5, out=weight.grad)
        self._adam.step()
        with torch.no_grad():
            pairs = zip(self._average.parameters(), self._net.parameters(), strict=True)
            for average, weight in pairs:
                average.copy_(weight.lerp(average, 0.999))
        self._wait()
        return time.perf_counter() - began

    def draw_seconds(self, steps: int) -> float:
        """Draws a batch by EDM's sampler, 2 `steps` - 1 calls, and waits for it."""
        began = time.perf_counter()
        noise = torch.randn(self._images.shape, device=self._device)
        with torch.no_grad():
            self._draw(self._average, noise, num_steps=steps)
        self._wait()
        return time.perf_counter() - began

    def peak_gigabytes(self) -> float:
        """Gigabytes (1e9) at the fullest moment, of what PyTorch holds; 0 on a CPU."""
        cuda = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
