"""LSUN church at 128x128, the paper's largest set, at the paper's ratio.

    python examples/lsun.py church_outdoor_train_lmdb church.zip
    python main.py --config=configs/lsun_church128.py --workdir=runs/church \
        --config.data.source=zip:church.zip

takes LSUN's own database (126,227 images; `pip install lmdb`) out of its format, then of each image
the centred square, reduced by Lanczos. The network is our choice, EDM's for FFHQ-64 with a narrow
level on top of it, dropout as there, only horizontal flips: we did not find the paper's.

Cost: 66.8 M parameters (267 MB; weights, one average and Adam's moments 1.1 GB), 631 GFLOP for an
image's training step (XLA's count, forward and gradient).

Data: Yu et al. 2015 (arXiv 1506.03365). Recipe: Karras et al. 2022 (arXiv 2206.00364), appendix F;
ratio: Warm Diffusion (arXiv 2511.16904).
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    """CIFAR-10's recipe, widened to 128x128."""
    config = cifar10.get_config()
    config.data.source = "zip:church.zip"
    config.data.resolution = 128
    config.model.channel_mult = (1, 1, 2, 2, 2)
    config.model.dropout = 0.05
    config.augment.transforms = ("x_flip",)
    config.optimizer.learning_rate = 2e-4
    config.training.num_steps = 781_250
    config.training.batch_size = 256
    config.sampling.num_steps = 40
    return config
