"""An evaluation that is stopped: what it has drawn is kept, and the next start goes on there."""

import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from tests.app.conftest import REPOSITORY
from warm_diffusion import schedules
from warm_diffusion.app import Interrupted
from warm_diffusion.app.evaluate import kept_features
from warm_diffusion.drawing import Sampler
from warm_diffusion.evaluation import features


class Bar:
    count = 0

    def update(self, count):
        self.count += count


def fake_sampler(drawn, stop_at=None, send=signal.SIGTERM):
    """Images [B, 2, 2, 1] that tell their seed; a signal arrives while a batch is drawn."""

    def draw(params, seeds, start):
        drawn.extend(int(seed) for seed in seeds)
        if stop_at in seeds:
            os.kill(os.getpid(), send)
        return jnp.asarray(np.asarray(seeds, np.float32) / 127.5 - 1)[:, None, None, None] + (
            jnp.zeros((1, 2, 2, 1))
        )

    return Sampler(draw, 4, 1, schedules.hot())


def draw(folder, drawn, stop_at=None, seeds=range(100, 122), send=signal.SIGTERM):
    bar = Bar()
    found = kept_features.draw_features(
        fake_sampler(drawn, stop_at, send), {}, seeds, features.extractor("pixels"), folder,
        images=None, bar=bar,
    )  # fmt: skip
    assert bar.count == len(seeds)
    return found.values


EXPECTED = (np.arange(100, 122) / 127.5 - 1)[:, None] * np.ones(4)  # what the fake images are


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path, send):
    drawn = []
    with pytest.raises(Interrupted, match="stopped after 8 of 22 images"):
        draw(tmp_path, drawn, stop_at=109, send=send)  # while the batch before is worked on
    drawn.clear()
    np.testing.assert_allclose(draw(tmp_path, drawn), EXPECTED, atol=1e-6)
    assert sorted(set(drawn)) == list(range(108, 122))


def test_features_are_saved_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_features, "_SAVE_SECONDS", -1.0)
    draw(tmp_path, [])
    assert len(list(tmp_path.iterdir())) == 6  # 22 images in batches of 4
    drawn = []
    np.testing.assert_allclose(draw(tmp_path, drawn), EXPECTED, atol=1e-6)
    assert drawn == []


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_after_a_damaged_part_images_are_drawn_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(kept_features, "_SAVE_SECONDS", -1.0)
    draw(tmp_path, [])
    part = tmp_path / "features_00000008.npz"
    content = part.read_bytes()
    part.unlink() if damage == "removed" else part.write_bytes(content[:50])
    drawn = []
    np.testing.assert_allclose(draw(tmp_path, drawn), EXPECTED, atol=1e-6)
    assert min(drawn) == 108


def test_features_of_other_seeds_in_the_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_features, "_SAVE_SECONDS", -1.0)
    draw(tmp_path, [])
    with pytest.raises(ValueError, match="holds features of 22 images, expected 3"):
        draw(tmp_path, [], seeds=range(3))


def test_the_app_saves_what_it_has_drawn_and_exits_with_75(app, trained, tmp_path):
    arguments = ("--mode=eval", f"--checkpoint={trained[0]}", f"--workdir={tmp_path}")
    # main.py, but SIGTERM comes after the first batch of eight is drawn: the next is its last.
    program = f"""
import os, runpy, signal
from warm_diffusion.drawing import Sampler

def generate(*arguments, original=Sampler.generate):
    for n, batch in enumerate(original(*arguments)):
        if n == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch

Sampler.generate = generate
runpy.run_path({str(REPOSITORY / "main.py")!r}, run_name="__main__")
"""
    _, err = app.run(
        *arguments, "--config.eval.num_samples=1000", tiny=False, status=75, before=("-c", program)
    )
    assert "after 16 of 1,000 images and saved in" in err
    (part,) = (tmp_path / "eval" / "partial").rglob("features_*.npz")
    drawn = np.load(part)["values"]
    assert len(drawn) == 16
    assert not list((tmp_path / "eval").glob("step_*.json"))
