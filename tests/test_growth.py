"""benchmarks/growth.py: its count of FLOP is XLA's, and its step times are the closed forms."""

import pytest

from benchmarks import growth
from configs import cifar10


@pytest.mark.parametrize("mult", [(1,), pytest.param((1, 2), marks=pytest.mark.long)])
def test_the_analytic_count_is_xlas_but_for_borders_and_what_is_per_element(mult):
    # XLA leaves out what falls over a border, 4 % of a 3 x 3 convolution at 32 x 32: 1 - (94 /
    # 96)^2. It counts norms and activations, a few hundred FLOP a value against 18 x width.
    config = cifar10.get_config()
    config.model.model_channels, config.model.channel_mult = 64, mult
    config.model.num_blocks, config.augment.transforms = 1, ()
    row = growth.count(config)
    assert row["analytic"] == pytest.approx(row["xla"], rel=0.1)


def test_a_single_convolution_level_is_the_sum_by_hand():
    # One level of 4x4, width 8, one channel, no blocks but the decoder's three, embedding 32.
    got = growth.forward_flops(
        resolution=4, channels=1, model_channels=8, channel_mult=(1,), num_blocks=0,
        attention_resolutions=(), heads=2,
    )  # fmt: skip
    block = 2 * 9 * (8 + 8) * 8 * 16 + 2 * 32 * 8
    attention = 2 * 4 * 8 * 8 * 16 + 4 * 16 * 16 * 8
    wide = 2 * 9 * (16 + 8) * 8 * 16 + 2 * 32 * 8 + 2 * 16 * 8 * 16
    ends = 2 * 9 * 1 * 8 * 16 + 2 * 9 * 8 * 2 * 16
    embedding = 2 * (8 + 32) * 32 + 4 * 8 * 8
    assert got == 2 * block + attention + wide + ends + embedding


def test_steps_are_given_where_the_batch_can_be_shared_and_are_the_formulas():
    # 512 images of 197 GFLOP on 8 chips of 197 TFLOP/s at half use: 128 ms. 25 M parameters are 0.1
    # GB; 2 * 7 / 8 of it over 200 GB/s: 0.875 ms.
    row = {"xla": 197.0, "parameters": 25_000_000}
    steps = growth.scaling(row, 512, "v5e", 0.5)
    assert [step["chips"] for step in steps] == [8, 32, 128, 256]  # not 1,024
    assert steps[0]["compute_ms"] == pytest.approx(128.0)
    assert steps[0]["reduce_ms"] == pytest.approx(0.875)
