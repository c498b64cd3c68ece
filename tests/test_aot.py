"""Compiled for machines that are not here: TPUs of four kinds by libtpu, and eight CPU devices.

`make tpu` installs libtpu (0.7 GB) and runs this; without it the tests for TPU are skipped.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import aot as benchmark
from configs import digits

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")  # four chips each
TINY = (
    "--config=configs/digits.py", "--config.model.channel_mult=(1,)",
    "--config.model.attention_resolutions=()", "--config.model.num_blocks=0",
    "--config.sampling.solver=euler",
)  # fmt: skip

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs TPU's compiler: make tpu, or pip install '.[tpu]' in a checkout",
)


def aot(*arguments, **environment):
    """Runs the benchmark in a process of its own: libtpu and the number of devices are global."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def compiled(out, *arguments, **environment):
    """The rows of the report, by (topology, program)."""
    run = aot(*TINY, *arguments, f"--out={out}", **environment)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["programs"]
    return {(row["topology"], row["program"]): row for row in rows}


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    """A bfloat16 network of 8 channels: its step on four kinds of chip, the rest on one.

    The rest is its sampler, and its step in slices under the name "slices".
    """
    folder = tmp_path_factory.mktemp("tpu")
    network = ("--config.model.model_channels=8", "--config.model.dtype=bfloat16")
    steps = ("--programs=train", f"--topology={','.join(TOPOLOGIES)}")
    sampler = ("--programs=sample", "--topology=v5e:2x2")
    slices = ("--programs=train", "--topology=v5e:2x2", "--config.training.grad_accumulation=4")
    sliced = compiled(folder / "slices.json", *network, *slices)
    return {
        **compiled(folder / "train.json", *network, *steps),
        **compiled(folder / "sample.json", *network, *sampler),
        ("v5e:2x2", "slices"): sliced["v5e:2x2", "train"],
    }


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    """A network of more than 1 MB on eight devices."""
    out = tmp_path_factory.mktemp("cpu") / "out.json"
    flags = "--xla_force_host_platform_device_count=8"
    options = ("--config.model.model_channels=64", "--programs=train,sample")
    split = ("--config.training.sharding=fsdp", "--programs=train")
    return compiled(out, *options, XLA_FLAGS=flags) | {
        "split": compiled(out, *options, *split, XLA_FLAGS=flags)["8 x cpu", "train"]
    }


def check_gradients_are_reduced_once(row):
    """One float32 number a parameter, and the means of four losses, travel; nothing else does.

    The compiler adds equal sums up once: the biases of a block's skip and of its last convolution
    have the same gradient. That is less than a hundredth of the parameters.
    """
    assert set(row["collectives"]) == {"all-reduce"}
    reduced = row["collectives"]["all-reduce"]
    expected = 4 * row["parameters"] + 4 * 4
    assert 0.99 * expected <= reduced["bytes"] <= expected
    assert reduced["looped"] == 0


def check_the_images_alone_are_gathered(row):
    size = 4 * row["batch_size"] * 8 * 8  # float32 digits
    gathered = {"count": 1, "bytes": size, "largest": size, "looped": 0}
    assert row["collectives"] == {"all-gather": gathered}


# --- eight CPU devices ---------------------------------------------------------------------------


def test_on_eight_devices_gradients_are_reduced_once_and_nothing_else_travels(cpu):
    row = cpu["8 x cpu", "train"]
    assert 4 * row["parameters"] > 1e6
    check_gradients_are_reduced_once(row)


def test_of_a_split_state_each_weight_is_gathered_and_each_gradient_reduced_once(cpu):
    whole, split = cpu["8 x cpu", "train"], cpu["split"]
    weights = 4 * split["parameters"]
    assert set(split["collectives"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Small arrays are everywhere and need no gathering; less than a tenth of this network.
    assert 0.9 * weights < split["collectives"]["all-gather"]["bytes"] <= weights
    reduced = sum(
        split["collectives"].get(kind, {"bytes": 0})["bytes"]
        for kind in ("all-reduce", "reduce-scatter")
    )
    assert 0.99 * weights < reduced < 1.01 * weights
    # Weights, one average and Adam's two moments: an eighth of each per device, and the images.
    images = 50_000 * 64  # aot's default, on every device
    assert split["bytes"]["arguments"] - images < 0.2 * (whole["bytes"]["arguments"] - images)


def test_on_eight_devices_the_sampler_gathers_its_images_alone(cpu):
    check_the_images_alone_are_gathered(cpu["8 x cpu", "sample"])


def test_on_eight_devices_nothing_calls_the_host_or_computes_in_float64(cpu):
    assert all(row["host_callbacks"] == row["float64"] == 0 for row in cpu.values())


# --- TPUs ----------------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_a_tpu_gradients_are_reduced_once_and_nothing_else_travels(tpu, topology):
    check_gradients_are_reduced_once(tpu[topology, "train"])


@needs_libtpu
def test_on_a_tpu_gradients_of_slices_are_reduced_once_after_the_last(tpu):
    check_gradients_are_reduced_once(tpu["v5e:2x2", "slices"])


@needs_libtpu
def test_on_a_tpu_the_sampler_gathers_its_images_alone(tpu):
    check_the_images_alone_are_gathered(tpu["v5e:2x2", "sample"])


@needs_libtpu
def test_on_a_tpu_all_convolutions_of_a_bfloat16_network_run_in_bfloat16(tpu):
    # Of the matrix products, those of the blur (float32 on purpose), of the embeddings and of the
    # softmax's gradient do not: they are no convolutions.
    for row in tpu.values():
        assert row["products"]["convolutions bfloat16"]["count"] > 10
        assert "convolutions float32" not in row["products"]


@needs_libtpu
def test_on_a_tpu_nothing_calls_the_host_or_computes_in_float64(tpu):
    assert all(row["host_callbacks"] == row["float64"] == 0 for row in tpu.values())


@needs_libtpu
def test_a_program_fits_its_chip(tpu):
    for row in tpu.values():
        assert 0 < row["bytes"]["total"] < row["chip_bytes"] / 10
        assert row["chips"] == 4


# --- mistakes ------------------------------------------------------------------------------------


def test_a_topology_that_is_not_known_or_cannot_be_compiled_for_is_told_in_one_line():
    run = aot(*TINY, "--topology=v4-32")
    assert run.returncode == 2
    assert run.stderr.startswith("error: cannot compile for topology 'v4-32'")
    assert "v4:2x2x4" in run.stderr
    assert "'.[tpu]'" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_program_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="takes train, sample, inception, got trian"):
        benchmark.compile_programs(digits.get_config(), "", ["trian"], 1)


def test_images_without_a_size_are_refused():
    config = digits.get_config()
    config.data.resolution = 0
    with pytest.raises(ValueError, match=r"set config\.data\.resolution"):
        benchmark.abstract_architecture(config)


@needs_libtpu
def test_a_batch_that_the_chips_cannot_share_is_refused():
    config = digits.get_config()
    config.training.batch_size = 129
    with pytest.raises(ValueError, match=r"expected a multiple of 4 .* got 129"):
        benchmark.compile_programs(config, "v5e:2x2", ["train"], 1)
