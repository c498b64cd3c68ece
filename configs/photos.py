"""A small network that restores photographs: denoises and sharpens them, at any size.

    python main.py --config=configs/photos.py:folder:cifar10/train --workdir=runs/photos

What follows the colon is a source of small photographs to train on besides 32x32 tiles of
scikit-image's (an extra: pip install '.[photos]'), which count ten times; with nothing there, the
tiles alone. This is the recipe of `pretrained/photos`, minutes on a GPU (float32, add
`--config.training.steps_per_call=10`) and days on a CPU, where
`--config.init_from=pretrained/photos` shortens it.

It covers noise of about 1 to 60 grey levels of 255 (95 of 100 images), the sharp image with noise
alone, and blur in any ratio to the noise up to 100 pixels per unit of [-1, 1]. The path is for
pictures: it starts from images with noise of 51 grey levels and a blur of 2 pixels.
"""

import ml_collections

from configs import default


def get_config(more: str = "") -> ml_collections.ConfigDict:
    """Tiles of photographs, and those of the source `more`."""
    config = default.get_config()
    config.data.source = "+".join(["photos"] * 10 + [more]) if more else "photos"
    config.data.resolution = 32
    config.data.channels = 3
    config.data.tiles = True
    config.model.model_channels = 32
    config.model.channel_mult = (1, 2, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (16,)
    config.schedule.name = "any_bnr"
    config.schedule.any_bnr.bnr = 5.0
    config.schedule.any_bnr.bnr_range = (0.5, 100.0)
    config.schedule.any_bnr.hot_share = 0.2
    config.schedule.any_bnr.beta_max = 0.4
    config.schedule.any_bnr.p_mean = -2.6
    config.schedule.any_bnr.p_std = 1.0
    config.loss.residual_weight = 4.0  # what is restored is the sum of both heads
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_images = 50_000
    config.optimizer.grad_clip = 1.0
    config.training.num_steps = 6_000
    config.training.batch_size = 256
    config.training.ema_halflife_images = (100_000,)
    config.training.log_every = 200
    config.training.sample_every = 2_000
    config.training.checkpoint_every = 2_000
    config.sampling.batch_size = 64
    config.eval.num_samples = 1_024
    return config
