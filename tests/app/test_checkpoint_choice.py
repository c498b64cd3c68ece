"""Which checkpoints are evaluated, and waiting for those to come: folders and a clock alone."""

import json
import types

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


def test_the_best_is_the_least_of_the_protocol_that_most_steps_have_and_of_this_run(
    tmp_path, monkeypatch, capsys
):
    def load(place, ema):
        return types.SimpleNamespace(info={"weights_sha256": f"{place.name} {ema}"})

    monkeypatch.setattr(checkpoint_choice.pretrained, "load", load)
    save(tmp_path, 1, 2, 3)
    folder = tmp_path / "eval"
    folder.mkdir()
    sampling = {"ema": 0, "solver": "heun", "num_steps": 18, "bnr": -1.0}
    common = dict.fromkeys(checkpoint_choice._PROTOCOL, "as all") | {"metric": "fid5k_train"}
    for number, (step, value, change) in enumerate([
        (1, 9.0, {}), (2, 7.0, {}), (3, 8.0, {}),
        (4, 1.0, {}),  # its checkpoint is gone
        (3, 1.0, {"metric": "fid50k_train"}),
        *((3, 1.0, {"sampling": {**sampling, key: other}})
          for key, other in [("solver", "euler"), ("num_steps", 9), ("bnr", 0.0), ("ema", 1)]),
        (3, 1.0, {"reference": "of other images"}),
        (3, 1.0, {"weights_sha256": "of another run"}),
    ]):  # fmt: skip
        report = {**common, "sampling": sampling, "step": step, "weights_sha256": f"{step} 0"}
        report |= change
        report[report["metric"]] = value
        (folder / f"step_{step}.{number}.json").write_text(json.dumps(report))
    (folder / "step_3.damaged.json").write_text("{")
    (folder / "step_3.foreign.json").write_text("[7]")
    (folder / "step_3.null.json").write_text(json.dumps({**report, "fid5k_train": None}))
    assert list(choose("best", tmp_path)) == [2]
    notes = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert len(notes) == 4
    assert "step_3.10.json is skipped: it reports on other weights" in notes[-1]
