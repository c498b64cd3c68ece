"""CIFAR-10 by the paper's and EDM's recipe (55.8 M parameters; weeks of GPU time: 200 M images).

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

reads `tfds:cifar10`, prepared beforehand; a folder of images serves as well:
`--config.data.source=folder:DIR`. Variants, joined by commas: `configs/cifar10.py:small` is a
0.6 M-parameter network in batches of 32, to try things on a CPU; `:hot` is EDM; `:bnr=0.3` another
ratio. Absent so far: EDM's augmentation, without which results are worse than published.
"""

import ml_collections

from configs import default


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The paper's CIFAR-10 network (EDM, table 7) or a variant of it."""
    config = default.get_config()
    config.data.source = "tfds:cifar10"
    config.data.resolution = 32
    config.data.channels = 3
    config.model.model_channels = 128
    config.model.channel_mult = (2, 2, 2)
    config.model.num_blocks = 4
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.13
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_images = 10_000_000
    config.training.num_steps = 390_625
    config.training.batch_size = 512
    config.training.ema_halflife_images = (500_000,)
    config.training.sample_every = 5_000
    config.training.checkpoint_every = 5_000
    config.training.keep_every = 50_000
    config.eval.num_samples = 50_000
    for variant in filter(None, variants.split(",")):
        _apply(config, variant)
    return config


def _apply(config: ml_collections.ConfigDict, variant: str) -> None:
    name, _, value = variant.partition("=")
    if name == "small":
        config.model.model_channels = 24
        config.model.channel_mult = (1, 2, 2)
        config.model.num_blocks = 1
        config.model.dropout = 0.0
        config.optimizer.warmup_images = 2_000
        config.training.num_steps = 300
        config.training.batch_size = 32
        config.training.ema_halflife_images = (2_000,)
        config.training.log_every = 20
        config.training.sample_every = 100
        config.training.checkpoint_every = 100
        config.training.keep_every = 0
        config.sampling.batch_size = 64
        config.eval.num_samples = 256
    elif name == "hot":
        config.schedule.name = "hot"
    elif name == "bnr" and value:
        config.schedule.bnr = float(value)
    else:
        raise ValueError(f"configs/cifar10.py has no variant {variant!r}: small, hot or bnr=NUMBER")
