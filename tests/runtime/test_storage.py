"""storage.py's promises, on local disk and on gs:// (a real server, see object_store.py)."""

import errno
import os
import pathlib
import pwd
import tempfile
import urllib.request

import numpy as np
import pytest

from warm_diffusion.runtime import storage


def names(folder):
    return sorted(found.name for found in folder.iterdir())


# --- places --------------------------------------------------------------------------------------


def test_a_local_place_is_absolute_and_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert storage.path("~/runs") == storage.path("runs") == tmp_path / "runs"


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME and a user id without a name, as in containers; returns the folder of temporaries."""

    def nobody(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_folder_caches_are_temporary_and_a_line_says_so(homeless, capsys):
    folder = homeless / f"warm_diffusion-{os.getuid()}"
    assert storage.default_cache_dir() == folder / ".cache" / "warm_diffusion"
    assert storage.path("~/x") == folder / "x"
    assert folder.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().out.count(f"caches are kept in {folder}") == 1


def test_a_temporary_home_that_somebody_else_has_made_is_refused(homeless):
    (homeless / f"warm_diffusion-{os.getuid()}").symlink_to(homeless)
    with pytest.raises(ValueError, match="is another user's: set HOME"):
        storage.default_cache_dir()


def test_the_home_folder_of_an_unknown_user_is_a_mistake(monkeypatch):
    for call in (storage.path, lambda where: storage.local(where, "--input")):
        with pytest.raises(ValueError, match=r"there is no user nosuchuser, got ~nosuchuser/x"):
            call("~nosuchuser/x")


def test_a_place_on_gs_keeps_its_url(store):
    place = storage.path("gs://bucket/runs/one/")
    assert str(place) == "gs://bucket/runs/one"
    assert storage.path(place) == place
    assert str(place.parent / "two.json") == "gs://bucket/runs/two.json"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://bucket/run", "expected a local path or gs://BUCKET/FOLDER, got s3://bucket/run"),
        ("file:///run", "expected a local path or gs://BUCKET/FOLDER"),
        ("gs://", "expected a local path or gs://BUCKET/FOLDER"),
        (pathlib.Path("gs://bucket/run"), "gs:/bucket/run has lost a slash"),
        ("gs://bucket/run[1]", r"must not contain \* \? \[ \] or \.\."),
        ("gs://bucket/../run", r"must not contain \* \? \[ \] or \.\."),
    ],
)
def test_a_place_that_cannot_be_is_refused_in_one_line(where, message):
    with pytest.raises(ValueError, match=message) as caught:
        storage.path(where)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(store):
    with pytest.raises(ValueError, match="there is no bucket gs://no-bucket: correct the path"):
        storage.path("gs://no-bucket/run")


@pytest.mark.parametrize("status", [401, 403])
def test_missing_credentials_are_one_line(faulty_store, status):
    faulty_store.answer = lambda *_: (status, "Anonymous caller\ndoes not have access")
    with pytest.raises(ValueError, match="it needs credentials, such as by gcloud") as caught:
        storage.path(f"gs://locked-{status}/run")
    assert "Anonymous caller does not have access" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_gcsfs_the_way_to_install_it_is_named(monkeypatch):
    def absent():
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(storage, "object_store", absent)
    with pytest.raises(ValueError, match=r"gs://other needs gcsfs \(.*\): ") as caught:
        storage.path("gs://other/run")
    assert str(caught.value).endswith("pip install '.[gcs]' in a checkout")


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a\\b", os.fsdecode(b"a\xff")])
def test_a_workdir_whose_checkpoints_could_not_be_read_is_refused_through_links_too(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    storage.check_for_checkpoints(tmp_path)
    for place in (tmp_path / name / "run", tmp_path / "link" / "run"):
        with pytest.raises(ValueError, match="--workdir must be UTF-8 without"):
            storage.check_for_checkpoints(place)


def test_what_stays_local_says_so(store):
    assert storage.local("/cache", "data.cache_dir") == pathlib.Path("/cache")
    with pytest.raises(ValueError, match="must be a local path, got gs://bucket/c: copy"):
        storage.local("gs://bucket/c", "data.cache_dir")


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_written_over_and_read(place):
    for content in (b"first", b"2"):
        storage.write_bytes(place / "a" / "file", content)
        assert (place / "a" / "file").read_bytes() == content
    assert names(place / "a") == ["file"]


def test_json_is_read_as_it_was_written(place):
    storage.write_json(place / "x.json", {"one": np.float32(0.5), "two": [np.int64(2)]})
    assert storage.read_json(place / "x.json") == {"one": 0.5, "two": [2]}
    with pytest.raises(ValueError, match="Out of range float"):
        storage.write_json(place / "x.json", float("nan"))
    assert storage.read_json(place / "x.json") == {"one": 0.5, "two": [2]}


def test_absent_and_broken_json_are_distinguished(place):
    with pytest.raises(FileNotFoundError):
        storage.read_json(place / "x.json")
    storage.write_bytes(place / "x.json", b"{")
    with pytest.raises(ValueError, match=r"x\.json cannot be read as JSON"):
        storage.read_json(place / "x.json")


def test_arrays_are_read_as_they_were_written(place):
    array = np.arange(6.0).reshape(2, 3)
    storage.write_npz(place / "x.npz", array=array, text=np.array("a"))
    with storage.open_npz(place / "x.npz") as file:
        np.testing.assert_array_equal(file["array"], array)
        assert str(file["text"]) == "a"


def test_what_another_process_writes_is_seen(store):
    """Past gcsfs: its listings, kept for ever unless told otherwise, would not show it."""
    place = storage.path("gs://bucket/others")
    storage.write_bytes(place / "mine", b"")
    assert names(place) == ["mine"]
    assert not (place / "theirs").exists()
    url = f"{store}/upload/storage/v1/b/bucket/o?uploadType=media&name=others/theirs"
    urllib.request.urlopen(urllib.request.Request(url, b"x")).close()
    assert names(place) == ["mine", "theirs"]
    assert [found.name for found in place.glob("th*")] == ["theirs"]
    assert (place / "theirs").exists()


# --- lines ---------------------------------------------------------------------------------------


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (storage.read_json, storage.open_npz, storage.Lines):
        with pytest.raises(ValueError, match="pipe is not a regular file: remove it"):
            read(pipe)


def test_flushed_lines_are_all_there(place):
    for part in (range(0, 5), range(5, 7)):  # the second continues the first
        lines = storage.Lines(place / "x.jsonl")
        for n in part:
            lines.append(str(n))
        lines.flush()
    assert (place / "x.jsonl").read_text() == "".join(f"{n}\n" for n in range(7))


def test_lines_that_a_new_start_does_not_keep_go(place):
    storage.write_bytes(place / "x.jsonl", b"1\n2\n3\n4")  # the last one cut off
    lines = storage.Lines(place / "x.jsonl", keep=lambda line: int(line) < 3)
    assert (place / "x.jsonl").read_text() == "1\n2\n"
    lines.append("5")
    lines.flush()
    assert (place / "x.jsonl").read_text() == "1\n2\n5\n"


def test_an_object_is_put_once_a_second_at_most(store, monkeypatch):
    puts, now = [], [0.0]
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda *args: puts.append(now[0]) or write(*args))
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    lines = storage.Lines("gs://bucket/often.jsonl")
    for tenths in range(35):
        now[0] = tenths / 10
        lines.append(str(tenths))
    lines.flush()
    assert puts == [0.0, 1.0, 2.0, 3.0, 3.4]
    assert storage.path("gs://bucket/often.jsonl").read_text().count("\n") == 35


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_appears_with_all_its_files(place):
    storage.write_folder(place / "model", {"weights": b"w", "config": b"c"})
    assert names(place / "model") == ["config", "weights"]
    assert names(place) == ["model"]


def test_a_folder_that_fails_half_way_leaves_nothing(place, monkeypatch):
    storage.write_bytes(place / "other", b"")
    write = storage.write_files

    def fails(files):
        write(dict(list(files.items())[:1]))
        raise OSError("no space left")

    monkeypatch.setattr(storage, "write_files", fails)
    with pytest.raises(OSError, match="no space left"):
        storage.write_folder(place / "model", {"a": b"a", "b": b"b", "config": b"c"})
    assert names(place) == ["other"]


def test_a_killed_write_of_a_folder_on_gs_lacks_the_last_file(store, monkeypatch):
    """The order in which objects appear is all that a kill leaves."""
    seen = []
    write = storage.write_files
    monkeypatch.setattr(
        storage, "write_files", lambda files: seen.append(set(files)) or write(files)
    )
    place = storage.path("gs://bucket/killed")
    storage.write_folder(place, {"a": b"a", "b": b"b", "config": b"c"})
    assert seen == [{place / "a", place / "b"}, {place / "config"}]


def test_a_folder_is_moved_with_all_its_files(place):
    files = {"marker": b"m", "a/b/c": b"1", "a/d": b"2"}
    storage.write_files({place / "from" / name: content for name, content in files.items()})
    storage.move(place / "from", place / "aside" / "to", marker="marker")
    assert not (place / "from").exists()
    for name, content in files.items():
        assert (place / "aside" / "to" / name).read_bytes() == content


def test_a_folder_moved_on_gs_loses_its_marker_first(store, monkeypatch):
    """After a kill in the middle there is the whole, or a part without the marker."""
    place = storage.path("gs://bucket/moved")
    storage.write_files({place / "from" / name: b"" for name in ("a", "marker", "z")})
    monkeypatch.setattr(storage, "remove", lambda _: None)  # killed there
    storage.move(place / "from", place / "to", marker="marker")
    assert names(place / "from") == ["a", "z"]
    assert names(place / "to") == ["a", "marker", "z"]


def test_what_is_removed_is_gone_and_may_be_absent(place):
    storage.write_files({place / "a" / "b": b"", place / "c": b"", place / "d": b""})
    for name in ("a", "c", "nothing"):
        storage.remove(place / name)
    assert names(place) == ["d"]


# --- copies in the cache -------------------------------------------------------------------------


def test_a_local_file_is_its_own_copy(tmp_path):
    assert storage.fetch(tmp_path / "x") == tmp_path / "x"


def test_an_object_is_fetched_once_for_each_version(store, tmp_path):
    place = storage.path("gs://bucket/data/images.npy")
    storage.write_bytes(place, b"first")
    copy = storage.fetch(place, tmp_path)
    assert (copy.name, copy.read_bytes()) == ("images.npy", b"first")
    copy.write_bytes(b"seen")
    assert storage.fetch(str(place), tmp_path).read_bytes() == b"seen"
    storage.write_bytes(place, b"other")  # as long as the first
    assert storage.fetch(place, tmp_path).read_bytes() == b"other"


def test_a_copy_made_again_is_the_same_file(store, tmp_path):
    """To prepared data, which know a file by its path, size and time."""
    storage.write_bytes("gs://bucket/again", b"x")
    copy = storage.fetch("gs://bucket/again", tmp_path)
    before = copy.stat()
    copy.unlink()
    assert storage.fetch("gs://bucket/again", tmp_path) == copy
    assert copy.stat().st_mtime_ns == before.st_mtime_ns


def test_a_copy_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    def fail(_, target):
        pathlib.Path(target).write_bytes(b"con")
        raise OSError("no network")

    storage.write_bytes("gs://bucket/half", b"content")
    monkeypatch.setattr(storage.object_store(), "get_file", fail)
    with pytest.raises(OSError, match="no network"):
        storage.fetch("gs://bucket/half", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_object_that_is_not_there_or_a_folder_is_named(store, tmp_path):
    storage.write_bytes("gs://bucket/folder/file", b"")
    for name in ("absent", "folder"):
        with pytest.raises(ValueError, match=f"there is no file gs://bucket/{name}"):
            storage.fetch(f"gs://bucket/{name}", tmp_path)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOENT, 2), (errno.EACCES, 2), (errno.ENOSPC, 74), (errno.ENOTEMPTY, 74),
     (errno.ESTALE, 74), (errno.EBUSY, 74), (errno.EMFILE, 74)],
)  # fmt: skip
def test_only_a_path_that_cannot_be_is_a_mistake(number, status):
    found, told = storage.explain(OSError(number, os.strerror(number), "/a/b"))
    assert found == status
    assert told.startswith(f"/a/b: {os.strerror(number)}")


def test_a_full_disk_is_found_however_deep():
    error = RuntimeError("a library's")
    error.__cause__ = OSError(errno.ENOSPC, "full", "/a")
    assert storage.explain(error)[0] == 74
    assert storage.explain(RuntimeError("another")) is None
