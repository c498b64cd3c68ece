"""CIFAR-10 by the paper's and EDM's recipe (DDPM++; 200 M images: weeks of GPU time).

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --download

fetches CIFAR-10 once (170 MB); without `--download` its files are looked for in `data.data_dir` and
the cache. A folder of images serves as well: `--config.data.source=folder:DIR`. Variants, joined by
commas: `configs/cifar10.py:cond` tells the network the class; `:hot` is EDM; `:bnr=0.3` another
ratio; `:small` a 0.7 M-parameter network in batches of 32, to try things on a CPU.

Cost: 55.8 M parameters (223 MB; weights, one average and Adam's moments 0.9 GB), 121 GFLOP for an
image's training step (XLA's count, forward and gradient).

Recipe: Karras et al. 2022 (arXiv 2206.00364), appendix F; ratio: Warm Diffusion (arXiv 2511.16904).
"""

import ml_collections

from configs import default

ALL_TRANSFORMS = ("x_flip", "y_flip", "scale", "rotate", "anisotropy", "translate")


def get_config(variants: str = "") -> ml_collections.ConfigDict:
    """The paper's CIFAR-10 network or a variant of it."""
    config = default.get_config()
    config.data.source = "cifar10"
    config.data.resolution = 32
    config.data.channels = 3
    config.model.model_channels = 128
    config.model.channel_mult = (2, 2, 2)
    config.model.num_blocks = 4
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.13
    config.augment.transforms = ALL_TRANSFORMS
    config.augment.probability = 0.12
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_images = 10_000_000
    config.training.num_steps = 390_625
    config.training.batch_size = 512
    config.training.ema_halflife_images = (500_000,)
    config.training.sample_every = 5_000
    config.training.checkpoint_every = 5_000
    config.training.keep_every = 50_000
    config.eval.num_samples = 50_000
    config.eval.features = "inception"
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
        config.augment.transforms = ()
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
        config.eval.repeats = 1
        config.eval.features = "auto"
    elif name == "cond":
        config.model.num_classes = 10
    elif name == "hot":
        config.schedule.name = "hot"
    elif name == "bnr" and value:
        config.schedule.constant_bnr.bnr = float(value)
    else:
        raise ValueError(
            f"configs/cifar10.py has no variant {variant!r}: cond, hot, bnr=NUMBER or small"
        )
