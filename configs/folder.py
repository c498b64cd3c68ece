"""Your own images: a folder of PNG and JPEG files of any sizes, as 64x64 pixels.

    python main.py --config=configs/folder.py:PHOTOS --workdir=runs/photos

What follows the colon is the folder; sub-folders are read as well. The centred square of each image
is reduced to 64x64; images that are smaller are left out and counted. The network has levels at 64,
32, 16 and 8 pixels; `--config.data.resolution=32` or `=128` halves or doubles all of them (32 has
attention at its second level, 64 at its third, 128 at its fourth).

Cost: 15.5 M parameters (62 MB; weights, one average and Adam's moments 0.25 GB), 61 GFLOP for an
image's training step at 64x64 (XLA's count, forward and gradient), four times that at 128x128.

The recipe is EDM's for FFHQ-64 (Karras et al. 2022, arXiv 2206.00364, appendix F) at half the
width, half the batch and an eighth of the images seen. docs/train.md says what to change for few
images and for many.
"""

import ml_collections

from configs import ffhq64


def get_config(folder: str = "images") -> ml_collections.ConfigDict:
    """FFHQ-64's recipe for the images in a folder, smaller and shorter."""
    config = ffhq64.get_config()
    config.data.source = f"folder:{folder}"
    config.data.too_small = "skip"
    config.model.model_channels = 64
    config.optimizer.warmup_images = 500_000
    config.training.num_steps = 200_000
    config.training.batch_size = 128
    config.training.sample_every = 5_000
    config.training.checkpoint_every = 5_000
    config.training.keep_every = 0
    config.sampling.num_steps = 18
    config.eval.num_samples = 0
    return config
