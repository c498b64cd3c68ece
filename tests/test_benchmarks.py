"""The benchmarks: programs read as XLA wrote them, short trainings equal to the app's.

`make tpu` installs libtpu (0.7 GB) and compiles for four kinds of TPU; without it those tests are
skipped.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import card, comparison, paired, train_step
from configs import digits
from warm_diffusion import pretrained
from warm_diffusion.app import build
from warm_diffusion.app.train import train
from warm_diffusion.data.images import save_png
from warm_diffusion.evaluation import features, metrics, reference

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


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tiny_config():
    config = digits.get_config()
    config.compilation_cache_dir = ""
    config.model.model_channels, config.model.channel_mult = 8, (1,)
    config.model.attention_resolutions = ()
    config.training.num_steps, config.training.batch_size = 3, 16
    config.training.ema_halflife_images, config.training.ema_rampup = (50,), 0.0
    config.optimizer.warmup_images = 0
    config.sampling.batch_size = 8
    return config


# --- programs compiled for other machines --------------------------------------------------------


def aot(*arguments, **environment):
    """Runs the benchmark in a process of its own: libtpu and the number of devices are global."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip


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
    return on_eight_devices(tmp_path_factory.mktemp("cpu"), "--programs=train,sample")


def on_eight_devices(folder, *options):
    """Programs of a network of more than 1 MB."""
    flags = "--xla_force_host_platform_device_count=8"
    options = ("--config.model.model_channels=64", *options)
    return compiled(folder / "out.json", *options, XLA_FLAGS=flags)


def check_gradients_are_reduced_once(row):
    """One float32 number per parameter, and the means of four losses, travel; nothing else does.

    The compiler adds equal sums up once: the biases of a block's skip and of its last convolution
    have the same gradient. That is less than a hundredth of the parameters.
    """
    assert set(row["collectives"]) == {"all-reduce"}
    reduced = row["collectives"]["all-reduce"]
    expected = 4 * row["parameters"] + 4 * 4
    assert 0.99 * expected <= reduced["bytes"] <= expected
    assert reduced["looped"] == 0


def check_only_the_images_are_gathered(row):
    size = 4 * row["batch_size"] * 8 * 8  # float32 digits
    assert row["collectives"] == {"all-gather": {"count": 1, "bytes": size, "looped": 0}}


def test_on_eight_devices_gradients_are_reduced_once_and_nothing_else_travels(cpu):
    row = cpu["8 x cpu", "train"]
    assert 4 * row["parameters"] > 1e6
    check_gradients_are_reduced_once(row)


@pytest.mark.long
def test_with_a_split_state_each_weight_is_gathered_and_each_gradient_reduced_once(cpu, tmp_path):
    options = ("--config.training.sharding=fsdp", "--programs=train")
    whole = cpu["8 x cpu", "train"]
    split = on_eight_devices(tmp_path, *options)["8 x cpu", "train"]
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
    check_only_the_images_are_gathered(cpu["8 x cpu", "sample"])


def test_no_program_calls_the_host_or_computes_in_float64(cpu):
    assert all(row["host_callbacks"] == row["float64"] == 0 for row in cpu.values())


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_a_tpu_gradients_are_reduced_once_and_nothing_else_travels(tpu, topology):
    check_gradients_are_reduced_once(tpu[topology, "train"])


@needs_libtpu
def test_on_a_tpu_gradients_of_slices_are_reduced_once_after_the_last(tpu):
    check_gradients_are_reduced_once(tpu["v5e:2x2", "slices"])


@needs_libtpu
def test_on_a_tpu_the_sampler_gathers_its_images_alone(tpu):
    check_only_the_images_are_gathered(tpu["v5e:2x2", "sample"])


@needs_libtpu
def test_on_a_tpu_all_convolutions_of_a_bfloat16_network_run_in_bfloat16(tpu):
    for row in tpu.values():
        assert row["convolutions"]["bfloat16"] > 10
        assert "float32" not in row["convolutions"]
        assert row["host_callbacks"] == row["float64"] == 0
        assert 0 < row["bytes"]["total"] < row["chip_bytes"] / 10


