"""Two processes of two devices each, over one workdir: the same as one process; how they end."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import STEPS, assert_same_but_for_round_off, copy, free_port, rows, wait_for
from warm_diffusion.runtime import storage

DEVICES = ("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

# main.py with a single number in place of the network: all but process 0 compile at every start.
A_NUMBER = """
import main
from absl import app
import jax.numpy as jnp
from warm_diffusion.app import build
from warm_diffusion.losses import LossTerms
from warm_diffusion.pretrained import Architecture
def loss_fn(params, keys, batch):
    return LossTerms(*[jnp.full(len(batch.images), params["number"] ** 2)] * 4)
Architecture.init_params = lambda self, key: {"number": jnp.float32(1)}
build.loss, build.sampler = lambda *_: loss_fn, lambda *_, **__: None
app.run(main.main, flags_parser=main.parse)
"""


def start(app, *arguments, apart=((), ()), before=(), tiny=True):
    """Both processes, each with arguments of its own besides."""
    common = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    return [
        app.start(
            *common, f"--process_id={index}", *arguments, *apart[index], before=before,
            environment=[DEVICES], tiny=tiny,
        )
        for index in range(2)
    ]  # fmt: skip


def ends(processes, timeout=120):
    """Exit status and (stdout, stderr) of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [process.returncode for process in processes], outputs


def test_a_signal_to_one_saves_the_same_step_and_ends_all_with_75(app, tmp_path):
    long = ("--config.training.num_steps=100000", "--config.training.checkpoint_every=100000")
    processes = start(app, f"--workdir={tmp_path}", *long, before=("-c", A_NUMBER))
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    status, outputs = ends(processes)
    assert status == [75, 75], outputs
    step = rows(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    for out, err in outputs:
        assert err.startswith(f"SIGTERM: stopped after step {step:,}")
        assert err.count("\n") == 1  # nothing from libraries
        assert "Gloo" not in out


def test_where_the_images_differ_all_end_and_say_so_before_anything_is_written(app, tmp_path):
    for name, value in (("one", 0), ("other", 9)):
        np.save(tmp_path / f"{name}.npy", np.full((32, 8, 8), value, np.uint8))
    sources = [(f"--config.data.source=npy:{tmp_path}/{name}.npy",) for name in ("one", "other")]
    status, outputs = ends(start(app, f"--workdir={tmp_path / 'run'}", *STEPS, apart=sources))
    assert status == [2, 2], outputs
    for _, err in outputs:
        told = "error: process 1 differs from process 0: the hash of the images is '"
        assert err.splitlines()[-1].startswith(told)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_processes_train_draw_and_save_as_one_does(app, uninterrupted, tmp_path):
    """Started as Slurm starts them; JAX reads who is who from the environment."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
    flags = ["--distributed", f"--workdir={tmp_path}", *STEPS, "--config.training.sample_every=8"]
    processes = [
        app.start(
            *flags, environment={**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}.items()
        )
        for rank in "01"
    ]
    status, outputs = ends(processes, timeout=300)
    assert status == [0, 0], outputs
    assert "2 x cpu, global batch 16, 8 per device" in outputs[0][0]
    assert "step 8/8" not in outputs[1][0]  # one process reports
    assert (tmp_path / "samples" / "step_00000008.png").is_file()
    assert_same_but_for_round_off(uninterrupted, tmp_path)


@pytest.mark.long
def test_two_processes_on_gs_pass_over_a_damaged_checkpoint_and_train_as_one(
    app, uninterrupted, store, tmp_path
):
    source = shutil.copytree(uninterrupted, tmp_path / "run")
    (source / "metrics.jsonl").unlink()
    arrays = [
        p for p in (source / "checkpoints" / "8" / "state").rglob("*") if p.parent.name == "d"
    ]
    for path in arrays:
        path.write_bytes(bytes(path.stat().st_size))
    assert arrays
    workdir = copy(source, "gs://bucket/damaged")
    status, outputs = ends(start(app, f"--workdir={workdir}", *STEPS), timeout=240)
    assert status == [0, 0], outputs
    assert "checkpoint 8 of gs://bucket/damaged" in outputs[0][0]
    assert "continues at step 4 (64 images)" in outputs[0][0]
    assert storage.path("gs://bucket/damaged/damaged/8/_CHECKPOINT_METADATA").exists()
    assert_same_but_for_round_off(uninterrupted, workdir, steps=range(5, 9))


# main.py once for each of several lists of arguments (JSON, the last argument), in one process.
MODES = """
import json, sys
import main
from tests.app.conftest import _fresh_flags
*joined, others = sys.argv[1:]
for number, arguments in enumerate(json.loads(others)):
    sys.argv[1:] = arguments + (joined if number == 0 else [])
    with _fresh_flags():
        main.main(main.parse(sys.argv))
"""


@pytest.mark.long
def test_two_processes_do_in_every_mode_what_one_does(
    app, uninterrupted, inception_weights, tmp_path
):
    np.save(tmp_path / "rgb.npy", np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8))
    run = f"--checkpoint={uninterrupted}"
    weights = f"--config.eval.inception_weights={inception_weights}"

    def arguments(out):
        few = ("--config.eval.num_samples=16", "--config.eval.repeats=1")
        return [
            ["--mode=sample", run, f"--workdir={out}", "--seeds=0-9"],
            ["--mode=eval", run, f"--workdir={out}", *few],
            ["--mode=analyze", run, f"--workdir={out}", "--config.analysis.num_images=8"],
            ["--mode=fid_stats", f"--workdir={out}", f"--config.data.source=npy:{tmp_path}/rgb.npy",
             "--config.data.channels=3", "--config.eval.features=inception", weights],
            ["--mode=export", run, f"--workdir={out / 'model'}", "--config.export.num_images=4"],
        ]  # fmt: skip

    for each in arguments(tmp_path / "one"):
        app.run(*each, tiny=False)
    lists = json.dumps(arguments(tmp_path / "two"))
    processes = start(app, lists, before=("-c", MODES), tiny=False)
    status, outputs = ends(processes, timeout=200)
    assert status == [0, 0], outputs
    one, two = (
        {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert two.keys() - {p for p in two if "tfevents" in p.name} == {
        p for p in one if "tfevents" not in p.name
    }
    for path in (p for p in one if p.suffix == ".png"):
        pixels = [np.asarray(Image.open(side[path])).astype(int) for side in (one, two)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1, path
    reports = [json.loads(side[Path("eval/step_00000008.json")].read_text()) for side in (one, two)]
    assert reports[1]["device"] == "4 x cpu"
    assert reports[1]["fd_pixels_16"] == pytest.approx(reports[0]["fd_pixels_16"], rel=1e-3)
    name = next(p for p in one if p.name.startswith("inception_train_6"))
    means = [np.load(side[name])["mean"] for side in (one, two)]
    np.testing.assert_allclose(means[1], means[0], atol=1e-4)
