"""What README.md shows works: its example runs, its commands and files exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warm_diffusion import losses

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_a_trained_network_is_loaded_and_sampled_in_three_lines(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, names = PYTHON[0], {}
    assert len(code.strip().splitlines()) == 3
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (16, 8, 8, 1)
    assert names["images"].dtype == np.uint8


def test_the_example_learns_and_samples():
    code = PYTHON[1]
    shortened = code.replace("range(2000)", "range(60)")
    assert shortened != code
    code, loop = shortened.split("for n in range")
    names = {}
    exec(compile(code, "README.md", "exec"), names)

    def loss():
        denoise = names["denoise"](names["params"])
        terms = losses.score_matching_loss(denoise, jax.random.key(7), names["x0"], names["path"])
        return float(terms.total.mean())

    before = loss()
    exec(compile("for n in range" + loop, "README.md", "exec"), names)
    assert loss() < 0.7 * before
    assert names["images"].shape == (64, 8, 8, 1)
    assert bool(jnp.all(jnp.isfinite(names["images"])))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_file_linked_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:configs|benchmarks)/\w+\.py\b|\bmain\.py\b", README)))
)
def test_every_script_named_is_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m ((?:benchmarks|warm_diffusion)[\w.]+)", README)))
)
def test_every_module_named_is_there(module):
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake (demo|test|lint)\b", README))))
def test_every_make_target_named_is_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "flag", sorted(set(re.findall(r"(?<=--)(?!config\.)[a-z]+(?==| )", README)))
)
def test_every_flag_named_is_defined(flag):
    sources = [ROOT / "main.py", *(ROOT / "benchmarks").glob("*.py")]
    assert any(re.search(rf'["-]{flag}"', source.read_text()) for source in sources)