# --- speed ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_tiny_half_hour_does_all_parts_and_its_pieces_begin_the_next_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3))):
        save_png(tmp_path / "images" / f"{number}.png", image.astype(np.uint8))
    command = ["-m", "benchmarks.card", "--tiny", f"--data=folder:{tmp_path}/images"]
    command += [f"--out={tmp_path}/one"]
    subprocess.run([sys.executable, *command, "--minutes=30"], check=True, cwd=ROOT)
    parts = json.loads((tmp_path / "one" / "card.json").read_text())
    assert set(parts) == set(card.QUEUE[:7]) - {"edm"}
    assert all(part["done"] and not part["error"] for part in parts.values())
    (tmp_path / "two").mkdir()
    for piece in (tmp_path / "one").glob("state.*"):
        assert piece.stat().st_size < 2**24
        (tmp_path / "two" / piece.name).write_bytes(piece.read_bytes())
    options = types.SimpleNamespace(out=tmp_path / "two", minutes=1)
    assert card.Card(options).done == parts
    assert pretrained.load(tmp_path / "two" / "ship" / "model").info["images_seen"] > 0


def test_the_plan_names_every_part_and_the_first_half_hour_ends_with_a_network_to_ship():
    lines = card.plan(28, {}).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(card.QUEUE)
    assert [line.split()[0] for line in lines if "half hour 1" in line][-1] == "ship_0"
    assert len(card.plan(28, {"step": {"done": True}}).splitlines()) == len(lines) - 1


# --- comparisons ---------------------------------------------------------------------------------


@pytest.mark.long
def test_a_training_has_the_weights_of_the_apps_own_run(tmp_path):
    config = tiny_config()
    hot = train_step.variant(config, schedule__constant_bnr__bnr=0.0)
    trainer = comparison.Trainer(hot, build.dataset(config))
    trainer.train(hot, seed=4)  # the same compiled step, for another seed and path
    params, facts = trainer.train(config, seed=5)
    config.seed = 5
    state = train(config, str(tmp_path / "run"))
    for got, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(state.ema[0]), strict=True):
        np.testing.assert_allclose(got, leaf, atol=2e-5)
    assert facts["images_seen"] == 48


# --- pairs of networks ---------------------------------------------------------------------------


def test_pairs_are_compared_by_a_two_sided_t_test_of_their_logarithms():
    # Three logarithms 0, -1, -2: mean -1, standard error 1 / sqrt(3), so t = -sqrt(3); Student's
    # distribution with 2 degrees of freedom has p = 1 - |t| / sqrt(2 + t^2).
    warm = {seed: float(np.exp(-seed)) for seed in range(3)} | {9: 1.0}  # seed 9 has no partner
    found = paired.compare(warm, dict.fromkeys(range(3), 1.0))
    expected = {"mean": -1, "standard_error": 3**-0.5, "p": 1 - (3 / 5) ** 0.5}
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()))
    assert (found["seeds"], found["nearer"]) == (3, 2)


def test_drawn_images_are_judged_once_each(tmp_path):
    rng = np.random.default_rng(0)
    real, drawn = (rng.integers(0, 256, (40, 2, 2, 1), np.uint8) for _ in range(2))
    extract = features.extractor("pixels")
    info = dict.fromkeys(("source", "content_sha256", "resize"), "")
    facts = reference.facts(extract, real, info, "train")
    statistics = reference.collect(extract, [real], facts)
    (tmp_path / "run").mkdir()
    np.save(tmp_path / "run" / "drawn_heun_18.npy", drawn)
    config = {"seed": 4, "schedule": {"constant_bnr": {"bnr": 0.5}}}
    config |= {"training": {"num_steps": 10, "batch_size": 8}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        paired.judge(tmp_path / "rows.jsonl", tmp_path, statistics)
    (row,) = paired.read(tmp_path / "rows.jsonl")
    expected = metrics.compare(reference.collect(extract, [drawn], facts), statistics)
    assert row == {
        "seed": 4, "bnr": 0.5, "solver": "heun", "nfe": 35, "images_seen": 80,
        "fd_pixels_40": expected["fd_pixels_40"],
    }  # fmt: skip
