"""Files made by an enemy or by a bad disk: read, or refused in one line; never anything else.

Each example damages a sound file (bits, bytes, pieces moved, doubled, cut off) or is made of random
bytes. An audit hook sees whether something is written outside the cache, a process is started, a
connection made, or a pickle loaded. A short form runs with the suite, `-m long` the long one.
"""

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from configs import default
from tests.app.conftest import REPOSITORY, _fresh_flags
from tests.test_pretrained import make_model
from warm_diffusion import pretrained
from warm_diffusion.app import settings as configurations
from warm_diffusion.data import load_dataset
from warm_diffusion.evaluation import reference

_NO_SHRINKING = (Phase.explicit, Phase.generate)  # a failure is shown as found, at once
MEGABYTES = 1024  # more than the largest example needs, less than a bomb would
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class",
             "socket.connect")  # fmt: skip
lengths = pytest.mark.parametrize(
    "examples", [25, pytest.param(600, marks=pytest.mark.long)], ids=["short", "long"]
)
_watched = threading.local()


def _audit(event, arguments):
    allowed = getattr(_watched, "folder", None)
    if allowed is None:
        return
    # Noted, not raised: what reads a file may catch every exception.
    if event in FORBIDDEN:
        _watched.seen.append(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        mode, flags = arguments[1] or "", arguments[2] or 0
        writes = set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not os.fsdecode(arguments[0]).startswith((allowed, "/dev/null")):
            _watched.seen.append(f"written: {arguments[0]!r}")


sys.addaudithook(_audit)


def attempt(folder, function):
    """Runs it; a ValueError that says something is as good as success."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watched.folder, _watched.seen = str(folder), []
    told = "read"
    try:
        function()
    except ValueError as error:
        told = str(error).strip()
    finally:
        _watched.folder = None
    assert told
    assert _watched.seen == []
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024, f"{grown / 1024:.0f} MB"


@pytest.mark.parametrize("act", [
    lambda folder: (folder / "outside").write_text(""),
    lambda _: pickle.loads(b"cos\ngetpid\n."),
    lambda _: subprocess.run(["true"], check=False),
])  # fmt: skip
def test_the_watch_sees(tmp_path, act):
    with pytest.raises(AssertionError):
        attempt(tmp_path / "inside", lambda: act(tmp_path))


@st.composite
def damaged(draw, content):
    content = bytearray(content)
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        size = draw(st.integers(1, 40))
        match draw(st.sampled_from(["flip", "bytes", "cut", "double", "delete", "end"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "bytes":
                new = draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8))
                content[at : at + len(new)] = new
            case "double":
                content[at:at] = content[at : at + size]
            case "delete":
                del content[at : at + size]
            case "cut":
                del content[at:]
            case "end":
                content += draw(st.binary(max_size=40))
    return bytes(content)


def encoded(kind):
    stream = io.BytesIO()
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/0.png", "a/1.png", "b/0.png"):
            archive.writestr(name, encoded("PNG"))
    return stream.getvalue()


def numpy_file(save, **arrays):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def check(content, name, examples, tmp_path, read):
    """`read(path)` of every damaged form of a file's content."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=_NO_SHRINKING,
    )  # fmt: skip
    @given(damaged(content))
    def one(content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        attempt(tmp_path, lambda: read(path))

    one()


def cached(spec, tmp_path):
    return load_dataset(spec, cache_dir=str(tmp_path / "cache"))


@lengths
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image(tmp_path, examples, kind):
    name = f"images/a.{kind.lower()}"
    check(encoded(kind), name, examples, tmp_path,
          lambda path: cached(f"folder:{path.parent}", tmp_path))  # fmt: skip


@lengths
def test_a_zip_file(tmp_path, examples):
    check(zipped(), "a.zip", examples, tmp_path, lambda path: cached(f"zip:{path}", tmp_path))


@lengths
def test_an_array(tmp_path, examples):
    content = numpy_file(lambda s, a: np.save(s, a), a=np.zeros((5, 8, 8), np.uint8))
    check(content, "a.npy", examples, tmp_path, lambda path: cached(f"npy:{path}", tmp_path))


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("0.png", encoded("PNG")), ("0.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def table():
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a"]}}
    rows = pyarrow.table({"img": [{"bytes": encoded("PNG"), "path": "a.png"}], "label": [0]})
    rows = rows.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pyarrow.parquet.write_table(rows, stream := io.BytesIO())
    return stream.getvalue()


@lengths
@pytest.mark.parametrize(("kind", "make"), [
    ("tar", tarred),
    ("npz", lambda: numpy_file(np.savez, images=np.zeros((2, 8, 8), np.uint8), labels=[0, 1])),
    ("parquet", table),
])  # fmt: skip
def test_an_archive(tmp_path, examples, kind, make):
    check(make(), f"a.{kind}", examples, tmp_path,
          lambda path: cached(f"{kind}:{path}", tmp_path))  # fmt: skip


@lengths
def test_cifar10s_pickles(tmp_path, examples):
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}

    def read(path):
        load_dataset("cifar10:test", data_dir=str(path.parent), cache_dir=str(tmp_path / "cache"))

    content = pickle.dumps(batch, protocol=2)
    check(content, "cifar-10-batches-py/test_batch", examples, tmp_path, read)


@lengths
def test_statistics(tmp_path, examples):
    content = numpy_file(np.savez, mu=np.zeros(4), sigma=np.eye(4))
    check(content, "a.npz", examples, tmp_path, lambda path: reference.load(path))


@lengths
def test_a_configuration(tmp_path, examples):
    content = configurations.to_json(default.get_config()).encode()

    def read(path):
        config = configurations.load(str(path), default.get_config())
        configurations.check(config)

    check(content, "config.json", examples, tmp_path, read)


@lengths
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_folder(tmp_path, examples, name):
    folder = tmp_path / "model"
    pretrained.save(make_model(), folder, samples=np.zeros((0, 8, 8, 1), np.uint8))
    content = (folder / name).read_bytes()
    check(content, f"model/{name}", examples, tmp_path, lambda path: pretrained.load(path.parent))


@lengths
def test_flags(tmp_path, examples, monkeypatch):
    """Any text for any key: parsed and in range, or a line and status 2."""
    values = st.text("0123456789.-e,()'\"[]{}:=ainfNoetru\n\0é", max_size=12)
    keys = st.sampled_from(sorted(configurations._flat(default.get_config().to_dict())))

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck), phases=_NO_SHRINKING)  # fmt: skip
    @given(keys, values)
    def one(key, value):
        argv = [str(REPOSITORY / "main.py"), f"--config.{key}={value}"]
        said = io.StringIO()

        def read():
            try:
                main.parse(argv)
                configurations.check(main.FLAGS.config)
            except SystemExit as end:
                told = said.getvalue()
                if end.code != 2 or not told.startswith("error: ") or told.count("\n") != 1:
                    raise AssertionError(f"{end.code} {told}") from end

        monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there
        with _fresh_flags(), contextlib.redirect_stderr(said):
            attempt(tmp_path, read)

    one()
