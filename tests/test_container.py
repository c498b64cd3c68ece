"""The Dockerfile copies what is there and installs extras that exist; hadolint lints it."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def test_everything_copied_is_there():
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.M) for word in line.split()]
    assert "pyproject.toml" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_the_extras_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = [name for text in re.findall(r"EXTRAS=(\S+)", TEXT) for name in text.split(",")]
    assert {"app", "cuda"} <= set(named)
    assert set(named) <= set(extras)


def test_hadolint_finds_nothing():
    beside = pathlib.Path(sys.executable).with_name("hadolint")
    found = beside if beside.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("needs hadolint: not there")
    run = subprocess.run([found, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
