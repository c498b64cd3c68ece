"""scikit-learn's handwritten digits: 1,797 real 8x8 images, no download; minutes on two CPU cores.

python main.py --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """A 0.4 M-parameter DDPM++ at the paper's ratio, 1,500 steps of 128 images."""
    config = default.get_config()
    config.data.source = "digits"
    config.data.resolution = 8
    config.data.channels = 1
    config.eval.repeats = 1  # a third of the time; three for numbers to report
    return config
