"""The package as a whole: who may import whom, what importing it loads, and house rules."""

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import warm_diffusion

PACKAGE = Path(warm_diffusion.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))

CORE = (
    "dct", "denoiser", "grids", "levels", "losses", "oracle", "process", "restoration", "samplers",
    "schedules", "sizes", "spectra",
)  # fmt: skip
LAYERS = {
    **dict.fromkeys(("warm_diffusion", *CORE), 0),
    "runtime": 1,
    "public": 1.5,
    **dict.fromkeys(("models", "data", "evaluation", "training"), 2),
    **dict.fromkeys(("architecture", "card"), 3),
    "drawing": 4,
    "pretrained": 5,
    "app": 6,
}
# A command, which nothing imports: it stands at the top of the house, whatever its name.
COMMANDS = {"warm_diffusion.models.edm_weights": 6}
ROOMS = 2  # the layer of those that do not import each other
CORE_MAY_IMPORT = {"jax", "numpy", "warm_diffusion"} | sys.stdlib_module_names
NOT_IN_THE_CORE = ("flax", "optax", "orbax", "ml_collections", "clu", "tensorflow_datasets",
                   "tensorflow", "sklearn", "matplotlib", "PIL")  # fmt: skip


# --- imports -------------------------------------------------------------------------------------


class Imports(ast.NodeVisitor):
    """Absolute names of the modules that a file imports; imports for type checkers do not count."""

    def __init__(self, package):
        self.package, self.names = package, set()

    def visit_If(self, node):
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.orelse:
                self.visit(part)
        else:
            self.generic_visit(node)

    def visit_Import(self, node):
        self.names.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parent = self.package.split(".")
            parent = parent[: len(parent) - node.level + 1]
            base = ".".join([*parent, base] if base else parent)
        # `from warm_diffusion import dct` imports warm_diffusion.dct.
        names = [f"{base}.{alias.name}" for alias in node.names]
        self.names.update(names if base == "warm_diffusion" else [base])


def member(name):
    """The part of the house that warm_diffusion.NAME... belongs to."""
    return name.split(".")[1] if "." in name else "warm_diffusion"


def violations(module, is_package, source):
    """Imports of a module that do not go downwards in the house."""
    package = module if is_package else module.rpartition(".")[0]
    imports = Imports(package)
    imports.visit(ast.parse(source))
    own, found = member(module), []
    layer = COMMANDS.get(module, LAYERS.get(own))
    if own not in LAYERS:
        return [f"{module} has no place in the house: see LAYERS"]
    for name in sorted(imports.names):
        root = name.split(".")[0]
        if root == "warm_diffusion":
            other = member(name)
            other = "warm_diffusion" if other == "__version__" else other
            upwards = LAYERS.get(other, 99) > layer
            sideways = LAYERS.get(other) == layer == ROOMS and other != own
            if upwards or sideways:
                found.append(name)
        elif layer == 0 and root not in CORE_MAY_IMPORT:
            found.append(name)
    return found


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@each_file
def test_imports_go_downwards_only(path):
    assert violations(module_name(path), path.name == "__init__.py", path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("warm_diffusion.dct", "import flax.linen"),
        ("warm_diffusion.dct", "def f():\n    from scipy import fft"),
        ("warm_diffusion.losses", "from warm_diffusion.training import state"),
        ("warm_diffusion.losses", "from warm_diffusion.app import build"),
        ("warm_diffusion.losses", "from . import models"),
        ("warm_diffusion.training.step", "from warm_diffusion.data import index"),
        ("warm_diffusion.training.step", "from ..models import unet"),
        ("warm_diffusion.runtime.storage", "from warm_diffusion import models"),
        ("warm_diffusion.pretrained", "from warm_diffusion.app import train"),
        ("warm_diffusion.models.unet", "from warm_diffusion import pretrained"),
        ("warm_diffusion.app.build", "from warm_diffusion import attic"),
        ("warm_diffusion.attic", "import jax"),
    ],
)
def test_an_import_against_the_rules_is_found(module, source):
    assert violations(module, False, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("warm_diffusion.losses", "import functools\nimport jax.numpy as jnp\nimport numpy as np"),
        ("warm_diffusion.losses", "from warm_diffusion import dct as _dct"),
        ("warm_diffusion.training.step", "import flax\nfrom warm_diffusion import losses"),
        ("warm_diffusion.training.step", "from . import state\nfrom .state import TrainState"),
        ("warm_diffusion.app.train", "from warm_diffusion import models, losses, pretrained"),
        (
            "warm_diffusion.data.stream",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from warm_diffusion.training import TrainState",
        ),
    ],
)
def test_an_import_within_the_rules_is_not_held_against_it(module, source):
    assert violations(module, False, source) == []


def test_importing_the_package_loads_no_library_but_jax_and_numpy():
    # In a process of its own: here, other tests have loaded them.
    script = f"import sys, warm_diffusion; print(*set({NOT_IN_THE_CORE!r}) & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


# --- house rules ---------------------------------------------------------------------------------


def test_the_public_api_is_the_core():
    assert sorted(warm_diffusion.__all__) == sorted(CORE)
    assert {path.stem for path in PACKAGE.glob("*.py")} >= set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_everything_public_in_the_core_has_a_docstring(name):
    module = importlib.import_module(f"warm_diffusion.{name}")
    undocumented = [] if inspect.getdoc(module) else [name]
    for label, value in vars(module).items():
        if label.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        # `__doc__`, not `getdoc`: a class must not pass by the docstring that it inherits. The
        # ones that dataclasses and named tuples write by themselves say nothing either.
        if not value.__doc__ or value.__doc__.startswith(f"{label}("):
            undocumented.append(label)
        if inspect.isclass(value):
            undocumented += [
                f"{label}.{key}"
                for key, member in vars(value).items()
                if not key.startswith("_")
                and (inspect.isfunction(member) or isinstance(member, property))
                and not member.__doc__
            ]
    assert undocumented == []


@each_file
def test_the_package_raises_instead_of_asserting(path):
    # `python -O` drops assert statements.
    nodes = ast.walk(ast.parse(path.read_text()))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []


@each_file
def test_every_except_names_what_it_catches(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    bare = [n.lineno for n in nodes if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert bare == []


@each_file
def test_files_stay_under_400_lines(path):
    assert len(path.read_text().splitlines()) < 400


def test_requirements_txt_is_what_the_package_and_the_app_need():
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = (root / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == project["dependencies"] + project["optional-dependencies"]["app"]
