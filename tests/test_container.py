"""The Dockerfile copies what is there and installs extras that exist."""

import pathlib
import re
import tomllib

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
