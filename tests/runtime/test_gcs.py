"""A faulting object store: what passes is waited for, what is refused is named."""

import errno
import itertools

import pytest

from tests.object_store import LOST, LOST_AFTERWARDS
from warm_diffusion.runtime import gcs, lock, storage

REFUSAL = "me@x does not have storage.objects.{0} access. Permission 'storage.objects.{0}' denied"
CALLS = {
    "exists": lambda place, _: (place / "x").exists(),
    "is_dir": lambda place, _: place.is_dir(),
    "iterdir": lambda place, _: [path.name for path in place.iterdir()],
    "glob": lambda place, _: [path.name for path in place.glob("x*")],
    "read": lambda place, _: (place / "x").read_bytes(),
    "fetch": lambda place, cache: storage.fetch(place / "x", cache).read_bytes(),
    "write": lambda place, _: storage.write_bytes(place / "x", b"content"),
    "write_text": lambda place, _: (place / "x").write_text("content"),
    "move": lambda place, _: storage.move(place / "x", place / "moved"),
    "unlink": lambda place, _: (place / "moved").unlink(),
    "remove": lambda place, _: storage.remove(place),
}


@pytest.fixture
def place(faulty_store, monkeypatch):
    """A folder with one object; pauses are short."""
    monkeypatch.setattr(gcs, "_FIRST_PAUSE", 0.001)
    where = storage.path("gs://bucket/faults")
    storage.write_bytes(where / "x", b"content")
    return where


@pytest.mark.parametrize("fault", [408, 429, 502, 503, LOST])
def test_what_passes_by_itself_shows_nowhere(place, faulty_store, tmp_path, fault):
    """Every second request fails."""
    requests, answer = itertools.count(), fault if fault is LOST else (fault, "busy")
    faulty_store.answer = lambda *_: answer if next(requests) % 2 else None
    found = {name: call(place, tmp_path) for name, call in CALLS.items()}
    assert found == dict.fromkeys(CALLS) | {
        "exists": True, "is_dir": True, "iterdir": ["x"], "glob": ["x"], "read": b"content",
        "fetch": b"content", "write_text": len("content"),
    }  # fmt: skip
    assert not place.exists()


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_pass_is_one_line_and_status_74(
    place, faulty_store, tmp_path, monkeypatch, name
):
    """Also where a file system's own methods would say that there is nothing."""
    monkeypatch.setattr(gcs, "_PATIENCE_SECONDS", 0.01)
    faulty_store.answer = lambda *_: (503, "busy")
    with pytest.raises(OSError, match="no answer in") as caught:
        CALLS[name](place, tmp_path)
    status, line = storage.explain(caught.value)
    assert status == 74
    assert line.startswith("gs://bucket/faults")
    assert "\n" not in line


@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused_is_a_mistake_that_names_object_and_permission(
    place, faulty_store, tmp_path, name
):
    faulty_store.answer = lambda *_: (403, REFUSAL.format("delete"))
    with pytest.raises(PermissionError) as caught:
        CALLS[name](place, tmp_path)
    status, line = storage.explain(caught.value)
    assert status == 2
    assert line.startswith("gs://bucket/faults")
    assert "permission storage.objects.delete is missing" in line


def test_credentials_that_expire_are_named(place, faulty_store):
    faulty_store.answer = lambda *_: (401, "Invalid Credentials")
    with pytest.raises(PermissionError) as caught:
        (place / "x").read_bytes()
    status, line = storage.explain(caught.value)
    assert status == 2
    assert line.startswith("gs://bucket/faults/x: permission denied (Invalid Credentials")


def test_credentials_that_have_expired_are_renewed_once(place, faulty_store):
    answers = [(401, "Invalid Credentials")]
    faulty_store.answer = lambda *_: answers.pop() if answers else None
    assert (place / "x").read_bytes()
    assert not answers


def test_a_role_that_may_not_delete_gets_no_lock_and_writes_nothing(place, faulty_store):
    faulty_store.answer = lambda method, _: (
        (403, REFUSAL.format("delete")) if method == "DELETE" else None
    )
    with pytest.raises(PermissionError, match=r"storage\.objects\.delete"), lock.hold(place):
        pass
    assert [path.name for path in place.iterdir()] == ["x"]


def test_a_lock_is_taken_although_the_answer_to_its_making_is_lost(place, faulty_store):
    made = []

    def answer(method, path):
        if method == "POST" and path.endswith("lock.json") and not made:
            made.append(path)
            return LOST_AFTERWARDS
        return None

    faulty_store.answer = answer
    with lock.hold(place) as check:
        check()
    assert made
    assert not (place / "lock.json").exists()


# As TensorStore words them, tried with a proxy; the first two after all of its tries.
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("ABORTED: All 2 retry attempts failed: busy [http_response_code='503'] [http_...]", 74),
        ("ABORTED: All 2 retry attempts failed: CURL error Server returned nothing (no headers, "
         "no data): Empty reply from server [curl_code='52']", 74),
        ("PERMISSION_DENIED: Error writing gs://b/o: me@x does not have storage.objects.create "
         "access. [http_response_body='{}'] [http_response_code='403']", 2),
        ("PERMISSION_DENIED: Invalid Credentials [http_response_code='401']", 2),
        ("UNKNOWN: Error writing \"/a/b\" [os_error_code='28']", 74),
        ("NOT_FOUND: no number", None),
    ],
)  # fmt: skip
def test_what_tensorstore_reports_is_judged_alike(text, status):
    found = storage.explain(ValueError(text))
    assert found is None if status is None else found[0] == status
    assert found is None or "[" not in found[1]


def test_an_error_that_says_not_which_file_names_it():
    with pytest.raises(OSError, match="Input/output") as caught, storage.naming("/a/b"):
        raise OSError(errno.EIO, "Input/output error")
    assert storage.explain(caught.value)[1].startswith("/a/b: Input/output error.")
