"""Checkpoints: exact, atomic, verified; what is damaged is passed over and kept aside."""

import errno
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from warm_diffusion.runtime import storage
from warm_diffusion.training import checkpoints
from warm_diffusion.training.checkpoints import Checkpoints
from warm_diffusion.training.step import create_state

STATISTICS = {
    "mean": np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3),
    "spectrum": np.linspace(0, 1, 4, dtype=np.float32).reshape(2, 2),
}


def state_at(step, seed=0):
    rng = np.random.default_rng(seed + step)
    params = {"layer": {"kernel": jnp.asarray(rng.standard_normal((64, 3)), jnp.float32)}}
    state = create_state(lambda: None, params, optax.adam(1e-3), num_ema=2)
    ema = tuple(jax.tree.map(lambda leaf, n=n: leaf + n, params) for n in (1, 2))
    return state.replace(step=jnp.asarray(step, jnp.int32), ema=ema)


def write(workdir, steps, **options):
    saved = Checkpoints(workdir, **options)
    for step in steps:
        saved.save(state_at(step), STATISTICS, {"image_shape": [2, 2, 1]})
    saved.close()


def read(workdir, report=print):
    saved = Checkpoints(workdir)
    state = saved.restore_latest(state_at(0), report=report)
    saved.close()
    return state


def arrays(state):
    return jax.tree.leaves((state.step, state.params, state.ema, state.opt_state))


def largest_file(checkpoint):
    """Returns a file that holds arrays: orbax keeps a second copy, which it does not read."""
    return max((checkpoint / "state" / "d").iterdir(), key=lambda path: len(path.read_bytes()))


def test_what_is_restored_is_what_was_saved_bit_for_bit(place):
    write(place, [5])
    for got, expected in zip(arrays(read(place)), arrays(state_at(5)), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_no_checkpoint_restores_nothing(place):
    assert read(place) is None


def test_the_latest_and_every_kth_are_kept(place):
    write(place, [2, 4, 6, 8], keep_latest=2, keep_every=4)
    saved = Checkpoints(place, keep_latest=2, keep_every=4)
    assert saved.steps() == [4, 6, 8]
    saved.close()


def test_facts_are_kept_beside_the_state(tmp_path):
    write(tmp_path, [5])
    saved = Checkpoints(tmp_path)
    about = saved.about(5)
    saved.close()
    assert about["image_shape"] == [2, 2, 1]
    assert about["step"] == 5


def test_saving_a_step_again_is_no_error(tmp_path):
    write(tmp_path, [5])
    write(tmp_path, [5])


def test_the_state_may_change_while_it_is_being_saved(tmp_path):
    saved = Checkpoints(tmp_path)
    state = state_at(3)
    saved.save(state, STATISTICS, {})
    jax.tree.map(lambda leaf: leaf.delete(), state.params)  # as donation does
    saved.close()
    restored = read(tmp_path)
    np.testing.assert_array_equal(
        restored.params["layer"]["kernel"], state_at(3).params["layer"]["kernel"]
    )


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    storage.write_bytes(path, bytes(content))


def cut_in_half(path):
    content = path.read_bytes()
    storage.write_bytes(path, content[: len(content) // 2])


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, delete])
def test_a_damaged_checkpoint_is_passed_over_reported_and_moved_aside(tmp_path, damage):
    check_that_damage_is_passed_over(tmp_path, damage)


def test_a_damaged_checkpoint_on_gs_is_moved_aside_as_well(store):
    check_that_damage_is_passed_over(storage.path("gs://bucket/damage"), cut_in_half)


def check_that_damage_is_passed_over(workdir, damage):
    write(workdir, [5, 6], keep_latest=2)
    damage(largest_file(workdir / "checkpoints" / "6"))
    said = []
    restored = read(workdir, said.append)
    assert int(restored.step) == 5
    assert len(said) == 1
    assert "checkpoint 6 of" in said[0]
    assert (workdir / "damaged" / "6").is_dir()
    assert not (workdir / "checkpoints" / "6").exists()
    # and the run can write that step anew
    write(workdir, [6])
    assert int(read(workdir).step) == 6


@pytest.fixture
def not_empty(monkeypatch):
    """Folders whose deletion fails so often: others read or write in them still."""

    def fail(times):
        rmtree, failed = shutil.rmtree, []

        def refuse(path, ignore_errors=False, **options):
            if len(failed) == times:
                return rmtree(path, ignore_errors, **options)
            failed.append(path)
            if not ignore_errors:
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

        monkeypatch.setattr(shutil, "rmtree", refuse)

    return fail


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path, not_empty):
    """Imitates NFS, where a file that another process reads leaves another one behind."""
    not_empty(3)
    write(tmp_path, [4, 5, 6])
    with Checkpoints(tmp_path) as saved:
        assert saved.steps() == [6]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_what_a_failed_save_still_writes_ends_no_later_run(tmp_path, not_empty):
    left = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "d"
    left.mkdir(parents=True)
    not_empty(2)
    write(tmp_path, [6])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EMFILE, "Too many open files"),
     ValueError("UNAVAILABLE: connection reset"), PermissionError(errno.EACCES, "denied")],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    write(tmp_path, [5])
    saved = Checkpoints(tmp_path)

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(saved._manager, "restore", restore)
    with pytest.raises(ValueError, match=r"checkpoint 5 of .* cannot be restored") as raised:
        saved.restore_latest(state_at(0))
    assert not isinstance(raised.value, checkpoints.Damaged)
    monkeypatch.undo()
    saved.close()
    assert int(read(tmp_path).step) == 5
    assert not (tmp_path / "damaged").exists()


