"""FFHQ at 64x64 by EDM's recipe (DDPM++; 200 M images), at the paper's ratio.

    python main.py --config=configs/ffhq64.py --workdir=runs/ffhq64 \
        --config.data.source=folder:images1024x1024

takes FFHQ's PNG files (70,000 of 1024x1024; the thumbnails of 128x128 serve as well, with slightly
other pixels) and reduces them by Lanczos; `--config.data.resize=box` is the mean of each block.

Cost: 61.8 M parameters (247 MB; weights, one average and Adam's moments 1.0 GB), 243 GFLOP for an
image's training step (XLA's count, forward and gradient).

Data: Karras, Laine and Aila 2019 (arXiv 1812.04948). Recipe: Karras et al. 2022 (arXiv 2206.00364),
appendix F; ratio: Warm Diffusion (arXiv 2511.16904).
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    """CIFAR-10's recipe with what EDM changes for FFHQ-64."""
    config = cifar10.get_config()
    config.data.source = "folder:ffhq"
    config.data.resolution = 64
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.dropout = 0.05
    config.augment.probability = 0.15
    config.optimizer.learning_rate = 2e-4
    config.training.num_steps = 781_250
    config.training.batch_size = 256
    config.sampling.num_steps = 40  # 79 calls, as EDM
    return config
