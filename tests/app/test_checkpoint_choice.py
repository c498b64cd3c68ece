"""Which checkpoints are evaluated, and waiting for those to come: folders and a clock alone."""

import json

import pytest

from warm_diffusion.app import Incomplete
from warm_diffusion.app.evaluate import checkpoint_choice


def choose(which, tmp_path, *, last=9, wait=0.0):
    return checkpoint_choice.chosen_steps(
        which, tmp_path, last=last, wait=wait, reports=tmp_path / "eval"
    )


def save(tmp_path, *steps):
    for step in steps:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)


def test_the_latest_is_the_one_of_most_steps(tmp_path):
    save(tmp_path, 900, 1000)
    (tmp_path / "checkpoints" / "1100.orbax-checkpoint-tmp").mkdir()
    assert list(choose("latest", tmp_path)) == [1000]
    assert list(choose("900", tmp_path)) == [900]
    assert list(choose("every", tmp_path)) == [900, 1000]


@pytest.mark.parametrize("which", ["latest", "3", "every"])
def test_waiting_ends_when_the_time_is_up(tmp_path, monkeypatch, which):
    now = [0.0]
    monkeypatch.setattr(checkpoint_choice.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        checkpoint_choice.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    with pytest.raises(ValueError, match="after 60 s of waiting"):
        list(choose(which, tmp_path, wait=60))
    assert 60 <= now[0] <= 62


def test_without_waiting_nothing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_choice.time, "sleep", lambda seconds: pytest.fail("slept"))
    with pytest.raises(ValueError, match="there is no checkpoint"):
        list(choose("latest", tmp_path))


def test_each_new_checkpoint_is_met_and_the_last_ends_it(tmp_path, monkeypatch):
    coming = [3, 6, 9]
    monkeypatch.setattr(
        checkpoint_choice.time, "sleep", lambda seconds: save(tmp_path, coming.pop(0))
    )
    assert list(choose("every", tmp_path, wait=60)) == [3, 6, 9]
    assert coming == []


def test_a_training_run_that_dies_leaves_the_evaluation_incomplete(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint_choice.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        checkpoint_choice.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    save(tmp_path, 3)
    steps = choose("every", tmp_path, wait=60)
    assert next(steps) == 3
    with pytest.raises(Incomplete, match="within 60 s after step 3; training ends at step 9"):
        next(steps)


def test_the_best_is_the_smallest_of_the_metric_most_reports_have(tmp_path):
    save(tmp_path, 1, 2, 3)
    folder = tmp_path / "eval"
    folder.mkdir()
    for step, metric, value in (
        (1, "fid5k_train", 9.0), (2, "fid5k_train", 7.0), (3, "fid5k_train", 8.0),
        (4, "fid5k_train", 1.0),  # its checkpoint is gone
        (3, "fid50k_train", 5.0),
    ):  # fmt: skip
        report = {"step": step, "metric": metric, metric: value}
        (folder / f"step_{step}.{metric}.json").write_text(json.dumps(report))
    assert list(choose("best", tmp_path)) == [2]