def test_a_half_written_checkpoint_is_not_seen(place):
    """On disk it has another name, on gs:// no marker yet."""
    write(place, [5])
    name = "6.orbax-checkpoint-tmp" if storage.is_local(place) else "6"
    partial = place / "checkpoints" / name
    storage.write_bytes(partial / "state" / "data", b"half")
    assert checkpoints.finished_steps(place) == [5]
    assert int(read(place).step) == 5
    assert not partial.exists()


def test_a_fresh_start_over_unreadable_checkpoints_is_refused(tmp_path):
    write(tmp_path, [5])
    cut_in_half(largest_file(tmp_path / "checkpoints" / "5"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be restored: tried \[5\]"):
        read(tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()  # nothing is lost


def test_an_absent_step_is_named_with_those_there_are(tmp_path):
    write(tmp_path, [5, 6], keep_latest=2)
    saved = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 .*\[5, 6\]"):
        saved.restore(7, state_at(0))
    saved.close()


def shapes():
    return jax.eval_shape(lambda: state_at(0).params)


@pytest.mark.parametrize("average", [-1, 0, 1])
def test_weights_are_read_without_the_optimizer(tmp_path, average):
    write(tmp_path, [5])
    with Checkpoints(tmp_path, read_only=True) as saved:
        found = saved.weights(5, shapes(), average)
    state = state_at(5)
    expected = state.params if average < 0 else state.ema[average]
    np.testing.assert_array_equal(found["layer"]["kernel"], expected["layer"]["kernel"])


def test_statistics_of_the_data_are_kept(tmp_path):
    write(tmp_path, [5])
    with Checkpoints(tmp_path, read_only=True) as saved:
        found = saved.statistics(5)
    assert found.keys() == STATISTICS.keys()
    for name, array in STATISTICS.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("part", ["params", "ema", "rest", "statistics"])
def test_each_part_has_a_checksum_of_its_own(tmp_path, monkeypatch, part):
    """Orbax restores flipped bits without a word: here what it restores is changed afterwards."""
    write(tmp_path, [5])
    read_item = Checkpoints._read

    def flipped(self, step, **items):
        found = read_item(self, step, **items)
        for item in items:
            if item == "about" or (item == "statistics") != (part == "statistics"):
                continue
            tree = found[item] if part in ("statistics", "rest") else found[item][part]
            leaves, structure = jax.tree.flatten(tree)
            changed = jax.tree.unflatten(structure, [leaves[0] + 1, *leaves[1:]])
            if part in ("statistics", "rest"):
                found = {**{name: found[name] for name in items}, item: changed}
            else:
                found = {item: {**found[item], part: changed}}
            found = types.SimpleNamespace(**found) if item != "state" else _Both(found)
        return found

    monkeypatch.setattr(Checkpoints, "_read", flipped)
    message = r"checkpoint 5 of .* is damaged: .*checksum"
    with (
        Checkpoints(tmp_path, read_only=True) as saved,
        pytest.raises(ValueError, match=message),
    ):
        saved.restore(5, state_at(0))
    if part in ("params", "ema"):
        with (
            Checkpoints(tmp_path, read_only=True) as saved,
            pytest.raises(ValueError, match=message),
        ):
            saved.weights(5, shapes(), -1 if part == "params" else 0)


class _Both(dict):
    """By attribute and by key, as orbax gives it."""

    __getattr__ = dict.__getitem__


def test_reading_makes_nothing(place):
    assert checkpoints.finished_steps(place / "nowhere") == []
    with Checkpoints(place / "nowhere", read_only=True) as saved:
        assert saved.steps() == []
    assert not (place / "nowhere").exists()
